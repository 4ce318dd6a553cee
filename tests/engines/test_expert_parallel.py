import math
import os
from importlib.util import find_spec

import pytest
import torch
from conftest import launcher_environments
from tiny_models import MOE
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.engines import choose, expert_parallel, pieces
from hfpretrain.modeling.initialization import InitialWeights, fill
from hfpretrain.modeling.optim import build_optimizer, decayed_names, hidden_names
from hfpretrain.recipe.schema import OptimizerSection, RecipeError

CONFIG = {**MOE, "num_hidden_layers": 2, "head_dim": 8}


def new_model(num_experts):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**CONFIG, "num_experts": num_experts}))
    return model.float()


def optimizer_of(name):
    """A function that builds an optimizer for a model. Call it before the model is sharded."""
    model = new_model(8)
    decayed, hidden, section = decayed_names(model), hidden_names(model), OptimizerSection(name=name, lr=1e-2)
    return lambda model: build_optimizer(model, section, decayed, hidden)


def batch(step):
    return torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(step))


def train_alone(model, optimizer, step, max_grad_norm):
    """Loss and gradient norm of a step in one process, and the clipped gradients."""
    loss = model(input_ids=batch(step), labels=batch(step)).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.step()
    optimizer.zero_grad()
    return [loss.item(), norm.item()], gradients


def train_divided(engine, step):
    """The same under an engine, where each process has a part of the batch, in two micro-steps."""
    total = torch.zeros(())
    for ids in batch(step).chunk(engine.data_size)[engine.data_index].chunk(2):
        with engine.accumulate():
            loss = engine.model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(8 * 15)).loss
            engine.backward(loss)
        total += loss.detach()
    norm = engine.clip_gradients()
    gradients = {name: p.grad.full_tensor().clone() for name, p in engine.unwrapped_model.named_parameters()}
    engine.update()
    return [engine.total(total).item(), norm.item()], gradients


def prepare(engine, num_experts, optimizer, max_grad_norm, has_values=False):
    engine.accelerator.free_memory()
    engine.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = None
    model = new_model(num_experts)
    weights = InitialWeights(model, 0)
    if has_values:
        fill(model, weights)
    sizes = {"micro_batch_size": 1, "accumulation_steps": 2, "max_grad_norm": max_grad_norm}
    engine.prepare(model, None if has_values else weights, optimizer_of(optimizer), **sizes)
    return model


def compare(rank, environments, folder, cases):
    os.environ.update(environments[rank])
    torch.set_num_threads(1)
    accelerator = choose.build_engine("no", [], str(folder), 60).accelerator
    for number, (ep_size, num_experts, optimizer, max_grad_norm) in enumerate(cases):
        os.environ["PARALLELISM_CONFIG_EP_SIZE"] = str(ep_size)
        engine = expert_parallel.EPFSDP2(accelerator)
        alone = new_model(num_experts)
        fill(alone, InitialWeights(alone, 0))
        alone_optimizer = optimizer_of(optimizer)(alone)
        model = prepare(engine, num_experts, optimizer, max_grad_norm, has_values=number == 0)
        experts = model.model.layers[0].mlp.experts.gate_up_proj
        assert experts.to_local().numel() == experts.numel() // engine.num_processes
        for step in range(3):
            expected, their_gradients = train_alone(alone, alone_optimizer, step, max_grad_norm)
            found, gradients = train_divided(engine, step)
            assert found == pytest.approx(expected, rel=1e-5), (ep_size, optimizer, step)
            for name, gradient in gradients.items():
                size = their_gradients[name].abs().max()
                assert (gradient - their_gradients[name]).abs().max() <= 1e-4 * size, (ep_size, name, step)
        for name, tensor in engine.full_parameters():
            torch.testing.assert_close(tensor, alone.get_parameter(name).detach(), rtol=0, atol=1e-4)
        pieces.save(engine.state_to_save(), folder / str(number), torch.distributed.group.WORLD)
        expected, _ = train_divided(engine, 3)
        resumed = expert_parallel.EPFSDP2(accelerator)
        prepare(resumed, num_experts, optimizer, max_grad_norm)
        assert resumed.load_state(folder / str(number), torch.distributed.group.WORLD)
        assert train_divided(resumed, 3)[0] == expected
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "cases",  # ep_size, number of experts, optimizer, max_grad_norm
    [
        [(2, 8, "adamw", 0.5)],
        pytest.param(
            # Two groups can't divide the three experts of a process evenly.
            [(4, 8, "adamw", None), (2, 8, "muon", 0.5), (2, 6, "muon", None), (2, 8, "adamw_schedule_free", 0.5)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["short", "long"],
)
def test_divided_experts_train_like_whole_ones(tmp_path, cases):
    cases = [case for case in cases if case[2] != "adamw_schedule_free" or find_spec("schedulefree")]
    arguments = (launcher_environments("ep_fsdp2", 4), tmp_path, cases)
    torch.multiprocessing.start_processes(compare, arguments, 4, start_method="forkserver")


def test_a_model_that_the_plan_does_not_divide_is_refused():
    model = new_model(4)
    model.ep_plan.pop("model.layers.*.mlp.experts.down_proj")
    with pytest.raises(RecipeError, match=r"does not divide model\.layers\.0\.mlp\.experts\.down_proj; use fsdp2"):
        expert_parallel.divide_experts(model, None, None)
    model._ep_plan = {}
    with pytest.raises(RecipeError, match=r"parallelism_config_ep_size: .*matches none of its modules; use fsdp2"):
        expert_parallel.divide_experts(model, None, None)
