"""Token-weighted loss, perplexity and bits per byte: sums over tokens by document, divided once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hfpretrain.evaluation.token_perplexity import TokenPerplexity
from hfpretrain.modeling.loss import token_losses
from hfpretrain.recipe.labels import IGNORE_INDEX

DOCUMENTS = "documents"
"""Key of a batch: int64 (batch, length), the number of the document that each label is of."""
_INTERVAL = 0.95
_RESAMPLES = 1000
_MAX_UNITS = 20_000


@dataclass(frozen=True)
class Sums:
    """Sums over scored labels, float64. Those of several processes may be added."""

    documents: torch.Tensor
    """(documents, 4): nll in nats, tokens, the nll of tokens that are text, bytes that those spell."""
    contexts: torch.Tensor
    """(buckets, 2): nll and tokens of predictions from 2^bucket to 2^(bucket + 1) - 1 tokens."""


@torch.no_grad()
def predictions(model: Any, batch: dict[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest token at each place but the first, and the label there: two int64 (batch, length - 1).

    One row at a time: no more logits than a sequence's are in memory.
    """
    training = model.training
    model.eval()
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name not in ("labels", DOCUMENTS)}
    rows = [
        model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}, use_cache=False).logits.argmax(-1)
        for row in range(len(batch["labels"]))
    ]
    model.train(training)
    return torch.cat(rows)[:, :-1], batch["labels"].to(device)[:, 1:]


@torch.no_grad()
def loss_sums(
    model: Any, batches: Iterable[dict[str, torch.Tensor]], token_bytes: torch.Tensor, num_documents: int
) -> Sums:
    """Sums over all labels that are not -100, on the device of `token_bytes`.

    `batches` as of `dataloader.collate`, with `DOCUMENTS`; `token_bytes`: int64 (vocabulary,), 0 for special tokens. A
    label is scored with the logits of the position before it, in float32, which are never whole where the model's loss
    is chunked.
    """
    device = token_bytes.device
    documents = torch.zeros(num_documents, 4, dtype=torch.float64, device=device)
    contexts = torch.zeros(64, 2, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for batch in batches:
        others = ("labels", DOCUMENTS)
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name not in others}
        labels = batch["labels"].to(device)
        nll, labels = token_losses(model, inputs, labels).double(), labels[:, 1:]
        valid = labels != IGNORE_INDEX
        nll, labels = nll[valid], labels[valid]
        ones, num_bytes = torch.ones_like(nll), token_bytes[labels]
        rows = torch.stack([nll, ones, nll * (num_bytes > 0), num_bytes.double()], dim=1)
        documents.index_add_(0, batch[DOCUMENTS].to(device)[:, 1:][valid], rows)
        seen = inputs.get("position_ids")
        if seen is None:
            seen = torch.arange(valid.shape[1] + 1, device=device).expand(len(valid), -1)
        bucket = (seen[:, :-1][valid] + 1).double().log2().long()
        contexts.index_add_(0, bucket, rows[:, :2])
    model.train(training)
    return Sums(documents, contexts)


def figures(documents: np.ndarray) -> dict[str, Any]:
    """Loss (nats per token), perplexity, bits_per_byte, tokens and documents, float64 (documents, 4) as of `Sums`.

    With them the intervals that hold 95 % of what the figures would be over other documents of the same kind: the
    bootstrap's percentiles (Efron and Tibshirani 1993, chapter 13), None of a single document.
    """
    nll, tokens, content_nll, num_bytes = documents.sum(axis=0).tolist()
    result = TokenPerplexity(keep_in_memory=True).compute(
        nll=[nll], tokens=[int(tokens)], content_nll=[content_nll], bytes=[num_bytes]
    )
    scored = documents[documents[:, 1] > 0]
    result |= {"tokens": int(tokens), "documents": len(scored)}
    low_high: dict[str, Any] = {"loss": None, "perplexity": None, "bits_per_byte": None}
    if len(scored) > 1:
        totals = resampled(scored)
        losses = percentiles(totals[:, 0] / totals[:, 1])
        low_high |= {"loss": losses, "perplexity": [math.exp(min(loss, 700.0)) for loss in losses]}
        if num_bytes:
            totals = totals[totals[:, 3] > 0]
            low_high["bits_per_byte"] = percentiles(totals[:, 2] / totals[:, 3] / math.log(2))
    return result | {f"{name}_interval": bounds for name, bounds in low_high.items()}


def resampled(documents: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sums over documents drawn with replacement, 1,000 times: float64 (documents, n) to (1000, n).

    Of more than 20,000 documents groups are drawn, each of documents taken at random.
    """
    draw = np.random.default_rng(seed)
    if len(documents) > _MAX_UNITS:
        grouped = np.zeros((_MAX_UNITS, documents.shape[1]))
        np.add.at(grouped, draw.permutation(len(documents)) % _MAX_UNITS, documents)
        documents = grouped
    share = np.full(len(documents), 1 / len(documents))
    return np.concatenate(
        [draw.multinomial(len(documents), share, size=50) @ documents for _ in range(_RESAMPLES // 50)]
    )


def percentiles(values: np.ndarray) -> list[float]:
    """Bounds of the middle 95 % of `values`, float64 (n,)."""
    tail = 100 * (1 - _INTERVAL) / 2
    return [float(value) for value in np.percentile(values, (tail, 100 - tail))]


def loss_by_context(contexts: np.ndarray) -> dict[str, float]:
    """Loss by how many tokens the prediction is made from, in powers of two: `1`, `2-3`, `4-7`, ..."""
    return {
        f"{2**bucket}-{2 ** (bucket + 1) - 1}" if bucket else "1": float(nll / tokens)
        for bucket, (nll, tokens) in enumerate(contexts)
        if tokens
    }
