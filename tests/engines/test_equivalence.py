"""Short forms of `benchmarks/equivalence.py` and `benchmarks/gpu_check.py`. test_engine.py tests dense llama."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import equivalence
import pytest
from conftest import ROOT, environment, train


def compare_with_one_process(folder: Path, model: str, precision: str, engines: Sequence[str], steps: int) -> None:
    """Three micro-steps on each process, documents masked. A run that differs from that of one process fails."""
    recipe = equivalence.write_recipe(folder, model, accumulation=3, precision=precision, steps=steps)
    runs = {engine: recipe.with_suffix("") / engine for engine in ("single", *engines)}
    for engine, run in runs.items():
        done = train(recipe, f"--output_dir={run}", engine=engine)
        assert done.returncode == 0, (engine, done.stderr)
    for engine in engines:
        found = equivalence.differences(runs["single"], runs[engine])
        print(model, precision, engine, found)
        assert equivalence.holds(found, precision), (engine, found)


def test_experts_mean_the_same_under_fsdp2(tmp_path):
    compare_with_one_process(tmp_path, "qwen3_moe", "no", ["fsdp2"], steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", equivalence.TOLERANCES)
@pytest.mark.parametrize("model", equivalence.MODELS)
def test_every_model_means_the_same_under_every_engine(tmp_path, model, precision):
    compare_with_one_process(tmp_path, model, precision, equivalence.ENGINES, steps=20)


@pytest.mark.slow
def test_gpu_check_writes_its_table_at_toy_size(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--steps", "2", "--rows", "fp8", "export"]
    command += ["--results", str(tmp_path / "table.md")]
    result = subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *_, first, fp8, export = (tmp_path / "table.md").read_text().splitlines()
    assert first.startswith("| bf16 | same |") and "0.0e+00" in first
    assert fp8.startswith("| fp8 | training.mixed_precision: fp8 ")
    assert export.startswith("| bf16 export | same |")
