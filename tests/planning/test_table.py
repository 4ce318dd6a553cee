"""The table of a plan, and the comparison of a run with its plan."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, environment, hfpretrain, train, write_recipe

from hfpretrain import load_recipe
from hfpretrain.planning import memory
from hfpretrain.planning.plan import ResolvedSettings, as_json, make_plan
from hfpretrain.planning.table import format_plan, mean_seconds_per_step, out_of_memory_message


def test_the_command_prints_a_table_or_json(folder):
    recipe = str(write_recipe(folder))
    result = hfpretrain("plan", recipe, "--num-processes", "2", "--device", "cpu", "--mfu", "0.2")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 120 and "measured with a matrix product" in result.stdout
    names = [sharding.name for sharding in memory.SHARDINGS]
    assert [line.split()[0] for line in lines if line.split()[:1] and line.split()[0] in names] == names
    found = json.loads(hfpretrain("plan", recipe, "--engine", "zero2", "--device", "h200-141gb", "--json").stdout)
    assert found["parameters"]["total"] == 39_072 and found["mfu"] == 0.4 and found["peak_flops"] == 67e12
    (row,) = found["engines"]
    assert row["engine"] == "zero2" and row["memory"]["peak"] > row["memory"]["optimizer"] == 12 * 39_072


def test_a_table_shows_that_the_time_is_not_known_without_a_peak(folder):
    plan = make_plan(load_recipe(write_recipe(folder)), engine="single", device="L4")
    unknown = {**plan.__dict__, "seconds_per_step": None, "hours": None, "device_hours": None, "peak_flops": None}
    assert "time         not known" in format_plan(type(plan)(**unknown))


def test_plans_are_written_with_the_keys_of_earlier_versions(folder):
    keys = as_json(make_plan(load_recipe(write_recipe(folder)), engine="single", device="L4"))
    assert {"peak_is", "mfu_is", "prepared_is", "shape"} <= keys.keys() and "tail" in keys["shape"]


def test_a_finished_run_prints_and_writes_its_measurements_beside_its_plan(folder):
    result = train(write_recipe(folder), "--training.max_steps=4")
    assert result.returncode == 0, result.stderr
    assert any(line.split() == ["predicted", "measured", "error"] for line in result.stdout.splitlines())
    kept = json.loads((folder / "run" / "plan.json").read_text())
    assert kept["plan"]["engines"][0]["engine"] == "single" and kept["plan"]["parameters"]["total"] == 39_072
    for key in ("peak_memory", "seconds_per_step"):
        assert kept["measured"][key] > 0
        assert kept["error"][key] == pytest.approx(kept["prediction"][key] / kept["measured"][key] - 1)
    assert kept["measured"]["memory_is"] and kept["prediction"]["mfu_is"].startswith("measured")
    assert kept["measured"]["mfu"] == pytest.approx(
        kept["prediction"]["mfu"] * kept["prediction"]["seconds_per_step"] / kept["measured"]["seconds_per_step"]
    )


def test_the_mean_seconds_of_a_step_leave_out_the_first_log_step():
    speeds = [(2, 10.0)]
    assert mean_seconds_per_step(speeds, 100) == 10 and mean_seconds_per_step([], 100) is None
    speeds += [(4, 100.0), (5, 25.0)]
    assert mean_seconds_per_step(speeds, 100) == pytest.approx((2 * 1 + 1 * 4) / 3)
    assert mean_seconds_per_step(speeds, 100, after=2) == 4
    assert mean_seconds_per_step(speeds, 100, after=2, last=4) == 1


def test_the_message_for_a_run_that_ran_out_of_memory_names_the_changes_that_help_most(folder):
    recipe = load_recipe(write_recipe(folder, training__tokens_per_step=2**14, training__micro_batch_size=2**9))
    resolved = ResolvedSettings(mixed_precision="no")
    text = out_of_memory_message(recipe, "single", 1, resolved, "CPU", "no memory for 1 GiB")
    assert text.startswith("512 sequences of 32 tokens") and "no memory for 1 GiB" in text.splitlines()[0]
    assert "zero3_offload" in text
    helpful = text.partition("help most")[2].splitlines()[1:4]
    assert "--training.micro_batch_size=64" in helpful[0] and "--training.micro_batch_size=256" in "".join(helpful)


@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_ends_with_the_changes_that_help_most(folder):
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
    assert "training.micro_batch_size: 8192 sequences" in result.stderr
    assert "zero3_offload" in result.stderr
    helpful = result.stderr.partition("help most")[2].splitlines()[1:]
    assert len(helpful) == 3 and any("--training.micro_batch_size=4096" in line for line in helpful)
    assert not (folder / "run" / "metrics.jsonl").exists()
