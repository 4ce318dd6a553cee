"""Short forms of `benchmarks/equivalence.py` and `benchmarks/gpu_check.py`. test_engine.py tests dense llama."""

import subprocess
import sys

import equivalence
import pytest
from conftest import ROOT, environment, train


@pytest.mark.parametrize(
    ("model", "engines"), [pytest.param("gpt2", ("fsdp2",), marks=pytest.mark.slow), ("qwen3_moe", ("zero3",))]
)
def test_a_recipe_means_the_same_under_every_engine(tmp_path, model, engines):
    """Tied embeddings and experts, three micro-steps on each process, documents masked; `make proofs` runs all."""
    recipe = equivalence.write_recipe(tmp_path, model, accumulation=3, precision="no", steps=4)
    single = recipe.with_suffix("") / "single"
    assert train(recipe, f"--output_dir={single}").returncode == 0
    for engine in engines:
        found = equivalence.differences(single, equivalence.run(recipe, engine))
        assert equivalence.holds(found, "no"), (engine, found)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_model_means_the_same_under_every_engine(precision):
    command = [sys.executable, str(ROOT / "benchmarks" / "equivalence.py"), "--precision", precision]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


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
