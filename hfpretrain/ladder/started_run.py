"""A training run that a ladder or a proof starts in another process, with a user's recipe and engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hfpretrain.recipe.machine import end_with_parent
from hfpretrain.recipe.redaction import SECRETS
from hfpretrain.recipe.schema import RecipeError


class StartedRun(subprocess.Popen[bytes]):
    """A training run in the background.

    `command`: `launch_command` with recipe and overrides. `secrets`: addresses whose secrets are not in the recipe
    file. On Linux, the run gets SIGTERM when this process ends, and saves its state.
    """

    def __init__(self, command: list[str], secrets: Sequence[str] = ()):
        # Secrets go into the environment: other users of the machine can see the arguments of a command.
        env = {**os.environ, SECRETS: json.dumps(list(secrets))} if secrets else None
        # A file, since a full pipe that nobody reads would block the training.
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - stays open as long as the process
        super().__init__(
            command,
            stdout=subprocess.DEVNULL,
            stderr=self._messages,
            env=env,
            preexec_fn=end_with_parent(signal.SIGTERM),
        )

    def finish(self, folder: Path) -> None:
        """Wait for the end of the run. Raises `RecipeError` with its last messages if the run in `folder` fails.

        An exception while waiting, such as `KeyboardInterrupt`, stops the run, which saves its state.
        """
        try:
            self.wait()
        except BaseException:
            self.terminate()
            self.wait()
            raise
        if self.returncode:
            self._messages.seek(0)
            messages = self._messages.read().decode(errors="replace")
            raise RecipeError.at(str(folder), f"the run ended with exit code {self.returncode}:\n{messages[-3000:]}")
