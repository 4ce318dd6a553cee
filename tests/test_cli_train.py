"""`hfpretrain train`: the processes it starts, signals, and the exit code of the run."""

import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, environment, hfpretrain, rows, train, write_recipe

from hfpretrain import files

LONG = {"training__max_steps": 100_000, "checkpoint__every_steps": 100_000}


def start(recipe, *arguments):
    command = [sys.executable, "-m", "hfpretrain.cli", "train", str(recipe), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_first_loss(process, run):
    while not ((run / "metrics.jsonl").exists() and rows(run, "loss")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.1)


def descendants(process):
    """The launcher and its ranks."""
    (launcher,) = psutil.Process(process.pid).children()
    return launcher, [child for child in launcher.children() if "hfpretrain.train" in child.cmdline()]


@pytest.mark.parametrize(
    ("arguments", "num_ranks", "number"),
    [
        pytest.param((), 1, signal.SIGINT, marks=pytest.mark.slow),
        (("--engine", "ddp", "--num-processes", "2"), 2, signal.SIGUSR1),
    ],
)
def test_a_signal_stops_the_run_with_75_and_the_same_command_resumes(folder, arguments, num_ranks, number):
    recipe, run = write_recipe(folder, **LONG), folder / "run"
    process = start(recipe, *arguments)
    wait_for_first_loss(process, run)
    assert len(descendants(process)[1]) == num_ranks
    process.send_signal(number)
    stderr = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 75, stderr
    assert stderr.splitlines()[0].startswith("starting accelerate launch") and str(recipe) in stderr.splitlines()[0]
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert files.damage(checkpoint) is None
    if arguments:  # training/test_stopping.py resumes under ddp
        return
    stopped_at = int(checkpoint.name.removeprefix("step-"))
    resumed = hfpretrain("train", str(recipe), f"--training.max_steps={stopped_at + 2}")
    assert resumed.returncode == 0, resumed.stderr
    assert max(rows(run, "loss")) == stopped_at + 2 and (run / "model" / "config.json").is_file()


@pytest.mark.parametrize("arguments", [(), ("--engine", "ddp")])
def test_wrong_input_that_only_the_run_finds_exits_with_2(folder, arguments):
    recipe = write_recipe(folder, data__sources=[{"path": "json", "data_files": str(folder / "none.jsonl")}])
    result = hfpretrain("train", str(recipe), *arguments)
    assert result.returncode == 2 and "data.sources.0.data_files" in result.stderr, result.stderr


def test_a_wrong_key_an_unknown_engine_and_a_missing_recipe_start_nothing(folder):
    recipe = str(write_recipe(folder))
    for arguments, words in (
        ((recipe, "--optimizer.l=1"), ("optimizer.l:", "`lr`")),
        ((recipe, "--engine", "ddpp"), ("--engine:", "ddp")),
        ((recipe, "--engine", "ddp_multinode"), ("--engine:", "--machine_rank")),
        ((recipe, "--num-processes", "0"), ("--num-processes:", "at least 1")),
        ((recipe, "--num_processes=2"), ("did you mean --num-processes?",)),
        (("quickstrat",), ("recipe:", "quickstart")),
    ):
        result = hfpretrain("train", *arguments)
        assert result.returncode == 2 and "starting" not in result.stderr, result.stderr
        assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize("engine", ["single", pytest.param("ddp", marks=pytest.mark.slow)])
def test_ranks_save_and_end_when_their_launcher_is_killed(folder, engine):
    process = start(write_recipe(folder, **LONG), "--engine", engine)
    wait_for_first_loss(process, folder / "run")
    launcher, ranks = descendants(process)
    launcher.kill()
    stderr = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 75 and ranks and not any(rank.is_running() for rank in ranks), stderr
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    assert files.damage(checkpoint) is None


@pytest.mark.slow
def test_no_process_outlives_a_killed_command_and_the_run_is_saved(folder):
    process = start(write_recipe(folder, **LONG), "--engine", "single")
    wait_for_first_loss(process, folder / "run")
    launcher, ranks = descendants(process)
    process.kill()
    _, alive = psutil.wait_procs([launcher, *ranks], timeout=60)
    assert not alive
    (checkpoint,) = (folder / "run" / "checkpoints").iterdir()
    assert files.damage(checkpoint) is None


def test_the_help_of_train_shows_the_keys_of_a_recipe_and_of_one_section(folder):
    everything, section = hfpretrain("train", "-h"), hfpretrain("train", "-h", "optimizer")
    assert everything.returncode == section.returncode == 0
    for key in ("output_dir", "training.tokens_per_step", "evaluation.lm_eval.tasks", "data.sources.0.path"):
        assert f"  {key}: " in everything.stdout
    assert "--engine" in everything.stdout and section.stdout in everything.stdout
    assert "optimizer.weight_decay: number (default: 0.1)" in section.stdout and "scheduler.name" not in section.stdout
    of_module = train("-h", "optimizer")
    assert of_module.returncode == 0 and section.stdout in of_module.stdout
    wrong = hfpretrain("train", "-h", "optimzer")
    assert wrong.returncode == 2 and "`optimizer`" in wrong.stderr
