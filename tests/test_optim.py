import pytest
import torch

from hfpretrain.optim import build_optimizer, build_scheduler, decayed_names, set_step
from hfpretrain.recipe import OptimizerSection, RecipeError, SchedulerSection

WSD = {"name": "warmup_stable_decay", "num_warmup_steps": 5, "scheduler_specific_kwargs": {"num_decay_steps": 10}}


def optimizer():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    return build_optimizer(model, OptimizerSection(lr=1.0, weight_decay=0.1), decayed_names(model))


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
