"""Benchmarks that `make proofs` does not start itself, run at small size."""

import argparse
import subprocess
import sys

import extend_context
import families
import growth
import pytest
from conftest import ROOT, environment, write_jsonl, write_recipe
from PIL import Image

pytestmark = pytest.mark.slow


def table(folder, script, *arguments):
    """The rows of the printed table by their first cell."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), str(write_recipe(folder)), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    cells = [line.strip("| ").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in cells}


def test_train_step_compares_trainer_and_the_bare_loop(folder):
    rows = table(folder, "train_step.py", "--steps", "6", "--rounds", "1", "--logging.trackers=[]")
    assert {"hfpretrain", "bare loop", "Trainer"} <= set(rows)
    assert all(float(rows[name][0]) > 0 and "x as fast" in rows[name][3] for name in ("bare loop", "Trainer"))


def test_all_parts_for_a_gpu_run_at_toy_size(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--results", str(tmp_path / "gpu.md")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    _, *parts = (tmp_path / "gpu.md").read_text().split("\n## ")
    titles = {part.splitlines()[0] for part in parts}
    assert titles > {"engines", "GPT-2 124M, compiled", "llama 1 B, compiled", "the loss", "a save"}
    assert all(len([line for line in part.splitlines() if line.startswith("|")]) > 2 for part in parts)


def test_defaults_compares_steps_with_and_without_a_default(folder):
    rows = table(folder, "defaults.py", "--steps", "6", "--only", "prefetch", "no_sync")
    for name in ("prefetch", "no_sync, two ranks"):
        assert float(rows[name][0]) > 0 and float(rows[name][1]) > 0 and "x as fast" in rows[name][2]


def test_families_compares_with_plain_transformers(tmp_path):
    found = {family.name: family for family in families.examine(["llama", "ernie4_5_moe", "bart"], None, tmp_path)}
    assert {name: family.result for name, family in found.items()} == dict.fromkeys(found, "equal"), found
    assert found["llama"].documents == "apart" and found["bart"].documents == "apart by masks"
    assert found["bart"].own_loss.startswith("another") and found["llama"].own_loss == "next token"
    # gemma4's norms amplify rounding. Plain transformers does not load an export of emu3.
    found |= {family.name: family for family in families.examine(["gemma4", "emu3"], None, tmp_path)}
    assert found["gemma4"].result == "equal"
    rounding = found["gemma4"].rounding  # empty where no later step differs
    assert rounding.get("grad_norm", families.TOLERANCE["grad_norm"]) >= found["gemma4"].grad_norm
    assert found["emu3"].result == "refused"
    text = families.table(list(found.values()))
    assert "| equal | 4 |" in text and text.index("| bart |") < text.index("| llama |")


def test_growth_measures_and_draws(tmp_path):
    """Times are not checked."""
    command = [sys.executable, str(ROOT / "benchmarks" / "growth.py"), "--quick", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    Image.open(tmp_path / "growth.png").verify()
    rows = [line.split(" | ") for line in (tmp_path / "growth.md").read_text().splitlines()[2:]]
    assert len(rows) == 10 and {len(row) for row in rows} == {6} and result.stdout.strip().count("\n") == 11
    titles = {panel.title for name, panel in growth.PANELS.items() if name != "many"}
    assert {row[0].strip("| ").partition(":")[0] for row in rows} == titles
    exponents = {row[0].strip("| "): float(row[4]) for row in rows}
    (whole,) = (value for name, value in exponents.items() if name.startswith("Loss") and name.endswith("whole"))
    assert whole == pytest.approx(1, abs=0.3)  # memory, not time


def test_extend_context_compares_two_runs_of_a_base(tmp_path):
    words = ["red", "green", "blue", "runs", "over", "water", "light", "stone"]
    documents = [" ".join(words[(start * step + step) % 8] for step in range(1500)) for start in range(20)]
    write_jsonl(tmp_path / "corpus.jsonl", documents)
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    base = write_recipe(
        tmp_path,
        model__config=config,
        data={"sources": [{"path": "json", "data_files": str(tmp_path / "corpus.jsonl")}], "block_size": 256}
        | {"validation_fraction": 0.2},
        training={"tokens_per_step": 1024, "micro_batch_size": 4, "max_steps": 4},
    )
    extend_context.train_recipe(base)
    args = argparse.Namespace(base=str(tmp_path / "run"), steps=10, lr=1e-3, rope_theta=80_000)
    found = extend_context.losses(args, tmp_path / "runs")
    assert list(found) == ["base", "256 tokens", "1,024 tokens"]
    assert all(by_range["512-1023"] < found["base"]["512-1023"] for by_range in list(found.values())[1:])
    assert extend_context.table(found).count("\n") == 4


@pytest.mark.slow
def test_balance_prints_the_load_of_experts_with_and_without_a_balancing_loss(folder):
    arguments = ["--models", "qwen3_moe", "--steps", "50", "--values", "0", "0.03"]
    command = [sys.executable, str(ROOT / "benchmarks" / "balance.py"), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    _, _, without, balanced = ([*map(str.strip, line.split("|"))] for line in result.stdout.splitlines())
    assert float(balanced[8]) > float(without[8])  # the entropy of the load
