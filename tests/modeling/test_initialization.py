import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.modeling.initialization import InitialWeights, Moments, check_weights
from hfpretrain.recipe.schema import RecipeError

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 48, "vocab_size": 64, "pad_token_id": None, "bos_token_id": None,
         "eos_token_id": None}  # fmt: skip
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def meta(model_type, **changes):
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def parameters(model, seed=0, **keywords):
    weights = dict(InitialWeights(model, seed, **keywords))
    return {name: weights[name] for name, _ in model.named_parameters()}


def test_the_seed_and_the_name_decide_the_weights():
    first, again, other = (parameters(meta("llama"), seed) for seed in (0, 0, 1))
    deeper = parameters(meta("llama", num_hidden_layers=5))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, deeper[name]) for name, tensor in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    weights = InitialWeights(meta("llama"), 0)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(weights, weights, strict=True))


def test_drawing_weights_does_not_change_the_random_state():
    before = torch.get_rng_state()
    parameters(meta("gpt2"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "lfm2", "mamba", "apertus"])
def test_drawn_weights_have_the_moments_of_their_class_and_give_finite_logits(model_type):
    """apertus initializes some parameters only in its constructors, mamba some without random numbers."""
    changes = MOE if model_type == "qwen3_moe" else {"layer_types": ["conv", "full_attention", "conv"]}
    model = meta(model_type, **(changes if model_type in ("qwen3_moe", "lfm2") else {}))
    weights = InitialWeights(model, 0)
    drawn = dict(weights)
    assert check_weights(parameters(model).items(), weights.expected_moments())
    real = type(model)(model.config)
    real.load_state_dict(drawn, strict=False)
    tensors = {**dict(real.named_parameters()), **dict(real.named_buffers())}
    assert tensors.keys() == drawn.keys()
    for name, buffer in real.named_buffers():
        assert torch.equal(buffer, drawn[name]), name
    assert real(input_ids=torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", ("self_attn.o_proj.weight", "mlp.down_proj.weight")),
        ("phi3", ("self_attn.o_proj.weight", "mlp.down_proj.weight")),
        ("gpt2", ("attn.c_proj.weight", "mlp.c_proj.weight")),
        ("qwen3_moe", ("self_attn.o_proj.weight", "mlp.experts.down_proj")),
    ],
)
def test_depth_scaled_init_finds_residual_projections_by_structure(model_type, names):
    model = meta(model_type, **(MOE if model_type == "qwen3_moe" else {}))
    plain, scaled = parameters(model), parameters(model, depth_scaled_init=True)
    expected = 0.02 / math.sqrt(2 * 3)
    for name, before in plain.items():
        if name.endswith(names):
            assert scaled[name].std().item() == pytest.approx(expected, rel=0.15), name
        else:
            assert torch.equal(before, scaled[name]), name
    assert check_weights(scaled.items(), InitialWeights(model, 0, depth_scaled_init=True).expected_moments())


def test_depth_scaled_init_is_refused_if_layers_do_not_have_two_residual_projections():
    with pytest.raises(RecipeError, match=r"depth_scaled_init: .*Mamba.* has 3 in 3 layers"):
        InitialWeights(meta("mamba"), 0, depth_scaled_init=True)


def test_the_logarithm_of_a_few_uniform_values_is_not_refused():
    """The chance of two draws that differ as much as these is small, but the moments of four elements say little."""
    layer_types = ["linear_attention", "full_attention"]
    model = meta("olmo_hybrid", num_hidden_layers=2, layer_types=layer_types, linear_num_value_heads=32,
                 linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)  # fmt: skip
    expected, name = InitialWeights(model, 0).expected_moments(), "model.layers.0.linear_attn.A_log"
    assert check_weights(parameters(model).items(), expected)
    heads = torch.Generator().manual_seed(0)
    for number in (4, 256):
        wanted = Moments.of(torch.empty(number).uniform_(0.01, 16, generator=heads).log())
        for _ in range(200):
            drawn = torch.empty(number).uniform_(0.01, 16, generator=heads).log()
            assert check_weights([(name, drawn)], {name: wanted})
    for wrong in (drawn.exp(), drawn.mul(0), drawn.neg(), drawn + 8):
        with pytest.raises(RecipeError, match="A_log"):
            check_weights([(name, wrong)], {name: wanted})


NORM, LAST, EARLIER = "model.norm.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (LAST, lambda weights: weights[LAST].mul(0), "only zeros"),
        (LAST, lambda weights: weights[LAST].mul(1.2), "standard deviation 0.024"),
        (LAST, lambda weights: weights[LAST] + 0.01, "mean 0.0"),
        (LAST, lambda weights: weights[EARLIER].clone(), f"values as {EARLIER}"),
        (LAST, lambda weights: weights[LAST] * math.nan, "NaN"),
        (NORM, lambda weights: weights[NORM] * 0, "mean 1, standard deviation 0"),
    ],
)
def test_wrong_initial_weights_are_refused(name, damage, message):
    model = meta("llama", hidden_size=64, intermediate_size=128)
    weights = parameters(model)
    weights[name] = damage(weights)
    with pytest.raises(RecipeError) as error:
        check_weights(weights.items(), InitialWeights(model, 0).expected_moments())
    assert [problem.path for problem in error.value.problems] == ["model", name]
    assert message in str(error.value)


def test_pretrained_weights_need_only_be_finite():
    weights = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}
    assert check_weights(weights.items(), None) == check_weights(reversed(weights.items()), None)
    with pytest.raises(RecipeError, match=r"b: .*NaN or infinity"):
        check_weights({**weights, "b": torch.full((2,), math.inf)}.items(), None)
