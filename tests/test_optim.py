import pytest
import torch
from conftest import ROOT, recipe_mapping
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.optim import build_optimizer, build_scheduler, decayed_names, hidden_names, moment_bytes, set_step
from hfpretrain.recipe import OptimizerSection, RecipeError, SchedulerSection

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


@pytest.mark.parametrize(
    "section", [{"name": "cosine", "num_warmup_steps": 3}, {"name": "linear"}, WSD, {"name": "constant"}]
)
def test_the_rate_is_a_function_of_the_step(section):
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


def test_a_keyword_the_schedule_does_not_take_is_refused():
    section = SchedulerSection(name="cosine", scheduler_specific_kwargs={"min_lrr": 0.1})
    with pytest.raises(RecipeError, match=r"scheduler.scheduler_specific_kwargs: cosine: .*min_lrr"):
        build_scheduler(optimizer(), section, 30)


def test_moments_are_counted_as_torch_keeps_them():
    config = recipe_mapping(ROOT)["model"]["config"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, vocab_size=64, tie_word_embeddings=False))
    for name in ("adamw", "muon", "adafactor"):
        section = OptimizerSection(name=name, lr=1e-3)
        optimizer = build_optimizer(model, section, decayed_names(model), hidden_names(model))
        model(torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4, dtype=torch.int64)).loss.backward()
        optimizer.step()
        kept = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
        assert moment_bytes(model, section) == sum(tensor.nbytes for tensor in kept if tensor.ndim), name


def test_muon_takes_the_matrices_between_embedding_and_head():
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
    for group in restored.param_groups:  # it is these that a schedule changes
        group["lr"] = 0.0
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    restored.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def test_keys_belong_to_the_optimizer_that_takes_them():
    with pytest.raises(ValidationError, match="`momentum` is no keyword of adamw"):
        OptimizerSection(lr=1.0, momentum=0.9)
    for name in ("adamw", "muon", "adafactor"):
        dumped = OptimizerSection(name=name, lr=1.0).model_dump()
        assert OptimizerSection(**dumped) == OptimizerSection(name=name, lr=1.0)
    assert "momentum" not in OptimizerSection(lr=1.0).model_dump()
