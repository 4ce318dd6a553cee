from types import SimpleNamespace

import pytest
import torch
from tiny_models import SMALL, SPECIAL
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.engines import fsdp
from hfpretrain.recipe.schema import RecipeError

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
        (QWEN, ["Qwen3_5DecoderLayer"]),  # its class names the layers that see images, too
        (ZAMBA, ["Zamba2MambaDecoderLayer"]),  # hybrid layers have their weights in common
    ],
)
def test_layers_are_sharded_that_the_model_has_for_themselves(config, layers):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **SPECIAL, **config}))
    fsdp.require_layers(SimpleNamespace(transformer_cls_names_to_wrap=None), model)
    assert model._no_split_modules == layers
    with pytest.raises(RecipeError, match="has no GPT2Block"):
        fsdp.require_layers(SimpleNamespace(transformer_cls_names_to_wrap=["GPT2Block"]), model)
