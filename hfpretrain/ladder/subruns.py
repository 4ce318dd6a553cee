"""Trainings that another command starts: processes of their own, with a user's recipe and engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfpretrain.recipe import shipped
from hfpretrain.recipe.redaction import SECRETS
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.recipe.yaml import parse_yaml


class Process(subprocess.Popen[bytes]):
    """Its messages go into a file: a pipe that nobody reads meanwhile would stop it when full."""

    def __init__(self, command: list[str], secrets: Sequence[str] = ()):
        """`secrets`: addresses with secrets, which the recipe's file has without them."""
        # Not as arguments of the command, which other users of the machine can see.
        env = {**os.environ, SECRETS: json.dumps(list(secrets))} if secrets else None
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        super().__init__(command, stdout=subprocess.DEVNULL, stderr=self.messages, env=env)


def command(engine: str | None, num_processes: int | None) -> list[str]:
    """What starts a training; recipe and overrides follow.

    `engine`: an accelerate file or the name of one that is shipped, None for `python -m hfpretrain.train`.
    Raises `RecipeError` where there is no such file.
    """
    if engine is None:
        return [sys.executable, "-m", "hfpretrain.train"]
    count = [] if num_processes is None else ["--num_processes", str(num_processes)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0"]
    return [*launcher, "--config_file", str(_file(engine)), *count, "-m", "hfpretrain.train"]


def process_count(engine: str | None, num_processes: int | None) -> int:
    """Processes that `command` starts: those asked for, else its file's. Raises `RecipeError` as `command` does."""
    if engine is None or num_processes is not None:
        return num_processes or 1
    path = _file(engine)
    return int(parse_yaml(path.read_text(encoding="utf-8"), str(path)).get("num_processes") or 1)


def _file(engine: str) -> Path:
    return shipped.find(engine, "engine", path="--engine")


def finish(process: Process, run: Path) -> None:
    """Wait for a training in folder `run`. Raises `RecipeError` with the end of its messages if it fails.

    What interrupts the wait stops the training too, which saves where it stands.
    """
    try:
        process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode:
        process.messages.seek(0)
        messages = process.messages.read().decode(errors="replace")
        raise RecipeError.at(str(run), f"the run ended with exit code {process.returncode}:\n{messages[-3000:]}")
