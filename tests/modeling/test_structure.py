import pytest
from tiny_models import GPT2, LLAMA, MOE, SMALL, SPECIAL, build
from transformers import AutoConfig

from hfpretrain.modeling.build import build_model
from hfpretrain.modeling.structure import count_parameters, has_experts, parameters_of_config
from hfpretrain.recipe.schema import ModelSection


@pytest.mark.parametrize(("config", "tied"), [(LLAMA, False), (GPT2, True)])
def test_parameters_are_counted_with_and_without_embeddings(config, tied):
    model = build(config)
    counts = count_parameters(model)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.total - counts.non_embedding == 64 * 32 * (1 if tied else 2)
    assert parameters_of_config(model.config) == counts


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, False),
        (GPT2, False),
        (MOE, True),
        ({"model_type": "mixtral", **EXPERTS, **SMALL}, True),
        ({"model_type": "jetmoe", "kv_channels": 8, **EXPERTS, **SMALL}, True),
        ({"model_type": "granitemoe", **EXPERTS, **SMALL}, True),
        ({"model_type": "lfm2", "intermediate_size": 48, "num_key_value_heads": 2,
          "layer_types": ["conv", "full_attention", "conv"], **SMALL}, False),
        ({"model_type": "recurrent_gemma", "intermediate_size": 48, "num_key_value_heads": 1, **SMALL}, False),
    ],
)  # fmt: skip
def test_experts_are_recognized_by_the_structure_of_the_model(config, expected):
    config = AutoConfig.for_model(**{**SPECIAL, **config})
    assert has_experts(build_model(ModelSection(config={"model_type": "any"}), config)) == expected
