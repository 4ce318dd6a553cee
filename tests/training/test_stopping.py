import contextlib
import logging
import os
import pty
import resource
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest
import small
import stopping as proof
from conftest import ROOT, environment, rows, small_text, started_module, train, write_jsonl, write_recipe

from hfpretrain import files, load_recipe
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.training.metrics_file import read_metrics as metrics_rows
from hfpretrain.training.stopping import StoppedEarlyError, Stops


def test_a_signal_raises_until_there_is_something_to_save_and_is_recorded_after():
    before = signal.getsignal(signal.SIGUSR1)
    with Stops(None) as stops:
        with pytest.raises(StoppedEarlyError, match="SIGUSR1"):
            signal.raise_signal(signal.SIGUSR1)
        stops.defer()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the second ends the process at once
        signal.raise_signal(signal.SIGTERM)
        assert stops.due() and stops.reason == "SIGUSR1" and stops.seconds_left() is None  # the first is the reason
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_during_logging_is_not_swallowed():
    class Signaling:
        def write(self, text):
            signal.raise_signal(signal.SIGTERM)

    handler = logging.StreamHandler(Signaling())
    with Stops(None), pytest.raises(StoppedEarlyError, match="SIGTERM"):
        handler.handle(logging.makeLogRecord({"msg": "training the tokenizer"}))


def test_the_deadline_leaves_time_for_twice_the_longest_save():
    alive = -Stops(0).seconds_left()
    stops = Stops(int(alive) + 1000)
    assert not stops.due()
    stops.record_save_time(100.0)
    assert not stops.due() and 990 < stops.seconds_left() <= 1001
    stops.record_save_time(600.0)
    stops.record_save_time(1.0)
    assert stops.due() and stops.reason == "training.stop_after"


def test_stop_after_takes_hours_minutes_and_seconds(folder):
    for text, seconds in (("3h50m", 13800), ("90s", 90), ("1h", 3600), ("2m5s", 125)):
        recipe = load_recipe(write_recipe(folder, training__stop_after=text))
        assert recipe.training.stop_after_seconds == seconds
    for text in ("", "h", "50", "3h 50m", "m3", "1.5h"):
        with pytest.raises(RecipeError, match="stop_after"):
            load_recipe(write_recipe(folder, training__stop_after=text))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    recipe = proof.write(folder)
    result = train(recipe, f"--output_dir={folder / 'straight'}")
    assert result.returncode == 0, result.stderr
    return recipe, folder


@pytest.mark.parametrize(
    ("engine", "phase"),
    [
        pytest.param("single", "evaluate", marks=pytest.mark.slow),
        ("ddp", "data"),
        pytest.param("fsdp2", "save", marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_with_everything_saved(straight, engine, phase):
    """A short version of `benchmarks/stopping.py`."""
    recipe, folder = straight
    run = folder / f"{engine}-{phase}"
    row = proof.stop(recipe, engine, phase, run, signal.SIGUSR1)
    assert row["exit code"] == 75 and row["verified"] and row["saved at step"] >= 3, row
    assert "stopped by " in row["stderr"] and "run the same command again" in row["stderr"], row["stderr"]
    result = train(recipe, f"--output_dir={run}", engine=engine)
    assert result.returncode == 0, result.stderr
    there = proof.losses(folder / "straight")
    assert proof.losses(run) == {step: pytest.approx(loss, rel=1e-5) for step, loss in there.items()}
    assert list(rows(run, "eval/loss")) == [0, 4, 8, 12]


def test_the_deadline_stops_a_run_and_reports_the_time_left(folder):
    recipe = write_recipe(folder, training__max_steps=100_000)
    result = train(recipe, "--training.stop_after=20s", fault="slow:data")
    assert result.returncode == 75 and "Traceback" not in result.stderr
    assert "stopped by training.stop_after at step" in result.stderr
    assert "s of training.stop_after are left" in result.stderr
    (event,) = rows(folder / "run", "event").values()
    assert event["event"].startswith("stopped by training.stop_after") and event["step"] > 0


def test_a_second_interrupt_ends_the_run_at_once(folder):
    recipe = write_recipe(folder, training__max_steps=100_000, checkpoint__every_steps=20)
    phase = folder / "phase"
    with started_module("faults", recipe, FAULT="slow:save", PHASE_FILE=str(phase)) as (process, stderr):
        while not (phase.exists() and phase.read_text() == "save 40"):  # it stays in this phase for half a second
            assert process.is_alive(), stderr()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.2)  # or Python sees both as one
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == -signal.SIGINT, stderr()
    (path,) = (folder / "run" / "checkpoints").glob("step-" + "[0-9]" * 8)
    assert path.name == "step-00000020" and files.damage(path) is None


def test_a_signal_during_preparation_ends_with_exit_code_75(folder):
    write_jsonl(folder / "corpus.jsonl", small_text(60_000))
    recipe = write_recipe(folder)
    with started_module("hfpretrain.train", recipe) as (process, stderr):
        while "tokeniz" not in stderr():
            assert process.is_alive(), stderr()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.15)  # a second one, as from Slurm and from the launcher
        with contextlib.suppress(ProcessLookupError):  # it may have ended
            os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 75 and "stopped by SIGTERM; finished work is kept" in stderr(), stderr()


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stops(None) as stops:
            stops.defer()
            signal.raise_signal(signal.SIGHUP)
            assert not stops.due()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_stops_the_run_with_everything_saved(folder):
    recipe, code = write_recipe(folder, training__max_steps=100_000), folder / "code"
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.chdir(ROOT)
        command = small.command(recipe)
        os.execve(command[0], command, environment(HFPRETRAIN_EXIT_CODE_FILE=str(code)))
    termios.tcsetwinsize(terminal, (24, 80))  # without a width, the progress bar is empty
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and rows(folder / "run", "loss")):
        os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75 and code.read_text() == "75\n"
    (path,) = (folder / "run" / "checkpoints").iterdir()
    assert files.damage(path) is None
    events = [row["event"] for row in metrics_rows(metrics) if "event" in row]
    assert any("stopped by SIGHUP" in text for text in events), events
    assert any("can no longer be written to" in text for text in events), events


@pytest.mark.parametrize(("engine", "number"), [("single", signal.SIGTERM), ("ddp", signal.SIGUSR1)])
def test_a_run_saves_and_stops_when_its_launcher_dies(folder, engine, number):
    """accelerate's launcher of one process, and any launcher on SIGUSR1, sends no signal to the training process."""
    recipe = write_recipe(folder, training__max_steps=100_000, checkpoint__every_steps=100_000)
    code = folder / "code"
    process = subprocess.Popen(
        small.command(recipe, engine=engine),
        env=environment(HFPRETRAIN_EXIT_CODE_FILE=str(code)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and rows(folder / "run", "loss")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    process.wait(timeout=60)
    deadline = time.time() + 60
    while not code.exists() and time.time() < deadline:
        time.sleep(0.1)
    assert code.read_text() == "75\n"
    (path,) = (folder / "run" / "checkpoints").iterdir()
    assert files.damage(path) is None and "stopped by" in next(iter(rows(folder / "run", "event").values()))["event"]


SLOW_IMPORTS = """
import pathlib, sys, time

class Finder:
    def find_spec(self, name, *_):
        if name == "transformers" and sys.orig_argv[1:3] == ["-m", "hfpretrain.train"]:
            (pathlib.Path(__file__).parent / "importing").touch()
            time.sleep(600)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("command", ["accelerate launch", "hfpretrain train"])
def test_a_run_ends_when_its_launcher_is_killed_during_the_imports(folder, command):
    recipe = write_recipe(folder)
    (folder / "sitecustomize.py").write_text(SLOW_IMPORTS)
    arguments = small.command(recipe, engine="single")
    if command == "hfpretrain train":
        arguments = [sys.executable, "-m", "hfpretrain.cli", "train", str(recipe), "--engine", "single"]
    launcher = subprocess.Popen(
        arguments, env=environment(PYTHONPATH=str(folder)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (folder / "importing").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    started = psutil.Process(launcher.pid).children(recursive=True)
    assert any("hfpretrain.train" in process.cmdline()[:3] for process in started)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    for process in alive:
        process.kill()
    assert not alive


def test_a_stop_whose_save_fails_ends_with_exit_code_1(folder):
    """The background save of the same step has failed before. It is tried again, and the run fails with it."""
    recipe = write_recipe(folder, training__max_steps=100_000, checkpoint__every_steps=1)
    size = 200_000
    with started_module("hfpretrain.train", recipe) as (process, stderr):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
        while "step 3/" not in stderr():
            assert process.is_alive(), stderr()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
        assert process.exitcode == 1 and "was not saved: File too large" in stderr(), stderr()
        assert "Traceback" not in stderr()


def test_a_stop_after_that_ends_before_the_first_step_is_an_error(folder):
    # In a new process: imports are part of the time, and take longer than one second.
    result = small.train(write_recipe(folder), "--training.stop_after=1s")
    assert result.returncode == 2 and "training.stop_after: 1s ended before the first step" in result.stderr


def test_a_signal_to_all_processes_does_not_disturb_the_verification_of_the_export(folder):
    recipe, phase = write_recipe(folder), folder / "phase"
    process = subprocess.Popen(
        small.command(recipe, faults=True),
        env=environment(PHASE_FILE=str(phase), PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not ((folder / "run" / "model").exists() and phase.read_text().startswith("export")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)  # the verification has begun, and takes seconds
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and "loaded in a fresh process" in stdout, stderr
