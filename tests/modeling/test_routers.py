"""Finding the routers of a model, and balancing its experts."""

import pytest
import torch
from tiny_models import LLAMA, MOE, SMALL, build
from torch._dynamo.testing import CompileCounter

from hfpretrain.modeling.loss import StepLoss
from hfpretrain.modeling.routers import Balance, RouterRecorder, find_routers, keep_biases_whole, resolve_balance
from hfpretrain.recipe.schema import RecipeError

DEEPSEEK = {"model_type": "deepseek_v3", "intermediate_size": 32, "moe_intermediate_size": 16, "n_routed_experts": 8,
            "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 1, "num_key_value_heads": 4, **SMALL}  # fmt: skip
ERNIE = {"model_type": "ernie4_5_moe", "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
         "moe_layer_start_index": 0, "moe_layer_end_index": 1, "intermediate_size": 32, "num_key_value_heads": 2,
         **SMALL}  # fmt: skip
LLAMA4 = {"model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 16,
          "intermediate_size_mlp": 32, "num_key_value_heads": 2, "head_dim": 8, **SMALL}  # fmt: skip
ZAYA = {"model_type": "zaya", "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
        "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8, **SMALL}  # fmt: skip
DEEPSEEK_V2 = {**DEEPSEEK, "model_type": "deepseek_v2", "head_dim": 8}
JETMOE = {"model_type": "jetmoe", "kv_channels": 8, "num_key_value_heads": 2, "intermediate_size": 16,
          "num_local_experts": 4, "num_experts_per_tok": 2, **SMALL}  # fmt: skip
LENGTH = 16


def record(model, balance, steps=1, rows=(0, 4)):
    """Count the experts of some rows of a fixed batch for some steps."""
    routers = find_routers(model)
    keep_biases_whole(routers)
    recorder = RouterRecorder(routers, torch.device("cpu"), balance)
    ids = torch.randint(64, (4, LENGTH), generator=torch.Generator().manual_seed(0))[slice(*rows)]
    model.train()
    for _ in range(steps):
        recorder.begin_step()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        recorder.finish_step(lambda counts: counts)
    return recorder


@pytest.mark.parametrize(
    ("config", "num_routers", "has_bias"),
    [(LLAMA, 0, False), (MOE, 3, False), (DEEPSEEK, 2, True), (ERNIE, 2, True), (LLAMA4, 3, False), (JETMOE, 6, False)],
)
def test_each_router_counts_the_experts_of_all_tokens(config, num_routers, has_bias):
    recorder = record(build(config), Balance())
    assert [router.bias is not None for router in recorder.routers] == [has_bias] * num_routers
    for router, counts in zip(recorder.routers, recorder.counts, strict=True):
        assert counts.sum() == 4 * LENGTH * router.experts_per_token and router.logits is not None


def test_evaluation_and_repeated_forward_passes_are_not_counted():
    model = build(MOE)
    model.gradient_checkpointing_enable()
    recorder = record(model, Balance())
    expected = recorder.counts.clone()
    recorder.begin_step()
    ids = torch.randint(64, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.eval()(input_ids=ids)
    assert torch.equal(recorder.counts, expected)


@pytest.mark.parametrize("config", [DEEPSEEK, ERNIE, ZAYA])
def test_the_bias_balances_a_router_that_uses_few_experts(config):
    model = build({**config, "initializer_range": 0.1 if config is ZAYA else 0.5})
    first = record(model, Balance()).counts.float()
    recorder = record(model, Balance(bias_rate=0.01), steps=200)
    last = recorder.counts.float()
    for router, before, after in zip(recorder.routers, first, last, strict=True):
        before, after = before[: router.num_experts], after[: router.num_experts]
        assert after.max() / after.mean() <= max(1.3, 0.7 * before.max() / before.mean())
    if config is ZAYA:  # the bias of choosing no expert stays
        (module, name) = recorder.routers[0].bias
        assert getattr(module, name)[-1] == -1


def test_the_balancing_loss_does_not_depend_on_the_micro_batch():
    model = build({**MOE, "initializer_range": 0.5})
    recorder = record(model, Balance(coefficient=0.1))
    fractions = recorder.previous.float() / recorder.previous.sum(1, keepdim=True)
    ids = torch.randint(64, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    terms = []
    for parts in (1, 2, 4):
        losses = []
        for micro_batch in ids.chunk(parts):
            model(input_ids=micro_batch, use_cache=False)
            losses.append(recorder.balancing_loss())
        terms.append(torch.stack(losses).mean())
        assert terms[-1].requires_grad
    assert torch.allclose(torch.stack(terms), terms[0], rtol=1e-6)
    logits = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    own = [4 * 2 * (f * one.softmax(-1).mean(0)).sum() for f, one in zip(fractions, logits, strict=True)]
    assert terms[0].item() == pytest.approx(0.1 * torch.stack(own).mean().item(), rel=1e-5)


def test_the_objective_replaces_the_balancing_loss_of_the_class():
    ids = torch.randint(64, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    found = []
    for output_router_logits in (False, True):
        model = build({**MOE, "initializer_range": 0.5, "output_router_logits": output_router_logits})
        recorder = record(model, Balance(coefficient=0.1))
        step_loss = StepLoss(coefficient=0.001 if output_router_logits else 0.0, recorder=recorder)
        found.append(step_loss(model, {"input_ids": ids, "labels": ids}, torch.tensor(60), 2))
    for (loss, objective), other in zip(found, found[::-1], strict=True):
        assert loss.item() == pytest.approx(other[0].item(), rel=1e-6)
        assert objective.item() == pytest.approx(other[1].item(), rel=1e-6)
    assert (found[0][1] - found[0][0]).item() > 0.05


def test_what_balances_a_model():
    def resolve(config, bias_rate=None, coefficient=None):
        model = build(config)
        return resolve_balance(model, find_routers(model), False, bias_rate, coefficient)

    assert resolve(LLAMA) is None
    assert resolve(MOE) == Balance(coefficient=0.001) and resolve(MOE, coefficient=0.0) == Balance()
    assert resolve(DEEPSEEK) == Balance(bias_rate=1e-3) and resolve(DEEPSEEK, 0.0, 0.01) == Balance(0.0, 0.01)
    with pytest.raises(RecipeError, match=r"training\.router_bias_rate: no router of Llama"):
        resolve(LLAMA, bias_rate=0.1)
    with pytest.raises(RecipeError, match=r"training\.router_aux_loss_coef: LlamaForCausalLM has no router"):
        resolve(LLAMA, coefficient=0.1)
    with pytest.raises(RecipeError, match="set this key to the weight of a balancing loss"):
        resolve(DEEPSEEK_V2)
    assert resolve(DEEPSEEK_V2, coefficient=0.01) == Balance(coefficient=0.01)


@pytest.mark.parametrize("config", [MOE, DEEPSEEK], ids=["loss", "bias"])
def test_compiled_layers_share_their_graphs_and_a_log_step_adds_none(config):
    ids = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    numbers = []
    for num_layers in (2, 4):
        torch._dynamo.reset()
        model = build({**config, "num_hidden_layers": num_layers})
        model.set_experts_implementation("batched_mm")
        balance = Balance(coefficient=0.1) if config is MOE else Balance(bias_rate=0.01)
        recorder = RouterRecorder(find_routers(model), torch.device("cpu"), balance)
        counter = CompileCounter()
        for layer in model.model.layers:
            layer.compile(backend=counter)
        for measures_z in (False, True):
            recorder.begin_step(measures_z)
            model(input_ids=ids, use_cache=False)
            recorder.balancing_loss()
            recorder.finish_step(lambda counts: counts)
            assert recorder.counts.sum() == 2 * LENGTH * 2 * len(recorder.routers)
            numbers.append(counter.frame_count)
    torch._dynamo.reset()
    assert len(set(numbers)) == 1 and numbers[0] > 0


def test_a_class_with_a_term_of_its_own_is_balanced_too():
    ids = torch.randint(64, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    model = build({**MOE, "initializer_range": 0.5})
    recorder = record(model, Balance(coefficient=0.1))
    batch, number = {"input_ids": ids, "labels": ids}, torch.tensor(60)
    loss, objective = StepLoss(recorder=recorder)(model, batch, number, 2)
    own_loss, own_objective = StepLoss(adds_own=True, recorder=recorder)(model, batch, number, 2)
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert own_objective.item() == pytest.approx(objective.item(), rel=1e-6)
    assert (own_objective - own_loss).item() > 0.05
