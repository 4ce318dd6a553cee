"""Shared pieces: a small corpus, a small recipe, and a way to run commands as a user would."""

import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # tests call their functions, at small size

import small
from small import ROOT, environment, recipe_mapping, rows, small_text, write_jsonl, write_recipe

__all__ = ["ROOT", "environment", "recipe_mapping", "rows", "small_text", "write_jsonl", "write_recipe"]
os.environ.update(environment())
OUTPUTS = ("stdout", "stderr")

# Most of what a short run takes is importing. This server has imported all of it and computed nothing; a process forked
# from it is as one that `python -m` has started.
_processes = multiprocessing.get_context("forkserver")
# Not `hfpretrain.train`: a script that imports the function of that name would get the module.
_modules = (
    "hfpretrain.training.run",
    "hfpretrain.publishing.publisher",
    "hfpretrain.cli",
    "accelerate.commands.launch",
)
_processes.set_forkserver_preload([*_modules, "torch.distributed.run", "evaluate", "matplotlib.backends.backend_agg"])


def _main(module: str, arguments: list[str], output: str, env: dict[str, str]) -> None:
    for number, name in enumerate(OUTPUTS, 1):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    os.environ.update(env)
    sys.argv = [module, *arguments]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
        sys.exit(0)
    sys.exit(importlib.import_module(module).main())


def _call(module: str, arguments: list[str], timeout: int, env: dict[str, str]) -> subprocess.CompletedProcess:
    """`python -m module arguments` from the server, or `python module arguments` where it is a file."""
    with tempfile.TemporaryDirectory() as output:
        process = _processes.Process(target=_main, args=(module, arguments, output, env))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([module, *arguments], timeout)
        texts = [Path(output, name).read_text() for name in OUTPUTS]
        return subprocess.CompletedProcess([module, *arguments], process.exitcode, *texts)


def train(
    recipe: Path,
    *overrides: str,
    engine: str | None = None,
    processes: int | None = None,
    timeout: int = 300,
    fault: str = "",
    **env: str,
):
    """`accelerate launch` with an engine's file, or plain `python -m` without; the finished process.

    `fault`: what `faults.py` shall spoil.
    """
    if engine is None and env:  # which libraries read when they are imported
        return small.train(recipe, *overrides, timeout=timeout, **env)
    if fault:
        env |= {"FAULT": fault, "PYTHONPATH": str(ROOT)}
    if engine is None:
        return _call("faults" if fault else "hfpretrain.train", [str(recipe), *overrides], timeout, env)
    command = small.command(recipe, *overrides, engine=engine, processes=processes, faults=bool(fault))
    return _call("accelerate.commands.launch", command[3:], timeout, env)


def train_ranks(recipe: Path, *overrides: str, engine: str, processes: int = 2, timeout: int = 300):
    """As `train`, with the processes of an engine forked from the server in place of the launcher: it saves importing.

    They have the environment variables that `accelerate launch` would set.
    """
    env = launcher_environment(engine, processes)
    with tempfile.TemporaryDirectory() as output:
        ranks = []
        for rank in range(processes):
            folder = Path(output, str(rank))
            folder.mkdir()
            variables = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = ("hfpretrain.train", [str(recipe), *overrides], str(folder), variables)
            ranks.append(_processes.Process(target=_main, args=arguments))
            ranks[-1].start()
        deadline = time.monotonic() + timeout
        while running := [rank.sentinel for rank in ranks if rank.exitcode is None]:
            if any(rank.exitcode for rank in ranks) or not wait(running, max(0, deadline - time.monotonic())):
                break
        failed = [rank.exitcode for rank in ranks if rank.exitcode]
        for rank in ranks:  # the others would wait for one that has failed
            rank.kill()
            rank.join()
        if running and not failed:
            raise subprocess.TimeoutExpired([engine], timeout)
        texts = ["".join(Path(output, str(rank), name).read_text() for rank in range(processes)) for name in OUTPUTS]
        return subprocess.CompletedProcess([engine], failed[0] if failed else 0, *texts)


def launcher_environment(engine: str, processes: int) -> dict[str, str]:
    """Environment variables that `accelerate launch` sets for an engine's processes, but for their ranks."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    found: dict[str, str] = {}
    arguments = ["-q", "--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml")]
    arguments += ["--num_processes", str(processes), "-m", "hfpretrain.train"]
    with mock.patch("torch.distributed.run.run", lambda _: found.update(os.environ)):
        launch_command(launch_command_parser().parse_args(arguments))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changed = {name: value for name, value in found.items() if os.environ.get(name) != value}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return {**changed, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def hfpretrain(*arguments: str, **env: str):
    """The console command."""
    if not env:
        return _call("hfpretrain.cli", list(arguments), 300, env)
    command = [sys.executable, "-m", "hfpretrain.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(**env), capture_output=True, text=True)


def script(path: Path, *arguments: object):
    """`python path arguments`."""
    return _call(str(path), list(map(str, arguments)), 300, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus of 200 documents."""
    write_jsonl(tmp_path / "corpus.jsonl", small_text(200))
    return tmp_path
