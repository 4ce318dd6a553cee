import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import environment, rows, write_recipe

from hfpretrain import precision
from hfpretrain.recipe import RecipeError


def test_recipe_and_launcher_may_not_contradict_each_other(monkeypatch):
    assert precision.resolve("auto", "bf16", sharded=False) == "bf16"
    with pytest.raises(RecipeError, match=r"training\.mixed_precision: the recipe says no, the launcher's file bf16"):
        precision.resolve("no", "bf16", sharded=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="fp16 needs a GPU"):
        precision.resolve("auto", "fp16", sharded=False)
    assert (
        precision.resolve("bf16", "no", sharded=True) == "bf16" and precision.resolve("no", "no", sharded=True) == "no"
    )
    assert precision.resolve("auto", "no", sharded=False) == ("bf16" if precision.has_bf16() else "no")


@pytest.mark.parametrize(
    ("name", "device", "capability", "sharded", "packages", "expected"),
    [
        ("no", "CPU", None, False, (), None),
        ("bf16", "CPU", None, True, (), None),
        ("tf32", "CPU", None, False, (), "tf32 needs a GPU; on a CPU take bf16 or no"),
        ("fp8", "CPU", None, False, ("torchao",), "fp8 needs a GPU"),
        ("fp16", "GPU", (7, 0), False, (), None),
        ("fp16", "GPU", (6, 1), False, (), "fp16 needs a GPU of compute capability 7.0, this one has 6.1; take no"),
        ("bf16", "GPU", (7, 5), True, (), "needs a GPU of compute capability 8.0, this one has 7.5; take fp16 or no"),
        ("tf32", "GPU", (8, 0), True, (), None),
        ("fp8", "GPU", (8, 0), False, ("torchao",), "compute capability 8.9, this one has 8.0"),
        ("fp8", "GPU", (9, 0), False, (), "fp8 needs torchao or transformer-engine: pip install torchao"),
        ("fp8", "GPU", (9, 0), True, ("torchao",), "a model that is sharded already; take bf16, or single or ddp"),
        ("fp8", "GPU", (9, 0), False, ("transformer_engine",), None),
        ("bf16", "GPU", None, False, (), None),
    ],
)
def test_a_precision_the_hardware_lacks_is_refused(name, device, capability, sharded, packages, expected):
    found = precision.problem(name, device, capability, sharded=sharded, installed=lambda package: package in packages)
    assert found is None if expected is None else expected in found


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_fp8_trains_saves_resumes_and_exports(folder):
    recipe = write_recipe(folder, training__mixed_precision="fp8", checkpoint={"every_steps": 3})
    on_a_cpu = "from hfpretrain import precision; precision.problem = lambda *_, **__: None; "
    command = [sys.executable, "-c", on_a_cpu + "from hfpretrain.train import main; raise SystemExit(main())", recipe]

    def losses(resumes):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert ("resumed from" in done.stderr) == resumes
        return [row["loss"] for row in rows(folder / "run", "loss").values()]

    first = losses(resumes=False)
    assert first[-1] < first[0] - 0.3
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000008")
    assert losses(resumes=True) == first
    (export,) = rows(folder / "run", "export/precision").values()
    assert export["export/precision"] == "fp8 bfloat16" and export["export/max_logit_difference"] < 0.1
