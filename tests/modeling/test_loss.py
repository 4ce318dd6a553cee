import pytest
import torch
from tiny_models import GPT2, LLAMA, MOE, SMALL, build
from torch.utils._python_dispatch import TorchDispatchMode

from hfpretrain.modeling.build import apply_liger_kernel
from hfpretrain.modeling.checks import examine_loss, use_chunked_loss
from hfpretrain.modeling.loss import (
    StepLoss,
    _losses_for_compile,
    _losses_in_place,
    head_loss,
    is_chunked,
    token_losses,
    tokens_per_chunk,
)
from hfpretrain.recipe.schema import RecipeError

WITH_BIAS = {**LLAMA, "model_type": "phi"}
TIED = {**LLAMA, "tie_word_embeddings": True}


def batch(vocab_size=64):
    input_ids = torch.randint(vocab_size, (3, 32), generator=torch.Generator().manual_seed(1))
    labels = input_ids.clone()
    labels[:, ::5] = -100
    return input_ids, labels


def loss_and_gradients(model):
    input_ids, labels = batch()
    model.zero_grad()
    loss = model(input_ids=input_ids, labels=labels, use_cache=False, num_items_in_batch=torch.tensor(200)).loss
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2, WITH_BIAS, {**MOE, "output_router_logits": True}])
def test_the_chunked_loss_equals_the_loss_of_the_model(config):
    model = build(config).eval()
    input_ids, labels = batch()
    loss, gradients = loss_and_gradients(model)
    losses = token_losses(model, {"input_ids": input_ids}, labels)
    assert not is_chunked(model) and use_chunked_loss(model, True) and is_chunked(model)
    chunked_loss, chunked_gradients = loss_and_gradients(model)
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-5, atol=1e-6 * gradient.norm().item())
    torch.testing.assert_close(token_losses(model, {"input_ids": input_ids}, labels), losses, rtol=1e-6, atol=1e-6)
    assert model(input_ids=input_ids).logits.shape == (3, 32, 64)


def test_shifted_labels_give_the_same_loss():
    model = build(LLAMA)
    input_ids, targets = batch()
    inputs = {"input_ids": input_ids, "labels": input_ids, "shift_labels": targets, "num_items_in_batch": 9}
    whole = model(**inputs).loss.item()
    assert use_chunked_loss(model, True) and model(**inputs).loss.item() == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("num_tokens", [None, 7, 32])
def test_chunks_are_summed_in_float32(mode, num_tokens):
    draw = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    hidden = torch.randn(3, 32, 16, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(640, 16, generator=draw).to(dtype).requires_grad_()
    bias = torch.randn(640, generator=draw).to(dtype).requires_grad_()
    _, labels = batch(640)
    tensors = (hidden, weight, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        logits = torch.nn.functional.linear(hidden, weight, bias).float().flatten(0, 1)
        whole = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        chunked = head_loss(*tensors, labels, num_tokens).sum()
        with torch.no_grad():
            losses = head_loss(*tensors, labels, num_tokens)
    assert chunked.dtype == losses.dtype == torch.float32 and losses.shape == (3, 32, 1)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6) == losses.sum().item()
    tolerance = 1e-6 if mode == "float32" else 1e-2  # a bf16 number has 8 significant bits
    for ours, theirs in zip(*(torch.autograd.grad(loss / 96, tensors) for loss in (chunked, whole)), strict=True):
        assert ours.dtype == dtype and (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("num_tokens", [None, 7])
def test_z_loss_changes_the_gradients_but_not_the_loss(num_tokens):
    draw = torch.Generator().manual_seed(0)
    shapes = ((3, 32, 16), (640, 16), (640,))
    hidden, weight, bias = tensors = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    _, labels = batch(640)
    logits = torch.nn.functional.linear(hidden, weight, bias).flatten(0, 1)
    whole = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    log_totals = logits.logsumexp(1)[labels.flatten() != -100]
    loss = head_loss(*tensors, labels, num_tokens, z_loss=0.01).sum()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    expected = torch.autograd.grad(whole + 0.01 * log_totals.square().sum(), tensors)
    for ours, theirs in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_z_loss_brings_softmax_denominators_closer_to_one():
    denominators = []
    for z_loss in (0.0, 0.1):
        model = build(LLAMA)
        assert use_chunked_loss(model, "auto", z_loss)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            loss_and_gradients(model)
            optimizer.step()
        denominators.append(model(input_ids=batch()[0]).logits.logsumexp(-1).abs().mean().item())
    assert denominators[1] < denominators[0] / 2


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_losses_for_compile_equal_those_computed_in_place(dtype, z_loss):
    draw = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(30, 640, generator=draw)).to(dtype)
    target = torch.randint(640, (30, 1), generator=draw)
    target[::5] = -100
    losses, gradient = _losses_for_compile(logits, target, True, z_loss)
    expected, expected_gradient = _losses_in_place(logits.clone(), target, True, z_loss)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert gradient.dtype == dtype and not gradient[::5].any() and not losses[::5].any()
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    assert (gradient - expected_gradient).norm() <= tolerance * expected_gradient.norm()
    assert _losses_for_compile(logits, target, False)[1] is None
    assert tokens_per_chunk(32768, 50304, fused=True) == 2 * tokens_per_chunk(32768, 50304)


@pytest.mark.parametrize("changes", [{"model_type": "granite", "logits_scaling": 8.0}, {"model_type": "gemma2"}])
def test_a_model_that_changes_its_logits_keeps_its_own_loss(changes):
    model = build({**LLAMA, "head_dim": 8, **changes}, attn_implementation="eager")
    before = loss_and_gradients(model)[0]
    with pytest.raises(RecipeError, match=r"training\.chunked_loss: .* changes the logits"):
        use_chunked_loss(model, True)
    with pytest.raises(RecipeError, match=r"training\.z_loss: .* changes the logits"):
        use_chunked_loss(model, "auto", 1e-4)
    with pytest.raises(RecipeError, match=r"training\.z_loss: .* set it to 0 \(got 0.0001\) and chunked_loss to auto"):
        use_chunked_loss(model, True, 1e-4)
    assert not use_chunked_loss(model, "auto") and not is_chunked(model)
    assert loss_and_gradients(model)[0] == before


def test_a_compiled_model_can_use_the_chunked_loss():
    losses = []
    for chunked in (False, True):
        model = build(LLAMA)
        model.compile(backend="eager")
        assert use_chunked_loss(model, chunked) == chunked
        losses.append([loss_and_gradients(model)[0] for _ in range(2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


BART = {"model_type": "bart", "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64,
        "decoder_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": 64}  # fmt: skip
BAMBA = {**LLAMA, "model_type": "bamba", "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
         "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, "z_loss_coefficient": 0.1}  # fmt: skip
BALANCED = {**MOE, "output_router_logits": True, "router_aux_loss_coef": 0.1}
JETMOE = {"model_type": "jetmoe", "kv_channels": 8, "num_key_value_heads": 2, "intermediate_size": 16,
          "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, **SMALL}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, StepLoss()),
        (MOE, StepLoss()),
        (BALANCED, StepLoss(coefficient=0.1)),
        (JETMOE, StepLoss(coefficient=0.01)),
        (BART, StepLoss(from_logits=True)),
        ({**BART, "model_type": "trocr", "use_learned_position_embeddings": True}, StepLoss(from_logits=True)),
        (BAMBA, StepLoss(adds_own=True)),
        ({**BAMBA, "z_loss_coefficient": 0.0}, StepLoss()),
    ],
)
def test_the_step_loss_is_the_next_token_loss_for_every_class(config, expected):
    model = build(config)
    for chunked in (False, True):
        if chunked:
            use_chunked_loss(model, "auto")
        step_loss = examine_loss(model)
        assert step_loss == expected and model.training
        input_ids, labels = batch()
        batches = [{"input_ids": input_ids[row : row + 1], "labels": labels[row : row + 1]} for row in range(3)]
        num_items = (labels[:, 1:] != -100).sum()
        losses, objectives = zip(*(step_loss(model.eval(), one, num_items, 3) for one in batches), strict=True)
        model.train()
        expected_loss = token_losses(model.eval(), {"input_ids": input_ids}, labels).sum() / num_items
        assert sum(losses).item() == pytest.approx(expected_loss.item(), rel=1e-5)
        added = sum(objectives) - sum(losses)
        assert step_loss.adds_term == (added.item() > 1e-3)
        model.train()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_training_and_evaluation_never_have_all_logits_in_memory():
    vocab_size = 2**17
    model = build({**SMALL, "model_type": "llama", "intermediate_size": 48, "vocab_size": vocab_size})
    assert use_chunked_loss(model, "auto")
    input_ids, labels = batch(vocab_size)
    most = max(tokens_per_chunk(input_ids.numel(), vocab_size) * vocab_size, model.lm_head.weight.numel())
    with LargestTensor() as largest:
        model(input_ids=input_ids, labels=labels, use_cache=False, num_items_in_batch=9).loss.backward()
        token_losses(model, {"input_ids": input_ids}, labels)
    assert largest.numel == most < input_ids.numel() * vocab_size


def test_liger_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"model\.use_liger_kernel: .* a GPU"):
        apply_liger_kernel(build(LLAMA))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    with pytest.raises(RecipeError, match="pip install liger-kernel"):
        apply_liger_kernel(build(LLAMA))
