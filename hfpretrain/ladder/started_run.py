"""Trainings that another command starts: processes of their own, with a user's recipe and engine."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfpretrain.recipe.redaction import SECRETS
from hfpretrain.recipe.schema import RecipeError


class Process(subprocess.Popen[bytes]):
    """Its messages go into a file: a pipe that nobody reads meanwhile would stop it when full."""

    def __init__(self, command: list[str], secrets: Sequence[str] = ()):
        """`secrets`: addresses with secrets, which the recipe's file has without them."""
        # Not as arguments of the command, which other users of the machine can see.
        env = {**os.environ, SECRETS: json.dumps(list(secrets))} if secrets else None
        self.messages = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        super().__init__(command, stdout=subprocess.DEVNULL, stderr=self.messages, env=env)


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
