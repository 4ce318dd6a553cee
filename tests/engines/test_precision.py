import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import rows, script, write_recipe

from hfpretrain.engines import pieces, precision
from hfpretrain.engines.deepspeed import DeepSpeed
from hfpretrain.engines.fsdp import FSDP2
from hfpretrain.engines.local import Single
from hfpretrain.engines.tensor_parallel import TensorParallel
from hfpretrain.recipe.schema import RecipeError


def test_a_recipe_and_an_accelerate_file_with_different_precisions_are_refused(monkeypatch):
    assert precision.resolve("auto", "bf16", Single.precision_problem) == "bf16"
    with pytest.raises(RecipeError, match=r"training\.mixed_precision: .*no in the recipe, but bf16"):
        precision.resolve("no", "bf16", Single.precision_problem)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(RecipeError, match="fp16 needs a GPU"):
        precision.resolve("auto", "fp16", Single.precision_problem)
    for chosen in ("bf16", "no"):
        assert precision.resolve(chosen, "no", FSDP2.precision_problem) == chosen
    assert precision.resolve("auto", "no", Single.precision_problem) == ("bf16" if precision.has_bf16() else "no")


@pytest.mark.parametrize(
    ("name", "device", "capability", "engine", "packages", "expected"),
    [
        ("no", "CPU", None, Single, (), None),
        ("bf16", "CPU", None, FSDP2, (), None),
        ("tf32", "CPU", None, Single, (), "tf32 needs a GPU; on a CPU use bf16 or no"),
        ("fp8", "CPU", None, Single, ("torchao",), "fp8 needs a GPU"),
        ("fp16", "GPU", (7, 0), Single, (), None),
        ("fp16", "GPU", (6, 1), Single, (), "fp16 needs a GPU of compute capability 7.0, and this one has 6.1; use no"),
        ("bf16", "GPU", (7, 5), FSDP2, (), "capability 8.0, and this one has 7.5; use fp16 or no"),
        ("tf32", "GPU", (8, 0), FSDP2, (), None),
        ("fp8", "GPU", (8, 0), Single, ("torchao",), "compute capability 8.9, and this one has 8.0"),
        ("fp8", "GPU", (9, 0), Single, (), "pip install torchao"),
        ("fp8", "GPU", (9, 0), FSDP2, ("torchao",), "use bf16, or single or ddp"),
        ("fp8", "GPU", (9, 0), Single, ("transformer_engine",), None),
        ("fp8", "GPU", (9, 0), TensorParallel, ("torchao",), "use bf16, or single or ddp"),
        ("fp16", "GPU", (9, 0), TensorParallel, (), "use bf16"),
        ("bf16", "GPU", None, Single, (), None),
    ],
)
def test_a_precision_that_hardware_or_engine_lacks_is_refused(name, device, capability, engine, packages, expected):
    found = precision.problem(
        name,
        device,
        capability,
        engine_problem=engine.precision_problem,
        installed=lambda package: package in packages,
    )
    assert found is None if expected is None else expected in found


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_fp8_trains_saves_resumes_and_exports(folder):
    recipe = write_recipe(folder, training__mixed_precision="fp8", checkpoint={"every_steps": 3})
    on_a_cpu = "from hfpretrain.engines import precision; precision.problem = lambda *_, **__: None; "
    (folder / "on_a_cpu.py").write_text(on_a_cpu + "from hfpretrain.train import main; raise SystemExit(main())")

    def losses(resumes):
        done = script(folder / "on_a_cpu.py", recipe)
        assert done.returncode == 0, done.stderr
        assert ("resumed from" in done.stderr) == resumes
        return [row["loss"] for row in rows(folder / "run", "loss").values()]

    first = losses(resumes=False)
    assert first[-1] < first[0] - 0.3
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000008")
    assert losses(resumes=True) == first
    (export,) = rows(folder / "run", "export/precision").values()
    assert export["export/precision"] == "fp8 bfloat16" and export["export/max_logit_difference"] < 0.1


def test_a_run_continues_on_a_machine_where_auto_means_another_precision(folder):
    recipe = write_recipe(folder, training__mixed_precision="auto", checkpoint__every_steps=2)
    losses = []
    for has_bf16, steps in ((True, 4), (False, 6)):
        machine = f"from hfpretrain.engines import precision; precision.has_bf16 = lambda: {has_bf16}; "
        (folder / "machine.py").write_text(machine + "from hfpretrain.train import main; raise SystemExit(main())")
        done = script(folder / "machine.py", recipe, f"--training.max_steps={steps}")
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in rows(folder / "run", "loss").values()])
    assert losses[1][:4] == losses[0] and len(losses[1]) == 6
    assert "training continues in no; up to step 4 it was in bf16" in done.stderr
    assert "up to step 4 it was in bf16" in (folder / "run" / "metrics.jsonl").read_text()


def engine(kind, model, optimizer, scaler=None):
    """An engine of class `kind` in one process, without accelerate."""
    device = torch.device("cpu")
    made = kind(SimpleNamespace(scaler=scaler, num_processes=1, process_index=0, device=device))
    made.model, made.optimizer = model, SimpleNamespace(optimizer=optimizer)
    return made


def trained(scale):
    """An engine after one step in fp16 with a loss scale of `scale`; None: in another precision."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    loss = model(torch.ones(1, 4)).sum()
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return engine(Single, model, optimizer, scaler)


@pytest.mark.parametrize(("saved", "now", "expected", "is_whole"), [
    (1024.0, 8.0, 1024.0, True), (None, 8.0, 8.0, False), (1024.0, None, None, True), (None, None, None, True),
])  # fmt: skip
def test_the_loss_scale_is_resumed_if_the_checkpoint_has_one(tmp_path, saved, now, expected, is_whole):
    pieces.save(trained(saved).state(), tmp_path)
    resumed = trained(now)
    assert resumed.load_state(tmp_path, None) is is_whole
    if now is not None:
        state = resumed.scaler_state()
        assert (state["scale"], state["_growth_tracker"]) == (expected, 1)


@pytest.fixture
def alone(monkeypatch):
    """DeepSpeed's loss scaler asks for the rank, and only rank 0 logs an overflow. This makes it rank 1."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 1)


def deepspeed(scale, steps=0):
    """A DeepSpeed engine in fp16 with only a loss scale, after `steps` steps without overflow."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(scale, scale_window=4, min_scale=1, delayed_shift=2, consecutive_hysteresis=False)
    for _ in range(steps):
        scaler.update_scale(False)
    return engine(DeepSpeed, SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler)), None)


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_deepspeeds_loss_scale_is_resumed_exactly(tmp_path, alone, steps):
    first, second = deepspeed(64.0, steps), deepspeed(2.0, 2)
    pieces.save({"scaler": first.scaler_state()}, tmp_path)
    asked = {"scaler": dict.fromkeys(pieces.names_in(tmp_path, "scaler"))}
    second.load_scaler(pieces.load(asked, tmp_path)["scaler"])
    for overflow in (False, False, True, True, False, False, False, False, False):
        assert second.scaler_state() == first.scaler_state()
        for one in (first, second):
            one.model.optimizer.loss_scaler.update_scale(overflow)


def test_a_rehearsal_does_not_change_deepspeeds_loss_scale(alone):
    rehearsed = deepspeed(64.0, 3)
    rehearsed.optimizer.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    before = rehearsed.scaler_state()
    with rehearsed.rehearsal():
        rehearsed.model.optimizer.loss_scaler.update_scale(False)
        rehearsed.model.optimizer.loss_scaler.update_scale(True)
    assert rehearsed.scaler_state() == before


def test_deepspeed_resumes_from_the_loss_scale_of_another_engine(tmp_path):
    pieces.save(trained(1024.0).state(), tmp_path)
    resumed = deepspeed(2.0)
    asked = {key: value for key, value in resumed.scaler_state().items() if key in pieces.names_in(tmp_path, "scaler")}
    resumed.load_scaler(pieces.load({"scaler": asked}, tmp_path)["scaler"])
    found = resumed.scaler_state()
    assert (found["scale"], found["_growth_tracker"]) == (1024.0, 1)
