"""Loss, perplexity and bits per byte: sums over tokens for each document, divided once at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hfpretrain.data.batches import collate
from hfpretrain.modeling.loss import token_losses
from hfpretrain.modeling.structure import eval_mode
from hfpretrain.recipe.labels import IGNORE_INDEX

DOCUMENTS = "documents"
"""Key in a batch for the number of each label's document, int64 (batch, length)."""
_INTERVAL = 0.95
_NUM_RESAMPLES = 1000
MAX_GROUPS = 20_000
"""The largest number of groups of documents that is drawn from."""


@dataclass(frozen=True)
class Sums:
    """Sums over scored labels, float64. Those of several processes may be added."""

    documents: torch.Tensor
    """(documents, 4): nll in nats, tokens, the nll of the tokens that are text, the UTF-8 bytes of those tokens."""
    contexts: torch.Tensor
    """(buckets, 2): nll and tokens of the predictions that see from 2^bucket to 2^(bucket + 1) - 1 tokens."""
    ranges: torch.Tensor
    """(edges, 2): nll and tokens of the predictions that see less than an edge and not less than the one before."""


def scored_batch(
    ids: np.ndarray, documents: np.ndarray, scored: np.ndarray, *, eos_token_id: int | None, eos_before_bos: int | None
) -> dict[str, torch.Tensor]:
    """A batch for `loss_sums`, of token ids, the number of each token's document, and whether a token is scored.

    The three have the shape (batch, length). For `eos_token_id` and `eos_before_bos` see `batches.collate`.
    """
    batch = collate(ids, eos_token_id, eos_before_bos=eos_before_bos)
    batch["labels"][torch.from_numpy(~scored)] = IGNORE_INDEX
    return {**batch, DOCUMENTS: torch.from_numpy(documents)}


def _model_inputs(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items() if name not in ("labels", DOCUMENTS)}


@torch.no_grad()
def predictions(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token at each position but the first, and the label there: two int64 (batch, length - 1).

    The model is called with one row at a time, so that only one row's logits are in memory.
    """
    inputs = _model_inputs(batch, device)
    with eval_mode(model):
        rows = [
            model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}, use_cache=False).logits.argmax(-1)
            for row in range(len(batch["labels"]))
        ]
    return torch.cat(rows)[:, :-1], batch["labels"].to(device)[:, 1:]


@torch.no_grad()
def loss_sums(
    model: Any,
    batches: Iterable[dict[str, torch.Tensor]],
    token_bytes: torch.Tensor,
    num_documents: int,
    edges: Sequence[int] = (),
) -> Sums:
    """Sums over all labels that are not -100, on the device of `token_bytes`.

    `batches`: see `scored_batch`. `token_bytes`: int64 (vocabulary,), 0 for special tokens. `edges`: numbers of tokens
    that divide the predictions by how many tokens they see, the last one larger than all, see `Sums.ranges`. The logits
    are never all in memory if the model computes its loss in chunks.
    """
    device = token_bytes.device
    ranges = torch.zeros(len(edges), 2, dtype=torch.float64, device=device)
    borders = torch.tensor(edges, dtype=torch.int64, device=device)
    documents = torch.zeros(num_documents, 4, dtype=torch.float64, device=device)
    contexts = torch.zeros(64, 2, dtype=torch.float64, device=device)
    with eval_mode(model):
        for batch in batches:
            inputs = _model_inputs(batch, device)
            labels = batch["labels"].to(device)
            nll, labels = token_losses(model, inputs, labels).double(), labels[:, 1:]
            valid = labels != IGNORE_INDEX
            nll, labels = nll[valid], labels[valid]
            ones, num_bytes = torch.ones_like(nll), token_bytes[labels]
            rows = torch.stack([nll, ones, nll * (num_bytes > 0), num_bytes.double()], dim=1)
            documents.index_add_(0, batch[DOCUMENTS].to(device)[:, 1:][valid], rows)
            positions = inputs.get("position_ids")
            if positions is None:
                positions = torch.arange(valid.shape[1] + 1, device=device).expand(len(valid), -1)
            seen = positions[:, :-1][valid] + 1
            contexts.index_add_(0, seen.double().log2().long(), rows[:, :2])
            if edges:
                ranges.index_add_(0, torch.bucketize(seen, borders, right=True), rows[:, :2])
    return Sums(documents, contexts, ranges)


def perplexity_figures(nll: float, tokens: int, content_nll: float, num_bytes: float) -> dict[str, float]:
    """`loss` in nats per token, `perplexity` and `bits_per_byte`, from sums over tokens.

    `content_nll`: the part of `nll` that comes from tokens which are text; `num_bytes`: their UTF-8 bytes.
    """
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": content_nll / (num_bytes * math.log(2)) if num_bytes else math.nan,
    }


def figures(documents: np.ndarray) -> dict[str, Any]:
    """Loss (nats per token), perplexity, bits_per_byte, tokens and documents.

    `documents`: float64 (documents, 4), same as `Sums.documents`. Each of the first three has a 95% confidence
    interval, by bootstrap over documents (percentiles; Efron and Tibshirani 1993, chapter 13), which is None if there
    is only one document.
    """
    nll, tokens, content_nll, num_bytes = documents.sum(axis=0).tolist()
    scored = documents[documents[:, 1] > 0]
    result: dict[str, Any] = perplexity_figures(nll, int(tokens), content_nll, num_bytes)
    result |= {"tokens": int(tokens), "documents": len(scored)}
    intervals: dict[str, Any] = {"loss": None, "perplexity": None, "bits_per_byte": None}
    if len(scored) > 1:
        totals = resample(scored)
        losses = percentiles(totals[:, 0] / totals[:, 1])
        intervals |= {"loss": losses, "perplexity": [math.exp(min(loss, 700.0)) for loss in losses]}
        if num_bytes:
            totals = totals[totals[:, 3] > 0]
            intervals["bits_per_byte"] = percentiles(totals[:, 2] / totals[:, 3] / math.log(2))
    return result | {f"{name}_interval": bounds for name, bounds in intervals.items()}


def figures_of_sets(sets: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`figures` of each set of documents, with `NAME/` before each key."""
    return {f"{name}/{key}": value for name, documents in sets.items() for key, value in figures(documents).items()}


def bits_per_byte_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, list[float] | None] | None:
    """The difference a - b in bits per byte and its 95% interval, by bootstrap over pairs of documents.

    `a`, `b`: float64 (documents, 2), the nll and the bytes of the text of the same documents, by two models. Documents
    without bytes in either are left out. The interval is None if one document is left. None if none is left.
    """
    pairs = np.concatenate([a, b], axis=1)
    pairs = pairs[(pairs[:, 1] > 0) & (pairs[:, 3] > 0)]
    if not len(pairs):
        return None
    interval = percentiles(_difference(resample(pairs))) if len(pairs) > 1 else None
    return float(_difference(pairs.sum(axis=0))), interval


def _difference(pairs: np.ndarray) -> Any:
    return (pairs[..., 0] / pairs[..., 1] - pairs[..., 2] / pairs[..., 3]) / math.log(2)


def resample(documents: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums over documents drawn with replacement, 1,000 times: float64 (documents, n) to (1000, n).

    More than 20,000 documents are first divided at random into 20,000 groups, and groups are drawn.
    """
    generator = np.random.default_rng(seed)
    if len(documents) > MAX_GROUPS:
        grouped = np.zeros((MAX_GROUPS, documents.shape[1]))
        np.add.at(grouped, generator.permutation(len(documents)) % MAX_GROUPS, documents)
        documents = grouped
    probabilities = np.full(len(documents), 1 / len(documents))
    return np.concatenate(
        [generator.multinomial(len(documents), probabilities, size=50) @ documents for _ in range(_NUM_RESAMPLES // 50)]
    )


def percentiles(values: np.ndarray) -> list[float]:
    """Bounds of the middle 95% of `values`, float64 (n,)."""
    tail = 100 * (1 - _INTERVAL) / 2
    return [float(value) for value in np.percentile(values, (tail, 100 - tail))]


def context_edges(block_sizes: Sequence[int]) -> list[int]:
    """Numbers of tokens that divide the contexts of a run with several block sizes; empty if it has a single one.

    They are the block sizes, and the smallest one doubled as often as the largest one allows. A prediction within a
    block of n tokens sees less than n.
    """
    smallest, largest = min(block_sizes), max(block_sizes)
    if smallest == largest:
        return []
    doubled = [smallest * 2**power for power in range((largest // smallest).bit_length())]
    return sorted({*block_sizes, *doubled})


def loss_in_ranges(ranges: np.ndarray, edges: Sequence[int]) -> dict[str, float]:
    """Loss by the number of tokens that a prediction sees, between `edges`: `1-255`, `256-511`, ...

    `ranges`: float64 (edges, 2), same as `Sums.ranges`. A range without predictions is left out.
    """
    firsts = [1, *edges][: len(edges)]
    return {
        f"{first}-{edge - 1}": float(nll / tokens)
        for first, edge, (nll, tokens) in zip(firsts, edges, ranges, strict=True)
        if tokens
    }


def loss_by_context(contexts: np.ndarray) -> dict[str, float]:
    """Loss by the number of tokens before a prediction, in ranges of powers of two: `1`, `2-3`, `4-7`, ..."""
    return {
        f"{2**bucket}-{2 ** (bucket + 1) - 1}" if bucket else "1": float(nll / tokens)
        for bucket, (nll, tokens) in enumerate(contexts)
        if tokens
    }
