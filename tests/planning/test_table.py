"""The table of a plan, and what a run prints beside its plan."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment, hfpretrain, train, write_recipe

from hfpretrain import load_recipe
from hfpretrain.planning import memory
from hfpretrain.planning.plan import Settled, make_plan
from hfpretrain.planning.table import out_of_memory, seconds_per_step, table


def test_the_command_prints_a_table_or_json(folder):
    recipe = str(write_recipe(folder))
    result = hfpretrain("plan", recipe, "--num-processes", "2", "--device", "cpu", "--mfu", "0.2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 120 and "measured, a matrix product" in result.stdout
    names = [sharding.name for sharding in memory.SHARDINGS]
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in names] == names
    found = json.loads(hfpretrain("plan", recipe, "--engine", "zero2", "--device", "h200-141gb", "--json").stdout)
    assert found["parameters"]["total"] == 39_072 and found["mfu"] == 0.4 and found["peak_flops"] == 67e12
    (row,) = found["engines"]
    assert row["engine"] == "zero2" and row["memory"]["peak"] > row["memory"]["optimizer"] == 12 * 39_072


def test_a_table_without_a_known_peak(folder):
    plan = make_plan(load_recipe(write_recipe(folder)), engine="single", device="L4")
    unknown = {**plan.__dict__, "seconds_per_step": None, "hours": None, "device_hours": None, "peak_flops": None}
    assert "time         not known" in table(type(plan)(**unknown))


def test_a_finished_run_prints_and_keeps_what_it_measured_beside_its_plan(folder):
    result = train(write_recipe(folder), "--training.max_steps=4")
    assert result.returncode == 0, result.stderr
    assert "predicted      measured    error" in result.stdout and "seconds a step" in result.stdout
    kept = json.loads((folder / "run" / "plan.json").read_text())
    assert kept["plan"]["engines"][0]["engine"] == "single" and kept["plan"]["parameters"]["total"] == 39_072
    for key in ("peak_memory", "seconds_per_step"):
        assert kept["measured"][key] > 0
        assert kept["error"][key] == pytest.approx(kept["prediction"][key] / kept["measured"][key] - 1)
    assert kept["measured"]["mfu"] == pytest.approx(
        kept["prediction"]["mfu"] * kept["prediction"]["seconds_per_step"] / kept["measured"]["seconds_per_step"]
    )


def test_seconds_of_a_step_leave_out_the_first_log_step():
    speeds = [(2, 10.0)]
    assert seconds_per_step(speeds, 100) == 10 and seconds_per_step([], 100) is None
    speeds += [(4, 100.0), (5, 25.0)]
    assert seconds_per_step(speeds, 100) == pytest.approx((2 * 1 + 1 * 4) / 3)
    assert seconds_per_step(speeds, 100, after=2) == 4 and seconds_per_step(speeds, 100, after=2, last=4) == 1


def test_advice_for_a_run_that_ran_out_of_memory(folder):
    recipe = load_recipe(write_recipe(folder, training__tokens_per_step=2**14, training__micro_batch_size=2**9))
    text = out_of_memory(recipe, "single", 1, Settled(mixed_precision="no"), "CPU", "no memory for 1 GiB")
    assert text.startswith("512 sequences of 32 tokens do not fit on CPU under single: no memory for 1 GiB")
    assert "zero3_offload" in text
    helpful = text.partition("what helps most")[2].splitlines()[1:4]
    assert "--training.micro_batch_size=64" in helpful[0] and "--training.micro_batch_size=256" in "".join(helpful)


@pytest.mark.slow
def test_running_out_of_memory_says_what_would_help(folder):
    """A limit on the address space makes torch's allocator fail as on a full machine."""
    code = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)\n"
        "from hfpretrain.train import main\nsys.exit(main(sys.argv[1:]))"
    )
    recipe = write_recipe(
        folder, training__tokens_per_step=2**18, training__micro_batch_size=2**13, model__config__hidden_size=512
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(recipe)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "training.micro_batch_size: 8192 sequences of 32 tokens do not fit on" in result.stderr
    assert "zero3_offload" in result.stderr
    helpful = result.stderr.partition("what helps most")[2].splitlines()[1:]
    assert len(helpful) == 3 and any("--training.micro_batch_size=4096" in line for line in helpful)
    assert not (folder / "run" / "metrics.jsonl").exists()
