"""Starting a training: the command for an engine, and waiting for what it starts."""

from __future__ import annotations

import sys
from pathlib import Path

from hfpretrain.recipe import shipped
from hfpretrain.recipe.yaml import parse_yaml


def launch_command(engine: str | None, num_processes: int | None) -> list[str]:
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
    """Number of processes that `launch_command` starts: `num_processes`, or the number in the engine's file."""
    if engine is None or num_processes is not None:
        return num_processes or 1
    path = _file(engine)
    return int(parse_yaml(path.read_text(encoding="utf-8"), str(path)).get("num_processes") or 1)


def _file(engine: str) -> Path:
    return shipped.find(engine, "engine", path="--engine")
