"""The next-token loss inside the output embedding, a chunk of tokens at a time: the logits are never whole."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear, pad

from hfpretrain.modeling.structure import causal_lm
from hfpretrain.recipe.labels import IGNORE_INDEX

_MIN_CHUNK_LOGITS = 2**22  # 16 MiB in float32; below it kernel launches cost more than memory
_ROWS = 2**14


def chunk_tokens(num_tokens: int, vocab_size: int, fused: bool = False) -> int:
    """How many of a micro-batch's tokens have their logits in memory at once: a sixteenth, or 16 MiB if that is more.

    Each chunk reads and writes the whole gradient of the head, so more chunks would save little memory and cost time.
    `fused`: as of `_fusible`, which needs half as much for each.
    """
    return max(-(-num_tokens // (8 if fused else 16)), _MIN_CHUNK_LOGITS // vocab_size)


def token_losses(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """-log p of every label but the first, given what stands before it; 0 where it is -100. Without gradients.

    `inputs`: the model's keywords but labels; `labels`: int64 (batch, length). Returns float32 (batch, length - 1). The
    logits are never whole where `use_chunked_loss` holds.
    """
    with torch.no_grad():
        if is_chunked(model):
            return model(**inputs, labels=labels, use_cache=False).logits[:, :-1, 0]
        logits = model(**inputs, use_cache=False).logits
        rows = zip(logits[:, :-1], labels[:, 1:], strict=True)
        return torch.stack([cross_entropy(row.float(), wanted, reduction="none") for row, wanted in rows])


def is_chunked(model: Any) -> bool:
    """Whether `use_chunked_loss` holds for a model, wrapped by an engine or not; else labels materialise all logits."""
    return hasattr(causal_lm(model).get_output_embeddings(), "chunked_loss")


@dataclass(frozen=True)
class StepLoss:
    """How a step's next-token loss is computed with the model's class, as `examine_loss` has found out."""

    from_logits: bool = False
    """Whether to compute the loss from the logits, since the class computes another (BART's decoder learns to copy)."""
    coefficient: float = 0.0
    """Weight with which the class adds its output `aux_loss`, a router's balancing loss."""
    adds_own: bool = False
    """Whether the class adds a loss that does not depend on the labels and is none of its outputs (Bamba's z-loss)."""

    def __call__(
        self, model: Any, batch: dict[str, torch.Tensor], num_items: torch.Tensor, num_micro_batches: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This micro-batch's share of the step's loss, and what to minimize: two float32 ().

        `batch` as of `dataloader.collate`; `num_items`: the step's labels on all processes, int64 (). What a class adds
        to the next token's loss is a mean over the micro-batch, so it is divided by `num_micro_batches`, those of the
        step on all processes.
        """
        if self.from_logits:
            inputs = {name: tensor for name, tensor in batch.items() if name not in ("labels", "shift_labels")}
            outputs = model(**inputs, use_cache=False)
            loss = summed_loss(outputs.logits, batch) / num_items
        else:
            outputs = model(**batch, use_cache=False, num_items_in_batch=num_items)
            loss = outputs.loss
        if self.adds_own:
            share = summed_loss(outputs.logits, batch) / num_items
            return share, share + (loss - share) / num_micro_batches
        auxiliary = getattr(outputs, "aux_loss", None) if self.coefficient else None
        if auxiliary is None:
            return loss, loss
        auxiliary = self.coefficient * auxiliary
        if not self.from_logits:
            loss = loss - auxiliary
        return loss, loss + auxiliary / num_micro_batches

    @property
    def balances(self) -> bool:
        """Whether anything but the next token's loss is minimized."""
        return self.adds_own or self.coefficient != 0

    def note(self, name: str) -> str | None:
        """What to tell of a class called `name` that does not train on its own loss as it is."""
        if self.from_logits:
            return f"{name} does not compute the next-token loss of a whole step, so it is computed from the logits"
        if self.adds_own:
            return f"{name} adds a loss of its own to the next token's: its mean over a step's micro-batches is used"
        return None


def summed_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The next-token loss of a batch, float32 (), not divided. `logits` are what the model returned: where the loss is
    computed in its head, they are losses already."""
    targets = batch.get("shift_labels")
    if targets is None:
        targets = pad(batch["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
    if logits.shape[-1] == 1:
        return logits.sum()
    logits = logits.float().flatten(0, -2)
    return cross_entropy(logits, targets.flatten().to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


def can_chunk(model: Any) -> bool:
    """Whether the loss can be computed in a model's output embedding, if the model does nothing behind it."""
    return isinstance(causal_lm(model).get_output_embeddings(), torch.nn.Linear)


@contextmanager
def installed(network: Any) -> Iterator[None]:
    """Within, the loss is computed as `install` says; afterwards as before."""
    undo = install(network)
    try:
        yield
    finally:
        undo()


def install(network: Any, z_loss: float = 0.0) -> Callable[[], None]:
    """Compute the loss in the forward of the head, the only place where every engine has its weight at hand.

    What the head returns, loss instead of logits, float32 (..., 1), passes through the model to its `loss_function`,
    which divides. Only instances are changed.
    """
    head = network.get_output_embeddings()
    plain, loss_function = head.forward, network.loss_function
    patched = vars(head).get("forward")  # by tensor parallelism
    pending: list[torch.Tensor] = []  # the targets of the model's forward in progress

    def remember(_: Any, args: Any, keywords: dict[str, Any]) -> None:
        pending.clear()
        labels, targets = keywords.get("labels"), keywords.get("shift_labels")
        if labels is not None:
            pending.append(pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:] if targets is None else targets)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if not pending:
            return plain(hidden)
        if hasattr(head.weight, "placements"):
            raise ValueError("the output embedding is divided between processes")
        return head_loss(hidden, head.weight, head.bias, pending.pop(), z_loss=z_loss)

    def divide(logits: Any, labels: Any, vocab_size: Any, num_items_in_batch: Any = None, **_: Any) -> torch.Tensor:
        num_items = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return logits.sum() / num_items

    hook = network.register_forward_pre_hook(remember, with_kwargs=True)
    # A chunk's work is a few large kernels: compiling the loop would only unroll it.
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
) -> torch.Tensor:
    """Cross entropy of a linear head, float32: its sum (1, 1, 1) with gradients, else of each token (batch, length, 1).

    `hidden`: (batch, length, hidden); `weight`: (vocabulary, hidden); `targets`: int64 (batch, length), of which -100
    does not count. Products are in the weight's dtype or autocast's, the rest is in float32. `num_tokens` in a chunk.
    The gradients are those of the sum and `z_loss` times the squared logarithm of each softmax's denominator.

    In place of `torch.nn.functional.linear_cross_entropy`, whose loss and sums over chunks are in bf16 if the input is
    (torch 2.13), and whose chunks of tokens * hidden / vocabulary are slower the larger the vocabulary.
    """
    num_tokens = num_tokens or chunk_tokens(targets.numel(), len(weight), _has_triton(hidden.device.type))
    inputs = (hidden.flatten(0, 1), weight, bias, targets.flatten(), num_tokens)
    if torch.is_grad_enabled():
        total: torch.Tensor = _SummedLoss.apply(*inputs, z_loss)
        return total
    return _token_losses(*inputs).view(*targets.shape, 1).clone()  # FSDP2 warns of a module that returns a view


class _SummedLoss(torch.autograd.Function):
    """The sum's gradients are those of its forward times a number, so they are computed there, chunk by chunk."""

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
        sums = (hidden.dtype, torch.float32, torch.float32)  # a row of hidden has its gradient from one chunk alone
        ctx.gradients = [
            torch.zeros_like(tensor, dtype=dtype) if tensor is not None and needed else None
            for tensor, dtype, needed in zip(inputs, sums, ctx.needs_input_grad[:3], strict=True)
        ]
        losses = _token_losses(hidden, weight, bias, targets, num_tokens, ctx.gradients, z_loss)
        return losses.sum().view(1, 1, 1).clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: good for one backward
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
) -> torch.Tensor:
    """-log p of each target, float32 (tokens,); `gradients` as of `head_loss` are added for hidden, weight, bias."""
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
            softmax = _compiled() if _has_triton(device) else _in_place
            losses[chunk], grad_logits = softmax(logits, target, gradients is not None, z_loss)
            if gradients is not None and grad_logits is not None:
                _add_gradients(gradients, chunk, inputs, weight, grad_logits)
    return losses


def _in_place(
    logits: torch.Tensor, target: torch.Tensor, with_gradient: bool, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-log p of `target`, int64 (tokens, 1), and the gradient of the logits: softmax less 1 at the target, and with a
    `z_loss` softmax * 2 * z_loss * its log-denominator more. Both are 0 where the target is -100. A float32 `logits` is
    used up."""
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


def _fusible(
    logits: torch.Tensor, target: torch.Tensor, with_gradient: bool, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `_in_place`, for a compiler: two passes over the logits, the gradient in their dtype and nothing in between,
    where single kernels make a dozen passes in float32."""
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
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    return torch.compile(_fusible)


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
    if grad_logits.is_cuda and torch.version.cuda:  # its products in 16 bits add to float32 as they are made
        torch.addmm(weight_grad, grad_logits.T, inputs, out_dtype=torch.float32, out=weight_grad)
        return
    # Elsewhere such a product is a copy before it is added: for a part of the vocabulary at a time it is a small one.
    for rows, logits in zip(weight_grad.split(_ROWS), grad_logits.split(_ROWS, dim=1), strict=True):
        rows.add_(logits.T @ inputs)
