"""Shared pieces: a small corpus, a small recipe, and a way to run commands as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # tests call their functions, at small size

from small import ROOT, environment, recipe_mapping, rows, small_text, train, write_jsonl, write_recipe

__all__ = ["ROOT", "environment", "recipe_mapping", "rows", "small_text", "train", "write_jsonl", "write_recipe"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus of 200 documents."""
    write_jsonl(tmp_path / "corpus.jsonl", small_text(200))
    return tmp_path


def hfpretrain(*arguments: str, **env: str):
    """The console command."""
    return subprocess.run(
        [sys.executable, "-m", "hfpretrain.cli", *arguments],
        cwd=ROOT,
        env=environment(**env),
        capture_output=True,
        text=True,
    )
