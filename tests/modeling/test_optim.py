from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, recipe_mapping, write_recipe
from pydantic import ValidationError
from tiny_models import MOE, SMALL, SPECIAL
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain import load_recipe
from hfpretrain.engines import pieces
from hfpretrain.engines.local import Single
from hfpretrain.modeling.optim import (
    average_weights,
    build_optimizer,
    build_scheduler,
    decayed_names,
    hidden_names,
    moment_bytes,
    named_groups,
    require_library,
    set_step,
    undecayed_matrices,
)
from hfpretrain.recipe.schema import OptimizerSection, RecipeError, SchedulerSection

NAMES = ["adamw", "muon", "adafactor"]
LIBRARIES = {"adamw_8bit": "torchao", "adamw_schedule_free": "schedulefree"}
NAMES_OF_LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed"))
    for name, library in LIBRARIES.items()
]

WSD = {"name": "warmup_stable_decay", "num_warmup_steps": 5, "scheduler_specific_kwargs": {"num_decay_steps": 10}}


def optimizer():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    return build_optimizer(model, OptimizerSection(lr=1.0, weight_decay=0.1), decayed_names(model), set())


def test_matrices_decay_and_vectors_do_not():
    groups = optimizer().param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [
        (0.1, [2]),
        (0.0, [1, 1, 1]),
    ]


SIZES = {**SMALL, "num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2}


def undecayed(name, **changes):
    """Names, within layer 0, of the matrices of a model that do not decay."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SPECIAL, **(SIZES | changes)))
    decayed = decayed_names(model)
    assert {model_name for model_name, p in model.named_parameters() if p.ndim < 2}.isdisjoint(decayed)
    return [name.partition(".0.")[2] for name in undecayed_matrices(model, decayed) if ".0." in name]


def test_weight_decay_depends_on_what_a_parameter_does():
    assert undecayed("llama") == [] == undecayed("gpt2", n_embd=32, n_head=4)
    assert undecayed("cohere", use_qk_norm=True) == ["self_attn.k_norm.weight", "self_attn.q_norm.weight"]
    assert undecayed("mamba", state_size=8) == ["mixer.A_log"]
    experts = undecayed("gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    assert experts == ["mlp.experts.down_proj_bias", "mlp.experts.gate_up_proj_bias"]
    assert "attention.time_mix_key" in undecayed("rwkv")


def test_marks_of_the_models_class_and_patterns_of_the_recipe_turn_decay_off():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 3))
    model[1].weight._no_weight_decay = True
    assert decayed_names(model) == {"0.weight"} and decayed_names(model, ["0.*"]) == set()
    assert undecayed_matrices(model, {"0.weight"}) == ["1.weight"]
    with pytest.raises(RecipeError, match=r"optimizer\.no_decay\.1: .*'\*embed\*'"):
        decayed_names(model, ["0.*", "*embed*"])


def test_muon_trains_no_norms_and_has_parameter_groups_of_its_own():
    with torch.device("meta"):
        config = AutoConfig.for_model("cohere", use_qk_norm=True, **SPECIAL, **SIZES)
        model = AutoModelForCausalLM.from_config(config)
    hidden, decayed = hidden_names(model), decayed_names(model, ["*.mlp.*"])
    assert not any("norm" in name for name in hidden)
    section = OptimizerSection(name="muon", lr=1.0, weight_decay=0.1)
    groups = named_groups(model, section, decayed, hidden)
    assert [(g["optimizer"], g["weight_decay"]) for g in groups] == [
        ("muon", 0.1), ("muon", 0.0), ("adamw", 0.1), ("adamw", 0.0)
    ]  # fmt: skip
    assert all(".mlp." in name for name in groups[1]["parameters"]) and len(groups[1]["parameters"]) == 6
    built = build_optimizer(model, section, decayed, hidden).param_groups
    assert [len(g["params"]) for g in built] == [len(g["parameters"]) for g in groups]
    assert [g["weight_decay"] for g in built] == [0.1, 0.0, 0.1, 0.0]


@pytest.mark.parametrize(
    "section", [{"name": "cosine", "num_warmup_steps": 3}, {"name": "linear"}, WSD, {"name": "constant"}]
)
def test_the_learning_rate_is_a_function_of_the_step(section):
    section = SchedulerSection(**section)
    stepped = build_scheduler(optimizer(), section, 30)
    for step in range(30):
        direct = build_scheduler(optimizer(), section, 30)
        set_step(direct, step)
        assert direct.get_last_lr() == stepped.get_last_lr()
        stepped.optimizer.step()
        stepped.step()


def test_warmup_stable_decay_has_its_three_phases():
    scheduler = build_scheduler(optimizer(), SchedulerSection(**WSD), 30)
    rates = []
    for _ in range(30):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates[0] < rates[4] < 1 and rates[5:21] == [1.0] * 16 and 1 > rates[21] > rates[29] > 0


def test_a_keyword_that_the_schedule_does_not_accept_is_refused():
    section = SchedulerSection(name="cosine", scheduler_specific_kwargs={"min_lrr": 0.1})
    with pytest.raises(RecipeError, match=r"scheduler\.scheduler_specific_kwargs: .*min_lrr"):
        build_scheduler(optimizer(), section, 30)


def build(name, lr=1e-3):
    """A tiny llama with matrices of 4,096 numbers, and its optimizer."""
    torch.manual_seed(0)
    config = recipe_mapping(ROOT)["model"]["config"] | {"hidden_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=64, tie_word_embeddings=False))
    section = OptimizerSection(name=name, lr=lr)
    return model, build_optimizer(model, section, decayed_names(model), hidden_names(model))


@pytest.mark.parametrize("name", [*NAMES, *NAMES_OF_LIBRARIES])
def test_moment_bytes_equals_the_size_of_the_optimizer_state(name):
    check_moment_bytes(name, *build(name))


def test_moment_bytes_of_muon_count_experts_once():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SPECIAL, **MOE}), dtype=torch.float32)
    section = OptimizerSection(name="muon", lr=1e-3)
    check_moment_bytes("muon", model, build_optimizer(model, section, decayed_names(model), hidden_names(model)))


def check_moment_bytes(name, model, optimizer):
    train(model, optimizer, range(1))
    kept = [pieces.to_fragments(value) for state in optimizer.state.values() for value in state.values()]
    kept = [tensor for value in kept for tensor in (value.values() if isinstance(value, dict) else [value])]
    counted = moment_bytes(model, OptimizerSection(name=name, lr=1e-3))
    assert counted == sum(tensor.nbytes for tensor in kept if tensor.ndim)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        ids = torch.randint(8, (4, 16), generator=torch.Generator().manual_seed(step))
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def accelerated(name):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    engine = Single(Accelerator(cpu=True))
    engine.model, engine.optimizer = engine.accelerator.prepare(*build(name, lr=1e-2))
    return engine


@pytest.mark.parametrize("name", NAMES_OF_LIBRARIES)
def test_optimizers_of_libraries_learn_and_resume_exactly_after_a_rehearsal(tmp_path, name):
    model, optimizer = build(name, lr=1e-2)
    whole = train(model, optimizer, range(20))
    assert whole[-1] < 0.6 * whole[0]
    stopped = accelerated(name)
    assert train(stopped.model, stopped.optimizer, range(10)) == whole[:10]
    pieces.save(stopped.state_to_save(), tmp_path / "checkpoint")
    resumed = accelerated(name)
    model, optimizer = resumed.model, resumed.optimizer
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with resumed.rehearsal():
        (model(torch.ones(1, 4, dtype=torch.int64)).logits.sum() * 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not optimizer.state and all(map(torch.equal, before, model.parameters()))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2]
    assert train(model, optimizer, range(1)) == whole[:1]  # the rehearsal changed nothing
    resumed.load_state(tmp_path / "checkpoint", None)
    assert train(model, optimizer, range(10, 20)) == whole[10:]


@pytest.mark.parametrize("name", NAMES_OF_LIBRARIES)
def test_a_schedule_changes_the_learning_rate_of_optimizers_of_libraries(name):
    model, optimizer = build(name)
    scheduler = build_scheduler(optimizer, SchedulerSection(name="constant_with_warmup", num_warmup_steps=4), 30)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer, range(1))  # the first step of a warmup has learning rate 0
    assert all(map(torch.equal, before, model.parameters()))
    scheduler.step()
    assert scheduler.get_last_lr() == [2.5e-4, 2.5e-4]
    train(model, optimizer, range(1))
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", NAMES_OF_LIBRARIES[1:])
def test_schedule_free_evaluates_the_average_and_training_continues_unchanged(name):
    engine = accelerated(name)
    model, optimizer = engine.model, engine.optimizer
    z = [parameter.detach().clone() for parameter in model.parameters()]
    x, y = [p.clone() for p in z], None
    for step in range(5):  # the average of z over steps of one rate, by its definition
        train(model, optimizer, [step])
        z = [optimizer.state[p]["z"].clone() for p in model.parameters()]
        x = [mean.lerp(new, 1 / (step + 1)) for mean, new in zip(x, z, strict=True)]
        y = [parameter.detach().clone() for parameter in model.parameters()]
        with engine.evaluated_weights():
            found = [parameter.detach().clone() for parameter in model.parameters()]
        for theirs, ours in zip(found, x, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
        assert all(map(torch.equal, y, model.parameters())) and (step == 0 or not any(map(torch.equal, y, found)))
    weights = {str(number): tensor for number, tensor in enumerate(y)}
    moments = {str(number): {"z": tensor} for number, tensor in enumerate(z)}
    average_weights(weights, moments, OptimizerSection(name=name, lr=1.0))
    assert all(map(torch.equal, weights.values(), found))


def test_schedule_free_accepts_only_constant_schedules(tmp_path):
    changes = {"optimizer__name": "adamw_schedule_free", "scheduler__name": "constant_with_warmup"}
    assert load_recipe(write_recipe(tmp_path, **changes)).optimizer.betas[0] == 0.9
    with pytest.raises(RecipeError, match=r"scheduler\.name: cosine .*adamw_schedule_free"):
        load_recipe(write_recipe(tmp_path, **changes | {"scheduler__name": "cosine"}))
    with pytest.raises(RecipeError, match="`betas`"):
        load_recipe(write_recipe(tmp_path, **changes, optimizer__betas=[0.0, 0.9]))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_refused_with_the_command_that_installs_it(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=rf"optimizer\.name: {name} .*`pip install {LIBRARIES[name]}`"):
        require_library(OptimizerSection(name=name, lr=1.0))
    require_library(OptimizerSection(lr=1.0))


def test_muon_trains_the_matrices_between_embedding_and_head():
    config = recipe_mapping(ROOT)["model"]["config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=64, tie_word_embeddings=False))
    hidden = hidden_names(model)
    outside = {name for name, parameter in model.named_parameters() if parameter.ndim == 2} - hidden
    assert outside == {"model.embed_tokens.weight", "lm_head.weight"} and len(hidden) == 2 * 7
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerSection(name="muon", lr=1e-3, weight_decay=0.0), set(), hidden)
    model(torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4, dtype=torch.int64)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        update = (parameter - before[name]).detach()
        if name in hidden:  # about the root mean square of AdamW's updates, and orthogonal
            scale = 1e-3 * 0.2 * max(update.shape) ** 0.5
            values = torch.linalg.svdvals(update) / scale
            assert values.max() < 1.3, name
    restored = build_optimizer(model, OptimizerSection(name="muon", lr=1e-3), set(), hidden)
    restored.load_state_dict(optimizer.state_dict())
    assert all(restored.state[p].keys() == optimizer.state[p].keys() for p in model.parameters())
    for group in restored.param_groups:  # a schedule changes these groups
        group["lr"] = 0.0
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    restored.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def test_a_key_of_another_optimizer_is_refused():
    with pytest.raises(ValidationError, match=r"`momentum` .* adamw"):
        OptimizerSection(lr=1.0, momentum=0.9)
    for name in (*NAMES, *LIBRARIES):
        dumped = OptimizerSection(name=name, lr=1.0).model_dump()
        assert OptimizerSection(**dumped) == OptimizerSection(name=name, lr=1.0)
    assert "momentum" not in OptimizerSection(lr=1.0).model_dump()
