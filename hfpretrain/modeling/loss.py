"""The next-token loss of a step; it can be computed in chunks, so that the logits are never all in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear, pad

from hfpretrain.modeling.routers import RouterRecorder
from hfpretrain.modeling.structure import causal_lm
from hfpretrain.recipe.labels import IGNORE_INDEX

# 16 MiB in float32. Smaller chunks would save little memory, and take more time to launch kernels.
_MIN_CHUNK_LOGITS = 2**22
_VOCABULARY_ROWS = 2**14  # rows of the output embedding whose gradient is added at once


def tokens_per_chunk(num_tokens: int, vocab_size: int, fused: bool = False) -> int:
    """Number of tokens in a chunk: a sixteenth of a micro-batch, but at least as many as have 16 MiB of logits.

    More chunks would save little memory. They would take more time, because each chunk reads and writes the gradient of
    the whole output embedding. `fused`: whether a compiled kernel computes the losses. It needs half the memory per
    token, so a chunk is then an eighth of a micro-batch.
    """
    return max(-(-num_tokens // (8 if fused else 16)), _MIN_CHUNK_LOGITS // vocab_size)


def token_losses(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """-log p of every label but the first, without gradients; 0 for labels that are -100.

    `inputs`: the model's keyword arguments except `labels`. `labels`: int64 (batch, length). Returns float32
    (batch, length - 1). With a chunked loss the logits are never all in memory.
    """
    with torch.no_grad():
        if is_chunked(model):
            return model(**inputs, labels=labels, use_cache=False).logits[:, :-1, 0]
        logits = model(**inputs, use_cache=False).logits
        if (left_out := _ids_left_out(causal_lm(model))) is not None:
            logits[..., left_out] = -torch.inf
        rows = zip(logits[:, :-1], labels[:, 1:], strict=True)
        return torch.stack([cross_entropy(row.float(), targets, reduction="none") for row, targets in rows])


@contextmanager
def ids_left_out(model: Any, ids: slice) -> Iterator[None]:
    """Inside this context, `token_losses` computes as if the model's vocabulary did not have these ids."""
    network = causal_lm(model)
    network.ids_left_out = ids
    try:
        yield
    finally:
        del network.ids_left_out


def _ids_left_out(network: Any) -> slice | None:
    found: slice | None = getattr(network, "ids_left_out", None)
    return found


def is_chunked(model: Any) -> bool:
    """Whether a model computes its loss in chunks. The model may be wrapped by an engine."""
    return hasattr(causal_lm(model).get_output_embeddings(), "chunked_loss")


@dataclass(frozen=True)
class StepLoss:
    """Computes the next-token loss of a step with a model. `checks.examine_loss` makes the one that fits a model."""

    from_logits: bool = False
    """Whether to compute the loss from the logits, because the class computes another loss (BART doesn't shift
    labels)."""
    coefficient: float = 0.0
    """Weight with which the class adds its output `aux_loss`, the balancing loss of a router."""
    recorder: RouterRecorder | None = None
    """Computes the balancing loss of the routers, which replaces that of the class."""
    adds_own: bool = False
    """Whether the class adds a term that does not depend on the labels and is not in its outputs (Bamba's z-loss)."""

    def __call__(
        self, model: Any, batch: dict[str, torch.Tensor], num_items: torch.Tensor, num_micro_batches: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this micro-batch's part of the step's next-token loss, and the value to call backward on.

        Both are float32 scalars.

        `batch`: see `data.batches.collate`. `num_items`: number of the step's labels on all processes, int64 ().
        `num_micro_batches`: number of the step's micro-batches on all processes. The terms that a class adds are means
        over a micro-batch, so they are divided by this number.
        """
        if self.from_logits:
            inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}
            outputs = model(**inputs, use_cache=False)
            loss = summed_loss(outputs.logits, batch) / num_items
        else:
            outputs = model(**batch, use_cache=False, num_items_in_batch=num_items)
            loss = outputs.loss
        added: list[torch.Tensor] = []
        auxiliary = getattr(outputs, "aux_loss", None) if self.coefficient else None
        if self.adds_own:
            part = summed_loss(outputs.logits, batch) / num_items
            added.append(loss - part)
            loss = part
        elif auxiliary is not None:
            auxiliary = self.coefficient * auxiliary
            if not self.from_logits:
                loss = loss - auxiliary
            if self.recorder is None or not self.recorder.routers:
                added.append(auxiliary)
        if self.recorder is not None and (balancing := self.recorder.balancing_loss()) is not None:
            added.append(balancing)
        return loss, loss + sum(added) / num_micro_batches if added else loss

    @property
    def adds_term(self) -> bool:
        """Whether the class adds a term to the next-token loss, such as a balancing loss."""
        return self.adds_own or self.coefficient != 0

    def note(self, name: str) -> str | None:
        """A note for a class called `name`, if its own loss is not used unchanged; else None."""
        if self.from_logits:
            return f"{name} does not compute the next-token loss of a whole step, so it is computed from the logits"
        if self.adds_own:
            return f"{name} adds a term to the next-token loss: its mean over the micro-batches of a step is used"
        return None


def summed_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of a batch's next-token losses, float32 (). With a chunked loss, `logits` holds losses already."""
    targets = batch.get("shift_labels")
    if targets is None:
        targets = pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    if logits.shape[-1] == 1:
        return logits.sum()
    logits = logits.float().flatten(0, -2)
    return cross_entropy(logits, targets.flatten().to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


def can_chunk(model: Any) -> bool:
    """Whether a model's loss can be computed in chunks. `checks.use_chunked_loss` tests if this gives the same loss."""
    return isinstance(causal_lm(model).get_output_embeddings(), torch.nn.Linear)


@contextmanager
def chunked_loss_installed(network: Any) -> Iterator[None]:
    """Inside this context, the model computes its loss in chunks."""
    undo = install_chunked_loss(network)
    try:
        yield
    finally:
        undo()


def install_chunked_loss(network: Any, z_loss: float = 0.0) -> Callable[[], None]:
    """Compute the loss inside the forward of the output embedding; returns a function that undoes this.

    Inside that forward, every engine has the embedding's weight in memory. The forward returns losses in place of
    logits, float32 (..., 1). The model passes them to its `loss_function`, which then only divides. The model's class
    is not changed.
    """
    head = network.get_output_embeddings()
    plain, loss_function = head.forward, network.loss_function
    patched = vars(head).get("forward")  # transformers' tensor parallelism sets it
    pending: list[torch.Tensor] = []  # the targets of the forward pass in progress

    def keep_targets(_: Any, args: Any, keywords: dict[str, Any]) -> None:
        pending.clear()
        labels, targets = keywords.get("labels"), keywords.get("shift_labels")
        if labels is not None:
            pending.append(pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:] if targets is None else targets)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if not pending:
            return plain(hidden)
        if hasattr(head.weight, "placements"):
            raise ValueError("the output embedding is split across processes")
        left_out = _ids_left_out(network)
        return head_loss(hidden, head.weight, head.bias, pending.pop(), z_loss=z_loss, left_out=left_out)

    def divide(logits: Any, labels: Any, vocab_size: Any, num_items_in_batch: Any = None, **_: Any) -> torch.Tensor:
        num_items = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return logits.sum() / num_items

    hook = network.register_forward_pre_hook(keep_targets, with_kwargs=True)
    # Each chunk runs a few large kernels, and compiling would only unroll the loop over chunks.
    head.forward, network.loss_function = torch.compiler.disable(forward), divide
    head.chunked_loss = True

    def undo() -> None:
        hook.remove()
        del head.forward, head.chunked_loss
        if patched is not None:
            head.forward = patched
        network.loss_function = loss_function

    return undo


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    num_tokens: int | None = None,
    z_loss: float = 0.0,
    left_out: slice | None = None,
) -> torch.Tensor:
    """Cross entropy of a linear output embedding in float32, computed in chunks of `num_tokens`.

    Returns the sum, (1, 1, 1), if gradients are enabled, otherwise the loss of each token, (batch, length, 1).
    `hidden`: (batch, length, hidden). `weight`: (vocabulary, hidden). `targets`: int64 (batch, length); -100 is
    ignored. Matrix products are computed in the weight's dtype or autocast's, the rest in float32. `z_loss`: weight of
    a second term, the square of the logarithm of each softmax's denominator (PaLM, section 5). The gradients include
    this term, the returned loss does not. `left_out`: ids that get no probability; only without gradients.

    `torch.nn.functional.linear_cross_entropy` (torch 2.13) is not used, because it sums in bf16 if the input is bf16,
    and because its chunks get smaller and slower with a larger vocabulary.
    """
    num_tokens = num_tokens or tokens_per_chunk(targets.numel(), len(weight), _has_triton(hidden.device.type))
    inputs = (hidden.flatten(0, 1), weight, bias, targets.flatten(), num_tokens)
    if torch.is_grad_enabled():
        total: torch.Tensor = _SummedLoss.apply(*inputs, z_loss)
        return total
    return (
        _token_losses(*inputs, left_out=left_out).view(*targets.shape, 1).clone()
    )  # FSDP2 warns if a module returns a view


class _SummedLoss(torch.autograd.Function):
    """Sums the losses and computes the gradients in the forward pass. The backward pass only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        num_tokens: int,
        z_loss: float,
    ) -> torch.Tensor:
        inputs = (hidden, weight, bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        # The gradient of a row of `hidden` comes from one chunk. Those of weight and bias are sums over all chunks.
        sums = (
            hidden.dtype,
            torch.float32,
            torch.float32,
        )
        ctx.gradients = [
            torch.zeros_like(tensor, dtype=dtype) if tensor is not None and needed else None
            for tensor, dtype, needed in zip(inputs, sums, ctx.needs_input_grad[:3], strict=True)
        ]
        losses = _token_losses(hidden, weight, bias, targets, num_tokens, ctx.gradients, z_loss)
        return losses.sum().view(1, 1, 1).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so backward works only once
        scaled = [
            None if gradient is None else gradient.mul_(grad_output.view(())).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None)


def _token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    num_tokens: int,
    gradients: list[torch.Tensor | None] | None = None,
    z_loss: float = 0.0,
    left_out: slice | None = None,
) -> torch.Tensor:
    """-log p of each target, float32 (tokens,).

    Adds the gradients of hidden, weight and bias to `gradients`, if given.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    with torch.autocast(device, enabled=False):
        for start in range(0, len(hidden), num_tokens):
            chunk = slice(start, start + num_tokens)
            inputs, target = hidden[chunk], targets[chunk, None]
            logits = linear(inputs, weight, bias)
            if left_out is not None:
                logits[:, left_out] = -torch.inf
            softmax = _compiled_losses() if _has_triton(device) else _losses_in_place
            losses[chunk], grad_logits = softmax(logits, target, gradients is not None, z_loss)
            if gradients is not None and grad_logits is not None:
                _add_gradients(gradients, chunk, inputs, weight, grad_logits)
    return losses


def _losses_in_place(
    logits: torch.Tensor, target: torch.Tensor, with_gradient: bool, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-log p of `target`, int64 (tokens, 1), and the gradient of the logits, both 0 where the target is -100.

    The gradient is softmax - 1 at the target and softmax elsewhere; a `z_loss` adds softmax * 2 * z_loss *
    log-denominator. Overwrites `logits` if they are float32.
    """
    logits = logits.float()
    counts, target = target != IGNORE_INDEX, target.clamp(min=0)
    largest = logits.amax(1, keepdim=True)
    logits.sub_(largest)
    wanted = logits.gather(1, target)
    total = logits.exp_().sum(1, keepdim=True)
    log_total = total.log()
    losses = (log_total - wanted).masked_fill_(~counts, 0)[:, 0]
    if not with_gradient:
        return losses, None
    scale = counts * (1 + 2 * z_loss * (log_total + largest)) / total
    return losses, logits.mul_(scale).scatter_add_(1, target, -counts.float())


def _losses_for_compile(
    logits: torch.Tensor, target: torch.Tensor, with_gradient: bool, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same as `_losses_in_place`, written for torch.compile.

    torch.compile fuses this into two passes over the logits, and keeps nothing in float32 in between.
    """
    wide, counts = logits.float(), target != IGNORE_INDEX
    target = target.clamp(min=0)
    log_total = torch.logsumexp(wide, 1, keepdim=True)
    losses = torch.where(counts, log_total - wide.gather(1, target), 0.0)[:, 0]
    if not with_gradient:
        return losses, None
    is_target = torch.arange(logits.shape[1], device=logits.device) == target
    gradient = (wide - log_total).exp() * (1 + 2 * z_loss * log_total) - is_target.float()
    return losses, torch.where(counts, gradient, 0.0).to(logits.dtype)


@functools.cache
def _compiled_losses() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    return torch.compile(_losses_for_compile)


@functools.cache
def _has_triton(device: str) -> bool:
    from torch.utils._triton import has_triton

    return device == "cuda" and has_triton()


def _add_gradients(
    gradients: list[torch.Tensor | None],
    chunk: slice,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    grad_logits: torch.Tensor,
) -> None:
    hidden_grad, weight_grad, bias_grad = gradients
    if bias_grad is not None:
        bias_grad.add_(grad_logits.sum(0))
    grad_logits = grad_logits.to(weight.dtype)
    if hidden_grad is not None:
        hidden_grad[chunk] = grad_logits @ weight
    if weight_grad is None:
        return
    if weight_grad.dtype == weight.dtype:
        weight_grad.addmm_(grad_logits.T, inputs)
        return
    if grad_logits.is_cuda and torch.version.cuda:  # cuBLAS multiplies in 16 bits and adds to float32
        torch.addmm(weight_grad, grad_logits.T, inputs, out_dtype=torch.float32, out=weight_grad)
        return
    # On other devices the product needs memory of its own before it is added, so it is computed for a part of the
    # vocabulary at a time.
    parts = zip(weight_grad.split(_VOCABULARY_ROWS), grad_logits.split(_VOCABULARY_ROWS, dim=1), strict=True)
    for rows, logits in parts:
        rows.add_(logits.T @ inputs)
