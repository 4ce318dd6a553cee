import importlib
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import small
from conftest import ROOT, environment, rows, run_module, train, write_recipe

from hfpretrain.training import versions
from hfpretrain.training.watchdog import SILENCE_SECONDS, FailureDetector, Status

HOST = socket.gethostname()
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
# Ranks that sum numbers. Rank `BAD` fails at step 3 as `FAULT` says.
SUMS = """
import os, signal, subprocess, time
import torch, torch.distributed as dist
from hfpretrain.recipe.schema import RecipeError
from hfpretrain.training.watchdog import Watch

dist.init_process_group("gloo")
with Watch() as watch:
    watch.start(dist.get_rank(), 2, 4, {})
    for step in range(5):
        watch.beat("data", step)
        if step == 3:
            time.sleep(2)
        if step == 3 and os.environ["RANK"] == os.environ.get("BAD"):
            if os.environ["FAULT"] == "error":
                raise ValueError("a broken disk")
            if os.environ["FAULT"] == "recipe":
                raise RecipeError.at("data.sources.0", "a broken line")
            subprocess.Popen(["sh", "-c", f"sleep 12; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), getattr(signal, os.environ["FAULT"]))
        watch.beat("train", step)
        dist.all_reduce(torch.ones(3))
    dist.barrier()
    time.sleep(6 * dist.get_rank())  # the other rank has ended well, and is not reported as lost
"""
# Ranks that wait for rank 0, whose work takes longer than the timeout and may fail as `FAULT` says.
WAITS = """
import os, sys, time
import torch.distributed as dist
from hfpretrain.training.watchdog import Watch
from hfpretrain.recipe.schema import RecipeError

def work():
    time.sleep(7)
    if os.environ.get("FAULT") == "recipe":
        raise RecipeError.at("data.sources.0", "no file matches")
    if os.environ.get("FAULT") == "error":
        raise ValueError("a broken disk")
    return ["a name", 1]

dist.init_process_group("gloo")
try:
    with Watch() as watch:
        watch.start(dist.get_rank(), 2, 4, {})
        print("received", watch.run_on_main("prepare the data", work), file=sys.stderr)
        watch.beat("build", 0)
        dist.barrier()
        if "FAULT" not in os.environ:
            print("received", watch.run_on_main("read two files", lambda: [time.sleep(2) or watch.unit_done()] * 3))
        time.sleep(3)
except RecipeError as error:
    print("rank", dist.get_rank(), "raises", error, file=sys.stderr)
    sys.exit(2)
"""
# A training run in which rank 1 hangs at step 3.
HANGS = """
import os, sys, time
from hfpretrain.data import batches
from hfpretrain.train import main

step = batches.TrainingData.step

def hangs(self, number):
    if number == 3 and os.environ["RANK"] == "1":
        time.sleep(1000)
    return step(self, number)

batches.TrainingData.step = hangs
sys.exit(main())
"""


@pytest.fixture
def sums(tmp_path):
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    return str(script)


def on_one_machine(script, **env):
    """The finished launcher of two ranks."""
    launch = ("--nproc_per_node", "2", "--standalone", script)
    return run_module("torch.distributed.run", *launch, env={"PYTHONPATH": str(ROOT), **env}, timeout=120)


def on_two_machines(script, **env):
    """Exit code and stderr of two ranks, each with its own launcher."""
    address = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    commands = [[*LAUNCH, "1", "--nnodes", "2", "--node_rank", rank, *address, script] for rank in "01"]
    env = environment(PYTHONPATH=str(ROOT), **env)
    processes = [subprocess.Popen(c, env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT) for c in commands]
    return [(process.returncode, err) for process, (_, err) in [(p, p.communicate(timeout=120)) for p in processes]]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_healthy_ranks_end_without_an_error(sums):
    result = on_one_machine(sums)
    assert result.returncode == 0 and "error" not in result.stderr, result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_suspended_rank_ends_the_run(sums, rank):
    result = on_one_machine(sums, BAD=str(rank), FAULT="SIGSTOP")
    assert result.returncode == 1
    (message,) = re.findall("the run ends on all ranks: (.*)", result.stderr)
    found = re.fullmatch(r"no status for 4 s from rank (\d) on (.*), pid (\d+) \(step 3, phase data\): .*", message)
    assert found[1] == str(rank) and found[2] == HOST and not psutil.pid_exists(int(found[3]))


def test_the_launcher_names_a_killed_rank(sums):
    result = on_one_machine(sums, BAD="1", FAULT="SIGKILL")
    assert result.returncode == 1 and re.search(r"rank +: 1 \(.*\n.*\n.*\n.*Signal 9 \(SIGKILL\)", result.stderr)


def test_the_other_machine_reports_which_rank_failed(sums):
    results = on_two_machines(sums, BAD="1", FAULT="error")
    assert all(code == 1 for code, _ in results) and "ValueError: a broken disk" in results[1][1]
    message = rf"the run ends on all ranks: rank 1 on {HOST}, pid \d+ \(step 3, phase data\) failed: ValueError"
    assert re.search(message, results[0][1]), results[0][1]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_end_with_the_recipe_error_of_one(sums, rank, tmp_path):
    code_file = tmp_path / "code"
    results = on_two_machines(sums, BAD=str(rank), FAULT="recipe", HFPRETRAIN_EXIT_CODE_FILE=str(code_file))
    assert re.search("RecipeError: data.sources.0: a broken line", results[rank][1]), results[rank][1]
    other = results[1 - rank][1]
    assert f"error on rank {rank} ({HOST}):\n  data.sources.0: a broken line" in other, other
    assert re.search(r"exitcode +: 2 ", other) and "the run ends on all ranks" not in other, other
    if rank == 1:
        assert code_file.read_text() == "2\n", "rank 0 leaves the exit code of the run"


def test_the_other_machine_reports_that_the_first_machine_is_down(sums):
    results = on_two_machines(sums, BAD="0", FAULT="SIGKILL")
    assert all(code == 1 for code, _ in results)
    assert f"the run ends on all ranks: the launcher of rank 0 on {HOST}, pid " in results[1][1], results[1][1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_was_suspended_blames_no_other_rank(sums, rank):
    """Both ranks end by themselves, since neither launcher knows of the other."""
    results = on_two_machines(sums, BAD=str(rank), FAULT="SIGSTOP")
    assert all(code == 1 for code, _ in results)
    messages = [re.findall("the run ends on all ranks: (.*)", err) for _, err in results]
    stopped, other = messages[rank], messages[1 - rank]
    assert stopped and other and all(f"no status for 4 s from rank {rank}" in text for text in other), messages
    assert all(f"rank {rank} on" in text for text in stopped), messages


@pytest.fixture
def waits(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    return str(script)


def test_all_ranks_get_the_result_of_work_on_rank_0(waits):
    result = on_one_machine(waits)
    assert result.returncode == 0 and result.stderr.count("received ['a name', 1]") == 2, result.stderr


def test_all_ranks_get_a_recipe_error_of_work_on_rank_0(waits):
    for code, err in on_two_machines(waits, FAULT="recipe"):
        assert code == 1 and "raises data.sources.0: no file matches" in err, err


def test_an_error_of_work_on_rank_0_ends_all_ranks(waits):
    results = on_two_machines(waits, FAULT="error")
    assert "ValueError: a broken disk" in results[0][1]
    message = (
        rf"rank 0 on {HOST}, pid \d+ \(step 0, phase prepare: prepare the data\) failed: ValueError: a broken disk"
    )
    assert re.search(message, results[1][1]), results[1][1]


def test_a_start_longer_than_the_timeout_continues_while_it_makes_progress(folder):
    recipe = write_recipe(folder, training__timeout_seconds=6, training__max_steps=3)
    start = time.monotonic()
    result = train(recipe, engine="ddp", fault="units:0.4")
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start > 2 * 6


def test_the_launcher_restarts_all_ranks_after_one_was_killed(folder):
    recipe = write_recipe(folder, training__max_steps=4, checkpoint__every_steps=2)
    command = small.command(recipe, engine="ddp", faults=True)[3:]
    env = {"FAULT": "SIGKILL:evaluate", "PYTHONPATH": str(ROOT)}
    result = run_module("accelerate.commands.launch", "--max_restarts", "1", *command, env=env)
    assert result.returncode == 0 and "Signal 9" not in result.stderr, result.stderr
    assert list(rows(folder / "run", "loss")) == [1, 2, 3, 4]


def test_a_training_run_ends_if_a_rank_hangs(folder):
    recipe = write_recipe(folder, training__timeout_seconds=4)
    (folder / "hangs.py").write_text(HANGS)
    options = ["-q", "--main_process_port", "0", "--config_file", ROOT / "accelerate_configs" / "ddp.yaml"]
    result = run_module("accelerate.commands.launch", *options, folder / "hangs.py", recipe)
    assert result.returncode == 1
    (message,) = re.findall("the run ends on all ranks: (.*)", result.stderr)
    assert (
        "training.timeout_seconds" in message
        and "ranks wait for rank 1" in message
        and "(step 3, phase data)" in message
    )


def check(detector, *statuses, disconnected=False, times=1):
    """The detector's last message after several checks of the same statuses, with new ticks unless they have one."""
    found = None
    for _ in range(times):
        check.ticks += 1
        ranks = {n: replace(status, tick=status.tick or check.ticks) for n, status in enumerate(statuses)}
        found = detector.find_failure(ranks, disconnected)
    return found and found[0]


check.ticks = 0
BUSY = Status("a", count=7, phase="train", step=3)


def test_the_detector_names_silent_ranks():
    detector, silent = FailureDetector(1800), replace(BUSY, host="b", tick=5)
    assert check(detector, BUSY, silent, silent, times=SILENCE_SECONDS) is None
    found = check(detector, BUSY, silent, silent)
    assert found.startswith(
        f"no status for {SILENCE_SECONDS} s from rank 1 on b, pid 0 (step 3, phase train); rank 2 on b"
    )
    detector = FailureDetector(1800)
    assert check(detector, BUSY, silent, times=SILENCE_SECONDS) is None
    assert check(detector, BUSY, BUSY, times=SILENCE_SECONDS) is None  # it was only slow
    detector = FailureDetector(1800)
    assert "rank 1 on b" in check(detector, replace(BUSY, disconnected=True), silent, times=5)
    assert "rank 1 on b" in check(FailureDetector(1800), BUSY, silent, disconnected=True, times=5)


def test_the_detector_names_the_rank_that_the_others_wait_for():
    detector, behind = FailureDetector(100), replace(BUSY, count=6, host="b", phase="data")
    assert check(detector, BUSY, behind, BUSY, times=100) is None
    message = check(detector, BUSY, behind, BUSY)
    assert (
        "100 s (training.timeout_seconds)" in message and "wait for rank 1 on b, pid 0 (step 3, phase data)" in message
    )
    assert "all ranks are at the same point" in check(FailureDetector(100), BUSY, BUSY, times=101)
    # A rank that others wait for may take long if it makes progress, and so may a rank that prepares the data.
    detector = FailureDetector(100)
    for count in range(20):
        assert check(detector, BUSY, replace(behind, count=count), times=90) is None
    assert check(FailureDetector(100), replace(BUSY, count=0), BUSY, times=1000) is None
    # A rank that has not begun when the data are prepared is reported, too.
    assert "wait for rank 1 on b" in check(FailureDetector(100), BUSY, replace(behind, count=0), times=101)


def test_the_detector_names_rank_0_if_its_work_for_all_ranks_hangs():
    detector = FailureDetector(100)
    works, waits = replace(BUSY, task="read a file"), replace(BUSY, task="read a file", waits=True)
    for units in range(20):
        assert check(detector, replace(works, units=units), waits, waits, times=90) is None
    assert "the other ranks wait for rank 0 on a, pid 0 (step 3, phase train: read a file)" in check(
        detector, replace(works, units=19), waits, waits, times=11
    )


def test_the_detector_ignores_ranks_that_ended_well_and_repeats_the_error_of_others():
    detector, done = FailureDetector(100), replace(BUSY, tick=5, end="")
    assert check(detector, done, done, times=1000) is None
    detector, failed = FailureDetector(100), replace(BUSY, host="b", tick=5, end="ValueError: a broken disk")
    assert check(detector, BUSY, failed, times=2) is None
    assert check(detector, BUSY, failed) == "rank 1 on b, pid 0 (step 3, phase train) failed: ValueError: a broken disk"


def start_without_launcher(folder, *overrides, **env):
    """One rank of two on two machines of one process each, without a launcher."""
    ranked = environment(WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", **env)
    command = [sys.executable, "-m", "hfpretrain.train", str(folder / "recipe.yaml"), *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=ranked, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_ranks_with_different_recipes_do_not_start(folder):
    write_recipe(folder)
    port = free_port()
    first = start_without_launcher(folder, RANK="0", MASTER_PORT=port)
    second = start_without_launcher(folder, "--optimizer.lr=1e-3", "--seed=1", RANK="1", MASTER_PORT=port)
    for process in (first, second):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        for key, theirs, ours in (("optimizer.lr", 0.001, 0.003), ("seed", 1, 0)):
            assert f"{key}: is {theirs} on rank 1 ({HOST}), {ours} on rank 0 ({HOST})" in stderr
    assert not (folder / "prepared").exists()


def test_a_folder_that_is_not_a_package_has_no_version(tmp_path, monkeypatch):
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert versions.version_of("hfpretrain") and versions.version_of("torch")
    assert versions.version_of("no_such_package") is None


def test_torch_has_the_private_function_that_gives_the_store_of_the_process_group():
    distributed_c10d = importlib.import_module("torch.distributed.distributed_c10d")
    advice = "watchdog.Watch.start takes the default process group's store from it: find its new name there"
    assert hasattr(distributed_c10d, "_get_default_store"), advice
