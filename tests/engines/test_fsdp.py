import contextlib
import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import launcher_environments
from tiny_models import MOE, SMALL, SPECIAL
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.engines import choose, fsdp, pieces
from hfpretrain.modeling.optim import build_optimizer, decayed_names, hidden_names
from hfpretrain.recipe.schema import OptimizerSection, RecipeError

QWEN = {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
ZAMBA = {"model_type": "zamba2", "layers_block_type": ["mamba", "hybrid", "hybrid"], "num_key_value_heads": 4,
         "attention_head_dim": 16, "attention_hidden_size": 64, "intermediate_size": 48, "n_mamba_heads": 8,
         "mamba_headdim": 8, "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"model_type": "llama", "intermediate_size": 48}, ["LlamaDecoderLayer"]),
        (QWEN, ["Qwen3_5DecoderLayer"]),  # its class also lists layers for images, which this model does not have
        (ZAMBA, ["Zamba2MambaDecoderLayer"]),  # hybrid layers share their weights
    ],
)
def test_each_layer_is_sharded_alone_if_it_shares_no_weights(config, layers):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **SPECIAL, **config}))
    fsdp.require_layers(SimpleNamespace(transformer_cls_names_to_wrap=None), model)
    assert model._no_split_modules == layers
    with pytest.raises(RecipeError, match="has no GPT2Block"):
        fsdp.require_layers(SimpleNamespace(transformer_cls_names_to_wrap=["GPT2Block"]), model)


LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
EXPERTS = {**MOE, "num_hidden_layers": 2, "num_experts": 3}  # one process has two experts of a layer, the other has one


def new_model(name):
    """A model, and a function that builds its optimizer. Muon trains a mixture of experts."""
    torch.manual_seed(0)
    config = EXPERTS if name == "muon" else LLAMA
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    decayed, hidden, section = decayed_names(model), hidden_names(model), OptimizerSection(name=name, lr=1e-3)
    return model, lambda model: build_optimizer(model, section, decayed, hidden)


def batch(step):
    return torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))


def train_alone(model, optimizer, step):
    """Loss and gradient norm of a step in one process."""
    loss = model(input_ids=batch(step), labels=batch(step)).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return [loss.item(), norm.item()]


def train_sharded(engine, step):
    """Loss and gradient norm of the same step under an engine, where each process has half of the batch."""
    ids = batch(step).chunk(2)[engine.data_index]
    part = engine.model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(4 * 15)).loss
    with engine.accumulate():
        engine.backward(part)
    loss, norm = engine.total(part.detach()), engine.clip_gradients()
    engine.update()
    return [loss.item(), norm.item()]


def compare_optimizers(rank, environments, folder, names):
    os.environ.update(environments[rank])
    torch.set_num_threads(1)
    accelerator = choose.build_engine("no", [], str(folder), 60).accelerator

    def new_engine(name):
        accelerator.free_memory()  # it clips the gradients of the model that it prepared last
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None  # accelerate sets it to the last model's
        engine = fsdp.FSDP2(accelerator)
        model, build = new_model(name)
        engine.prepare(model, None, build, micro_batch_size=2, accumulation_steps=1, max_grad_norm=1.0)
        return engine

    for name in names:
        model, build = new_model(name)
        optimizer, engine = build(model), new_engine(name)
        tolerances = (1e-5, 1e-5, 1e-4)
        for step in range(3):
            found, expected = train_sharded(engine, step), train_alone(model, optimizer, step)
            for value, other, tolerance in zip(found, expected, tolerances, strict=False):
                assert value == pytest.approx(other, rel=tolerance), (name, step, found, expected)
        trained = {key: tensor.clone() for key, tensor in engine.full_parameters()}
        with engine.evaluated_weights(), getattr(optimizer, "use_averaged_weights", contextlib.nullcontext)():
            for key, tensor in engine.full_parameters():
                torch.testing.assert_close(tensor, model.get_parameter(key).detach(), rtol=0, atol=tolerances[2])
                averages = name == "adamw_schedule_free"
                assert torch.equal(tensor, trained[key]) != averages, key
        pieces.save(engine.state_to_save(), folder / name, torch.distributed.group.WORLD)
        last = train_sharded(engine, 3)
        resumed = new_engine(name)
        assert resumed.load_state(folder / name, torch.distributed.group.WORLD)
        assert train_sharded(resumed, 3) == last
        assert last[0] == pytest.approx(train_alone(model, optimizer, 3)[0], rel=tolerances[0])
    torch.distributed.destroy_process_group()


def test_optimizers_train_shards_like_whole_matrices(tmp_path):
    names = ["adamw", "muon", *(["adamw_schedule_free"] if find_spec("schedulefree") else [])]
    arguments = (launcher_environments("fsdp2"), tmp_path, names)
    torch.multiprocessing.start_processes(compare_optimizers, arguments, 2, start_method="forkserver")
