"""Shared pieces: a small corpus, a small recipe, and a way to run commands as a user would."""

import contextlib
import functools
import gc
import importlib
import io
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import pytest
import yaml
from xdist.scheduler import LoadScopeScheduling

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


def _verify_exports_in_a_fork() -> None:
    """Have this run's export verified in a process forked now, before anything is computed, not in a new interpreter.

    What a run starts to verify its export is real in the tests that start the run as a command.
    """
    from hfpretrain import cli
    from hfpretrain.checkpoints import verify

    ours, theirs = multiprocessing.Pipe()
    if os.fork() == 0:
        ours.close()
        with contextlib.suppress(EOFError):  # the process that trains has ended
            while arguments := theirs.recv():
                text = io.StringIO()
                with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                    code = cli.main(arguments)
                theirs.send((code, text.getvalue()))
        os._exit(0)
    theirs.close()

    def verify_in_fork(run: Path, trust_remote_code: bool, made_progress: Callable[[], None]) -> dict:
        ours.send(["verify", str(run), "--json", *(["--trust-remote-code"] if trust_remote_code else [])])
        while not ours.poll(1):
            made_progress()
        code, text = ours.recv()
        if code:
            raise RuntimeError(f"the export in {run} does not verify:\n{text}")
        return json.loads(text.splitlines()[-1])

    verify.verify_in_fresh_process = verify_in_fork


def _main(module: str, arguments: list[str], output: str, env: dict[str, str], cwd: Path) -> None:
    for number, name in enumerate(OUTPUTS, 1):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    gc.freeze()  # what was imported is no garbage; looking at it would copy the server's memory
    if module.endswith((".py", ".train", "faults")) and env.get("RANK", "0") == "0":
        _verify_exports_in_a_fork()
    os.environ.update(env)
    sys.argv = [module, *arguments]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
        sys.exit(0)
    sys.exit(importlib.import_module(module).main())


def first_failure(processes: Sequence[multiprocessing.Process]) -> int:
    """An exit code other than 0, if any process has ended with one, else 0."""
    return next((process.exitcode for process in processes if process.exitcode), 0)


def run_module(
    module: str | Path,
    *arguments: object,
    timeout: int = 300,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    ranks: Sequence[dict[str, str]] = ({},),
) -> subprocess.CompletedProcess:
    """`python -m module arguments` from the server, or `python module arguments` where it is a file.

    `ranks`: further environment variables of each process. When one has failed, the others have 30 s to end.
    """
    with tempfile.TemporaryDirectory() as output:
        processes = []
        for number, variables in enumerate(ranks):
            Path(output, str(number)).mkdir()
            started = (str(module), list(map(str, arguments)), f"{output}/{number}", {**(env or {}), **variables}, cwd)
            processes.append(_processes.Process(target=_main, args=started))
            processes[-1].start()
        deadline = time.monotonic() + timeout
        code = 0
        while running := [process.sentinel for process in processes if process.exitcode is None]:
            if not wait(running, max(0, deadline - time.monotonic())):
                break
            if not code and (code := first_failure(processes)):
                deadline = min(deadline, time.monotonic() + 30)
        code = code or first_failure(processes)
        for process in processes:
            process.kill()
            process.join()
        if running and not code:
            raise subprocess.TimeoutExpired([module, *arguments], timeout)
        texts = ["".join(Path(output, str(n), name).read_text() for n in range(len(ranks))) for name in OUTPUTS]
        return subprocess.CompletedProcess([module, *arguments], code, *texts)


@contextlib.contextmanager
def started_module(
    module: str | Path, *arguments: object, **env: str
) -> Iterator[tuple[multiprocessing.Process, Callable[[], str]]]:
    """As `run_module`, while it runs: its process, and a function that returns what it has printed on stderr."""
    with tempfile.TemporaryDirectory() as output:
        process = _processes.Process(target=_main, args=(str(module), list(map(str, arguments)), output, env, ROOT))
        process.start()
        stderr = Path(output, "stderr")
        try:
            yield process, lambda: stderr.read_text() if stderr.exists() else ""
        finally:
            process.kill()
            process.join()


def train(
    recipe: Path,
    *overrides: str,
    engine: str | None = None,
    processes: int | None = None,
    timeout: int = 300,
    fault: str = "",
    launcher: bool = False,
    cwd: Path = ROOT,
    **env: str,
):
    """A training, alone or in the processes of an engine; the finished process.

    They are forked from the server with the environment variables that `accelerate launch` would set: that saves
    importing. With `launcher` it is `accelerate launch` that starts them.

    `fault`: what `faults.py` shall spoil.
    """
    if env:  # which libraries read when they are imported
        return small.train(recipe, *overrides, engine=engine, processes=processes, timeout=timeout, **env)
    if fault:
        env = {"FAULT": fault, "PYTHONPATH": str(ROOT)}
    if launcher:
        command = small.command(recipe, *overrides, engine=engine, processes=processes, faults=bool(fault))
        return run_module("accelerate.commands.launch", *command[3:], timeout=timeout, env=env)
    ranks = [{}] if engine in (None, "single") else launcher_environments(engine, processes)
    module = "faults" if fault else "hfpretrain.train"
    return run_module(module, recipe, *overrides, timeout=timeout, cwd=cwd, env=env, ranks=ranks)


@functools.cache
def _launcher_environment(engine: str, processes: int) -> dict[str, str]:
    from accelerate.commands.launch import launch_command, launch_command_parser

    found: dict[str, str] = {}
    arguments = ["-q", "--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml")]
    arguments += ["--num_processes", str(processes), "-m", "hfpretrain.train"]
    with mock.patch("torch.distributed.run.run", lambda _: found.update(os.environ)):
        launch_command(launch_command_parser().parse_args(arguments))
    return {name: value for name, value in found.items() if os.environ.get(name) != value}


def launcher_environments(engine: str, processes: int | None = None) -> list[dict[str, str]]:
    """Environment variables that `accelerate launch` sets for each of an engine's processes, two or more."""
    if processes is None:
        text = (ROOT / "accelerate_configs" / f"{engine}.yaml").read_text()
        processes = yaml.safe_load(text)["num_processes"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    common = {**_launcher_environment(engine, processes), **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def hfpretrain(*arguments: str, cwd: Path = ROOT):
    """The console command."""
    return run_module("hfpretrain.cli", *arguments, cwd=cwd)


def script(path: Path, *arguments: object, cwd: Path = ROOT):
    """`python path arguments`."""
    return run_module(path, *arguments, cwd=cwd)


def pytest_collection_finish() -> None:
    gc.freeze()  # the collector need not look at modules and collected tests again


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadScopeScheduling:
    """A worker gets all tests of a file that has a fixture for the file, and each other test by itself.

    That is what xdist's `loadgroup` is for, but xdist 3.8 does not group tests under pytest 9.
    """

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return path if 'scope="module"' in _text(path) else nodeid

    return ByFixture(config, log)


@functools.cache
def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a corpus of 200 documents."""
    write_jsonl(tmp_path / "corpus.jsonl", small_text(200))
    return tmp_path
