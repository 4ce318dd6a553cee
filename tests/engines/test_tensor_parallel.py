import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.engines import tensor_parallel
from hfpretrain.recipe.schema import RecipeError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 321, "pad_token_id": None}  # fmt: skip
MODELS = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},  # biases, cut and whole
    "qwen3": {"head_dim": 8},  # norms of single heads
}


def build(model_type):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **MODELS[model_type]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def accumulated(model):
    """Losses of two micro-batches and the gradients accumulated over them."""
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(2):
        input_ids = torch.randint(321, (2, 24), generator=draw)
        losses.append(model(input_ids=input_ids, labels=input_ids, use_cache=False).loss)
        losses[-1].backward()
    return [loss.item() for loss in losses], {name: p.grad for name, p in model.named_parameters()}


def compare_models(rank, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))["tp"]
    for model_type in MODELS:
        model = build(model_type)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        losses, gradients = accumulated(model)
        model.zero_grad()
        tensor_parallel.cut(model, mesh, torch.device("cpu"))
        stored = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
        assert stored < 0.6 * 4 * sum(p.numel() for p in model.parameters()), model_type
        whole = {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}
        assert whole.keys() <= weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.items()), model_type
        cut_losses, cut_gradients = accumulated(model)
        assert cut_losses == pytest.approx(losses, rel=1e-6), model_type
        assert cut_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (cut_gradients[name].full_tensor() - gradient).abs().max() / gradient.abs().max()
            assert error < 1e-5, (model_type, name, error)
        torch.optim.AdamW(model.parameters(), fused=True).step()
    model = build("llama")
    del model._tp_plan["model.layers.*.self_attn.o_proj"]  # without it, no process sums the outputs
    with pytest.raises(RecipeError, match=r"parallelism_config_tp_size: LlamaForCausalLM"):
        tensor_parallel.cut(model, mesh, torch.device("cpu"))
    torch.distributed.destroy_process_group()


def test_a_cut_model_has_the_same_losses_and_gradients_as_the_whole_model():
    torch.multiprocessing.start_processes(compare_models, (random.randint(20000, 40000),), 2, start_method="forkserver")
