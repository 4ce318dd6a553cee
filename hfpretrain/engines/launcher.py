"""The `accelerate launch` that started this process, and what happens when it ends. Imports nothing slow."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from hfpretrain.recipe.machine import receive_signal_of_parents_end


def end_with_launcher() -> None:
    """On Linux, make this process receive SIGTERM when the `accelerate launch` that started it ends.

    Otherwise the training would continue unnoticed. A launcher of one process does not forward signals, and no launcher
    can forward SIGKILL.
    """
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:  # another system than Linux, or the parent has ended
        return
    if launch_arguments(command) is not None:
        receive_signal_of_parents_end(signal.SIGTERM, parent)


def launch_arguments(command: list[str]) -> list[str] | None:
    """What follows `accelerate launch`, `accelerate-launch` or `-m accelerate.commands.launch` in a command line."""
    for index, word in enumerate(command[:4]):
        name = Path(word).name
        if name == "accelerate" and command[index + 1 : index + 2] == ["launch"]:
            return command[index + 2 :]
        if name in ("accelerate-launch", "accelerate.commands.launch") or word.endswith(
            "accelerate/commands/launch.py"
        ):
            return command[index + 1 :]
    return None
