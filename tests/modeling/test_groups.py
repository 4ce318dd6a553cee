import pytest
import torch
from tiny_models import LLAMA, MOE, build
from torch.utils.flop_counter import FlopCounterMode

from hfpretrain.modeling.flops import model_flops_per_token
from hfpretrain.modeling.groups import ParameterGroups, Phase, first_trained_step, phase_at
from hfpretrain.modeling.optim import (
    build_optimizer,
    build_scheduler,
    decayed_names,
    hidden_names,
    moment_bytes,
    named_groups,
    scheduled_rate,
    set_step,
)
from hfpretrain.modeling.structure import count_parameters, frozen_part
from hfpretrain.recipe.schema import OptimizerSection, RecipeError, SchedulerSection

EMBEDDINGS = ["model.embed_tokens.*", "lm_head.*"]
UNTIED, TIED = {**LLAMA, "tie_word_embeddings": False}, {**LLAMA, "tie_word_embeddings": True}


def groups_of(config, *groups, **section):
    model = build(config)
    made = ParameterGroups(model, OptimizerSection(lr=1e-3, groups=groups, **section), decayed_names(model))
    return model, made


def message(config, *groups):
    with pytest.raises(RecipeError) as error:
        groups_of(config, *groups)
    return str(error.value)


def test_the_first_group_in_force_applies_to_a_parameter():
    first = {"params": EMBEDDINGS, "lr": 5, "until_step": 20}
    _, made = groups_of(
        UNTIED,
        first,
        {"params": "*", "lr": 0, "until_step": 10},
        {"params": "*.mlp.*", "lr": 0.5, "weight_decay": 0.3},
        {"params": "*.layers.2.*", "lr": 0},
    )
    phases = made.phases
    assert phases["lm_head.weight"] == (Phase(20, 5, 0.1), Phase(None, 1, 0.1))
    assert phases["model.norm.weight"] == (Phase(10, 0, 0), Phase(None, 1, 0))
    mlp = (Phase(10, 0, 0.1), Phase(None, 0.5, 0.3))
    assert phases["model.layers.2.mlp.up_proj.weight"] == phases["model.layers.1.mlp.up_proj.weight"] == mlp
    assert [phase_at(mlp, step).lr for step in (0, 9, 10, 99)] == [0, 0, 0.5, 0.5]
    assert [first_trained_step(some) for some in (phases["lm_head.weight"], mlp)] == [0, 10]
    frozen = {name for name in phases if ".layers.2." in name and ".mlp." not in name}
    assert set(made.frozen) == frozen and first_trained_step(phases[made.frozen[0]]) is None


def test_only_what_is_never_trained_is_frozen_for_autograd_and_has_no_moments():
    model, made = groups_of(UNTIED, {"params": EMBEDDINGS, "until_step": 5}, {"params": "model.layers.0.*", "lr": 0})
    made.freeze()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(made.frozen)
    trained = sum(p.numel() for name, p in model.named_parameters() if ".layers.0." not in name)
    assert moment_bytes(model, OptimizerSection(lr=1e-3)) == 8 * trained


def test_each_group_says_what_it_has():
    _, made = groups_of(
        TIED,
        {"params": "model.embed_tokens.*", "lr": 10, "rows_from": 60, "until_step": 1000},
        {"params": "*", "lr": 0, "until_step": 1000},
        {"params": "*.mlp.*", "weight_decay": 0.5},
    )
    assert made.lines(2000) == [
        "optimizer.groups.0 (model.embed_tokens.*): 2,048 parameters in 1 tensor (model.embed_tokens.weight is also "
        "lm_head.weight) are trained at 10 times optimizer.lr, 0.01, in the rows from 60 on, without weight decay, in "
        "the first 1,000 steps",
        "optimizer.groups.1 (*): 23,264 parameters in 28 tensors are frozen in the first 1,000 steps",
        "optimizer.groups.2 (*.mlp.*): 13,824 parameters in 9 tensors are trained at optimizer.lr, 0.001, with "
        "weight decay 0.5",
    ]
    assert made.lines(800)[1].endswith(" are frozen in the first 1,000 steps, which is the whole run of 800")
    _, made = groups_of(UNTIED, {"params": "*.mlp.*", "lr": 0})
    assert made.lines(1000)[-1] == "13,536 parameters in 21 tensors are in none of optimizer.groups"
    assert groups_of(UNTIED)[1].lines(1000) == []


@pytest.mark.parametrize(
    ("groups", "path", "fragments"),
    [
        ([{"params": "model.embed_token.weight"}], "groups.0.params: ", ["nearest are model.embed_tokens.weight"]),
        ([{"params": "*"}, {"params": ["*.mlp.*", "*.q_prj.*"]}], "groups.1.params.1: ", ["'*.q_prj.*'"]),
        ([{"params": "transformer.wte.*"}], "groups.0.params: ", ["model's names are model.embed_tokens.weight"]),
        ([{"params": "*", "lr": 0}], "groups: ", ["every parameter is frozen in step 1"]),
        (
            [{"params": "*.mlp.*", "until_step": 7}, {"params": "*", "lr": 0, "until_step": 9}],
            "groups: ",
            ["frozen in step 8"],
        ),
        (
            [{"params": "*", "until_step": 9}, {"params": "*.mlp.*", "lr": 0, "until_step": 9}],
            "groups.1: ",
            ["never applies: optimizer.groups.0 comes first"],
        ),
        ([{"params": "*", "lr": 2}, {"params": "*.mlp.*"}], "groups.1: ", ["never applies"]),
        (
            [{"params": ["*embed*", "*.mlp.*"], "rows_from": 9}],
            "groups.0.rows_from: ",
            ["matches model.layers.0.mlp", "(embeddings: lm_head.weight, model.embed_tokens.weight)"],
        ),
        ([{"params": "*embed*", "rows_from": 64}], "groups.0.rows_from: ", ["has 64 rows", "(got 64)"]),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused(groups, path, fragments):
    text = message(UNTIED, *groups)
    assert f"optimizer.{path}" in text and all(fragment in text for fragment in fragments), text


def test_a_pattern_for_one_name_of_a_tied_parameter_is_refused():
    text = message(TIED, {"params": "lm_head.*", "lr": 0})
    assert "lm_head.weight, which is tied to model.embed_tokens.weight" in text and "tie_word_embeddings" in text


def test_the_factor_of_a_group_multiplies_the_schedule():
    model, made = groups_of(UNTIED, {"params": EMBEDDINGS, "lr": 4, "until_step": 3}, {"params": "*", "lr": 0.5})
    section = OptimizerSection(lr=1e-3)
    optimizer = build_optimizer(model, section, decayed_names(model), set(), made.phases)
    scheduler = build_scheduler(optimizer, SchedulerSection(name="linear"), 10)
    rates = {}
    for step in range(5):
        rates[step] = scheduler.get_last_lr()
        assert scheduled_rate(scheduler) == pytest.approx(1e-3 * (1 - step / 10))
        optimizer.step()
        scheduler.step()
    (embeddings,) = [n for n, group in enumerate(optimizer.param_groups) if group["phases"][0].lr == 4]
    assert rates[0][embeddings] == pytest.approx(4e-3) and rates[2][embeddings] == pytest.approx(3.2e-3)
    assert rates[3][embeddings] == pytest.approx(0.35e-3) and min(rates[0]) == pytest.approx(0.5e-3)
    set_step(scheduler, 2)
    assert scheduler.get_last_lr() == rates[2]


def test_muon_and_adamw_share_the_groups():
    model, made = groups_of(UNTIED, {"params": "*.layers.0.*", "lr": 0.1}, {"params": "*.layers.1.*", "lr": 0})
    made.freeze()
    section = OptimizerSection(name="muon", lr=1e-3)
    groups = named_groups(model, section, decayed_names(model), hidden_names(model), made.phases)
    found = {(group["optimizer"], group["phases"][0].lr): group["parameters"] for group in groups}
    assert (
        all("norm" in name for name in found["adamw", 0.1])
        and "model.layers.0.mlp.up_proj.weight" in found["muon", 0.1]
    )
    assert not any(".layers.1." in name for names in found.values() for name in names)


def measured_flops(model):
    """FLOPs per token of the matrix products of a forward and a backward pass, by torch's counter."""
    ids = torch.arange(16)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / 16


@pytest.mark.parametrize(
    "patterns",
    [
        ["*.mlp.*"],
        ["*.layers.0.*", "*.layers.1.*"],
        ["model.embed_tokens.*", "*.layers.0.*", "*.layers.2.mlp.*"],
        ["model.*"],
        ["lm_head.*", "*.layers.2.*"],
    ],
)
def test_frozen_parameters_save_the_flops_that_autograd_skips(patterns):
    config = {**UNTIED, "num_key_value_heads": 4}
    whole = build(config, attn_implementation="eager")
    model = build(config, attn_implementation="eager")
    made = ParameterGroups(
        model, OptimizerSection(lr=1e-3, groups=[{"params": patterns, "lr": 0}]), decayed_names(model)
    )
    made.freeze()
    counts = count_parameters(model)
    saved = model_flops_per_token(model.config, counts, 16) - model_flops_per_token(
        model.config, counts, 16, frozen_part(model, made.frozen)
    )
    # The counter also knows that the first trained matrices need no gradient of their input.
    assert saved == pytest.approx(measured_flops(whole) - measured_flops(model), rel=0.02)


def test_of_frozen_experts_only_those_that_a_token_is_routed_to_save_flops():
    model = build(MOE)
    made = ParameterGroups(
        model, OptimizerSection(lr=1e-3, groups=[{"params": "*.experts.*", "lr": 0}]), decayed_names(model)
    )
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert frozen_part(model, made.frozen).parameters == experts // 2  # 2 of 4 experts
