"""Starts a training from another command: chooses the engine, makes the command line, waits for the exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from hfpretrain.recipe import shipped
from hfpretrain.recipe.machine import adopt_orphans, end_with_parent, has_gpu
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.recipe.yaml import parse_yaml

EXIT_CODE_FILE = "HFPRETRAIN_EXIT_CODE_FILE"
"""Environment variable with the path of a file into which the main process writes its exit code. Launchers replace
every code except 0 by 1."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals after which a training saves everything and ends."""


def choose_engine(engine: str | None, num_processes: int | None) -> tuple[str, int]:
    """Engine and number of processes: those that are given, or defaults for this machine.

    The default engine is `single` for one process and `ddp` for several. The default number of processes is the number
    of GPUs, and 1 on a machine without GPUs. If an engine is given, the number in its file is used instead in these
    cases: on a machine without GPUs, for a file that is not shipped, for `single`, and for a file with a
    `parallelism_config` (`hsdp`, `tp`).

    Raises `RecipeError` for an unknown engine, and for a file for several machines without the rank of this one.
    """
    if num_processes is not None and num_processes < 1:
        raise RecipeError.at("--num-processes", f"must be at least 1 (got {num_processes})")
    if engine is None:
        number = num_processes or max(1, _num_gpus())
        return ("single" if number == 1 else "ddp"), number
    settings = _read_settings(engine)
    if int(settings.get("num_machines") or 1) > 1 and not {"machine_rank", "main_process_ip"} <= settings.keys():
        raise RecipeError.at(
            "--engine",
            f"{engine} is for {settings['num_machines']} machines; run `accelerate launch --config_file "
            f"{_find_file(engine)} --machine_rank RANK --main_process_ip IP -m hfpretrain.train RECIPE` on each of "
            "them, or give a copy of the file in which `machine_rank` and `main_process_ip` are set",
        )
    if num_processes is not None:
        return engine, num_processes
    is_shipped = engine in shipped.file_names("engine") and not Path(engine).is_file()
    takes_any_number = settings.get("distributed_type") != "NO" and "parallelism_config" not in settings
    gpus = _num_gpus() if is_shipped and takes_any_number else 0
    return engine, gpus or process_count(engine, None)


def launch_command(engine: str | None, num_processes: int | None) -> list[str]:
    """The command line of a training, without the recipe and overrides.

    `engine`: an accelerate file or the name of a shipped one; None for `python -m hfpretrain.train` without a launcher.
    Raises `RecipeError` if there is no such file.
    """
    if engine is None:
        return [sys.executable, "-m", "hfpretrain.train"]
    settings = _read_settings(engine)
    # A free port, so that several runs can run on one machine. Several machines need a port that all of them know.
    uses_free_port = "main_process_port" not in settings and int(settings.get("num_machines") or 1) == 1
    port = ["--main_process_port", "0"] if uses_free_port else []
    count = [] if num_processes is None else ["--num_processes", str(num_processes)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "-q", *port]
    return [*launcher, "--config_file", str(_find_file(engine)), *count, "-m", "hfpretrain.train"]


def process_count(engine: str | None, num_processes: int | None) -> int:
    """Number of processes that `launch_command` starts: `num_processes`, or the number in the engine's file."""
    if engine is None or num_processes is not None:
        return num_processes or 1
    return int(_read_settings(engine).get("num_processes") or 1)


def run_to_end(command: list[str]) -> int:
    """Run a training with `accelerate launch` and return the exit code of the training, not of the launcher.

    When this process receives one of `SIGNALS`, it sends the signal to the ranks, not to the launcher. Some signals
    would kill the launcher, and the launcher kills ranks that take more than 30 seconds to save. On Linux, if the
    launcher dies, the ranks save and end before this function returns. If this process dies, the launcher dies too.

    If the main process leaves no exit code (it was killed, or it runs on another machine), that of the launcher is
    returned, or 128 plus the number of the signal that ended the training.
    """
    with tempfile.TemporaryDirectory() as folder:
        code_file = Path(os.environ.get(EXIT_CODE_FILE) or Path(folder) / "exit-code")
        code_file.write_text("", encoding="utf-8")  # removes the code of an earlier run
        received: list[int] = []
        launcher: subprocess.Popen[bytes] | None = None

        def forward_signal(number: int, _: FrameType | None = None) -> None:
            received.append(number)
            if launcher is not None:
                _send_signal(number, launcher)

        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number in SIGNALS:
            # `nohup` ignores SIGHUP; a shell's background job ignores SIGINT, but a person may still send it.
            if number != signal.SIGHUP or before[number] != signal.SIG_IGN:
                signal.signal(number, forward_signal)
        try:
            adopt_orphans()  # so that this process can wait for the ranks when their launcher dies
            # In a session of its own. Otherwise the ranks would receive a terminal's Ctrl-C a second time.
            launcher = subprocess.Popen(
                command,
                env={**os.environ, EXIT_CODE_FILE: str(code_file)},
                start_new_session=True,
                preexec_fn=end_with_parent(signal.SIGKILL),
            )
            for early in received[:]:  # received before the launcher was started
                _send_signal(early, launcher)
            launcher.wait()
            psutil.wait_procs(_ranks(os.getpid()))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code := code_file.read_text(encoding="utf-8").strip():
            return int(code)
        if received:
            return 128 + received[-1]
        return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode


def _send_signal(number: int, launcher: subprocess.Popen[bytes]) -> None:
    """Send a signal to the ranks, or to the launcher if it has not started any yet."""
    ranks = _ranks(launcher.pid if launcher.poll() is None else os.getpid())
    if not ranks:
        launcher.send_signal(number)
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _ranks(parent: int) -> list[psutil.Process]:
    """The training processes among the children of the process `parent`."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(parent).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                command = process.cmdline()
                if "hfpretrain.train" in command and "accelerate.commands.launch" not in command:
                    found.append(process)
    return found


def _num_gpus() -> int:
    if not has_gpu():
        return 0
    import torch

    return torch.accelerator.device_count()


def _read_settings(engine: str) -> dict[str, Any]:
    path = _find_file(engine)
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError.at("--engine", f"{path} can't be read: {error}") from None
    if not isinstance(settings, dict):
        raise RecipeError.at("--engine", f"{path} is not an accelerate config file: it has no keys")
    return settings


def _find_file(engine: str) -> Path:
    return shipped.find_file(engine, "engine", path="--engine")
