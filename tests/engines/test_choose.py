import os

import pytest
import torch
from conftest import ROOT, launcher_environments
from transformers import AutoConfig

from hfpretrain.engines import choose
from hfpretrain.modeling.build import build_model
from hfpretrain.modeling.initialization import InitialWeights
from hfpretrain.recipe.schema import ModelSection, RecipeError


def test_every_engine_has_a_class_and_an_accelerate_file():
    endings = ("_offload", "_multinode")
    files = {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    names = [name for kind in choose.ENGINES for name in kind.names]
    assert set(names) == {name for name in files if not name.endswith(endings)}
    assert len(names) == len(set(names))


ALL = {"adamw", "muon", "adafactor", "adamw_8bit", "adamw_schedule_free"}


@pytest.mark.parametrize(
    ("engines", "possible"),
    [
        (("single", "ddp"), ALL),
        (("tp", "fsdp2", "fsdp2_offload", "hsdp"), {"adamw", "muon", "adamw_schedule_free"}),
        (("zero1", "zero2", "zero3", "zero3_offload", "zero3_ulysses"), {"adamw", "muon"}),
    ],
)
def test_an_engine_refuses_the_optimizers_that_it_cannot_train_with(engines, possible):
    for engine in engines:
        for optimizer in ALL:
            if optimizer in possible:
                choose.require_optimizer(optimizer, engine)
            else:
                with pytest.raises(RecipeError, match=rf"optimizer\.name: {optimizer} under {engine}: .*use "):
                    choose.require_optimizer(optimizer, engine)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def check_gradients(rank, environments, name, folder):
    """Check which part of the gradient of a matrix of 64 x 32 a process keeps: under FSDP2 after the first of two
    micro-steps, under DDP after the second."""
    os.environ.update(environments[rank])
    engine = choose.build_engine("no", [], str(folder), 60)
    assert engine.name == name
    config = AutoConfig.for_model("llama", vocab_size=64, **SIZES)
    model = build_model(ModelSection(config={"model_type": "llama"}), config)
    sections = {"micro_batch_size": 1, "accumulation_steps": 2, "max_grad_norm": 1.0}
    engine.prepare(model, InitialWeights(model, 0), lambda m: torch.optim.AdamW(m.parameters()), **sections)
    ids = torch.zeros((1, 8), dtype=torch.int64)
    for _ in range(1 if name == "fsdp2" else 2):
        with engine.accumulate():
            engine.backward(engine.model(input_ids=ids, labels=ids).loss)
    gradient = engine.unwrapped_model.lm_head.weight.grad
    if name == "fsdp2":
        assert gradient.to_local().numel() == 64 * 32 // 2
    else:  # the gradient is a view of one of DDP's buckets, which have all gradients
        assert gradient.untyped_storage().nbytes() > 4 * gradient.numel()
    engine.finish()
    assert not hasattr(engine.model, "reducer"), "the reducer would end the process group and may never return"


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_an_engine_keeps_no_second_copy_of_gradients(tmp_path, name):
    arguments = (launcher_environments(name), name, tmp_path)
    torch.multiprocessing.start_processes(check_gradients, arguments, 2, start_method="forkserver")
