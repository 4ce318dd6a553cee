import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, environment, write_recipe

from hfpretrain.ranks import SILENCE_SECONDS, Judge, Status

HOST = socket.gethostname()
# A rank that dies, stops, hangs or fails at its third step, where its data are made.
FAULTY = """
import os, signal, sys, time
from hfpretrain import dataloader, train

step = dataloader.TrainingData.step

def faulty(self, number):
    if number == 3 and os.environ["RANK"] == os.environ["FAULTY_RANK"]:
        print("pid", os.getpid(), flush=True)
        fault = os.environ["FAULT"]
        if fault == "hang":
            time.sleep(1000)
        if fault == "error":
            raise ValueError("a broken disk")
        os.kill(os.getpid(), getattr(signal, fault))
    return step(self, number)

dataloader.TrainingData.step = faulty
sys.exit(train.main())
"""


def two_ranks(folder, fault, rank, timeout_seconds=4):
    """A run of two processes of which one goes wrong: exit code, stderr, and the pid of that one."""
    recipe = write_recipe(folder, training__timeout_seconds=timeout_seconds)
    script = folder / "faulty.py"
    script.write_text(FAULTY)
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / "ddp.yaml"), str(script), str(recipe)]
    # The launcher gives a stopped process 30 seconds to obey before it kills it.
    env = environment(FAULT=fault, FAULTY_RANK=str(rank), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3", PYTHONPATH=str(ROOT))
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    pid = int(result.stdout.split("pid ")[1].split()[0])
    return result, pid


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_rank_that_is_killed_is_named_by_the_launcher(folder):
    result, pid = two_ranks(folder, "SIGKILL", 1)
    assert result.returncode == 1 and not alive(pid)
    assert "rank      : 1" in result.stderr and f"Signal 9 (SIGKILL) received by PID {pid}" in result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_ends_the_run(folder, rank):
    result, pid = two_ranks(folder, "SIGSTOP", rank)
    assert result.returncode == 1 and not alive(pid)
    assert result.stderr.count("the run ends on all ranks") == 1
    assert f"no sign of life for 4 s from rank {rank} on {HOST} (step 3, phase data)" in result.stderr


def test_a_rank_that_hangs_ends_the_run(folder):
    result, pid = two_ranks(folder, "hang", 1)
    assert result.returncode == 1 and not alive(pid)
    assert result.stderr.count("the run ends on all ranks") == 1
    assert f"the others wait for rank 1 on {HOST} (step 3, phase data)" in result.stderr


def looks(judge, *statuses, hurt=False, times=1):
    """The judge's last word after looking at the same ranks several times, all of them alive."""
    found = None
    for _ in range(times):
        looks.ticks += 1
        ranks = {n: replace(status, tick=status.tick or looks.ticks) for n, status in enumerate(statuses)}
        found = judge.look(ranks, hurt)
    return found


looks.ticks = 0
BUSY = Status("a", count=7, phase="train", step=3)


def test_the_judge_names_who_is_silent():
    judge, silent = Judge(1800), replace(BUSY, host="b", tick=5)
    assert looks(judge, BUSY, silent, silent, times=SILENCE_SECONDS) is None
    found = looks(judge, BUSY, silent, silent)
    assert found.startswith(
        f"no sign of life for {SILENCE_SECONDS} s from rank 1 on b (step 3, phase train); rank 2 on b"
    )
    judge = Judge(1800)
    assert looks(judge, BUSY, silent, times=SILENCE_SECONDS) is None
    assert looks(judge, BUSY, BUSY, times=SILENCE_SECONDS) is None  # it was only slow
    judge = Judge(1800)
    assert "rank 1 on b" in looks(judge, replace(BUSY, hurt=True), silent, times=5)  # a connection broke: sooner
    assert "rank 1 on b" in looks(Judge(1800), BUSY, silent, hurt=True, times=5)


def test_the_judge_names_whom_the_others_wait_for():
    judge, behind = Judge(100), replace(BUSY, count=6, host="b", phase="data")
    assert looks(judge, BUSY, behind, BUSY, times=100) is None
    assert looks(judge, BUSY, behind, BUSY) == (
        "no progress for 100 s (training.timeout_seconds), the others wait for rank 1 on b (step 3, phase data)"
    )
    assert "no rank has made progress for 100 s" in looks(Judge(100), BUSY, BUSY, times=101)
    # One that others wait for may take its time as long as it gets on, and so may who prepares the data.
    judge = Judge(100)
    for count in range(20):
        assert looks(judge, BUSY, replace(behind, count=count), times=90) is None
    assert looks(Judge(100), replace(BUSY, count=0), BUSY, times=1000) is None


def test_the_judge_leaves_those_alone_who_are_done_and_repeats_what_they_said():
    judge, done = Judge(100), replace(BUSY, tick=5, end="")
    assert looks(judge, done, done, times=1000) is None
    judge, failed = Judge(100), replace(BUSY, host="b", tick=5, end="ValueError: a broken disk")
    assert looks(judge, BUSY, failed, times=2) is None
    assert looks(judge, BUSY, failed) == "rank 1 on b (step 3, phase train) failed: ValueError: a broken disk"


def by_hand(folder, *overrides, **env):
    """One rank of two on two machines of one process each, without a launcher."""
    ranked = environment(WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", **env)
    command = [sys.executable, "-m", "hfpretrain.train", str(folder / "recipe.yaml"), *overrides]
    return subprocess.Popen(command, cwd=ROOT, env=ranked, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_ranks_that_differ_do_not_begin(folder):
    write_recipe(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    first = by_hand(folder, RANK="0", MASTER_PORT=port)
    second = by_hand(folder, "--optimizer.lr=1e-3", "--seed=1", RANK="1", MASTER_PORT=port)
    for process in (first, second):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        for key, theirs, ours in (("optimizer.lr", 0.001, 0.003), ("seed", 1, 0)):
            assert f"{key}: is {theirs} on rank 1 ({HOST}), {ours} on rank 0 ({HOST})" in stderr
    assert not (folder / "prepared").exists()
