"""Token-weighted loss, perplexity and bits per byte: sums over tokens, divided once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from hfpretrain.loss import IGNORE_INDEX, token_losses
from hfpretrain.token_perplexity import TokenPerplexity


@torch.no_grad()
def loss_sums(model: Any, batches: Iterable[dict[str, torch.Tensor]], token_bytes: torch.Tensor) -> torch.Tensor:
    """Sums over all labels that are not -100: nll, tokens, content nll, bytes; float64 (4,) on the model's device.

    `batches` as of `dataloader.collate`; `token_bytes`: int64 (vocabulary,), 0 for special tokens. A label is scored
    with the logits of the position before it, in float32. Sums of several processes may be added.
    """
    device = token_bytes.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"].to(device)
        nll, labels = token_losses(model, inputs, labels).double(), labels[:, 1:]
        valid = labels != IGNORE_INDEX
        num_bytes = torch.where(valid, token_bytes[labels.clamp(min=0)], 0)
        sums += torch.stack([nll.sum(), valid.sum().double(), nll[num_bytes > 0].sum(), num_bytes.sum().double()])
    model.train(training)
    return sums


def figures(sums: torch.Tensor, bytes_per_token_byte: float = 1.0) -> dict[str, float]:
    """Loss (nats per token), perplexity, bits_per_byte, tokens of `loss_sums`.

    `bytes_per_token_byte` corrects for tokenizers that normalize text: true bytes of a split / bytes its tokens spell.
    """
    nll, tokens, content_nll, num_bytes = sums.tolist()
    result = TokenPerplexity(keep_in_memory=True).compute(
        nll=[nll], tokens=[int(tokens)], content_nll=[content_nll], bytes=[num_bytes * bytes_per_token_byte]
    )
    return {**result, "tokens": int(tokens)}


def sliding_windows(
    stream: np.ndarray, block_size: int, stride: int, pad_id: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows of `block_size` that advance by `stride` <= block_size: (rows, scored), int64 and bool (block_size,).

    Every token of `stream` is scored in the first window that holds it, so with more context the smaller the stride.
    With `stride == block_size` these are the blocks of training, whose first token has no context and no score.
    """
    end = 0
    for start in range(0, max(1, len(stream) - block_size + stride), stride):
        window = stream[start : start + block_size]
        row = np.full(block_size, pad_id, dtype=np.int64)
        row[: len(window)] = window
        index = start + np.arange(block_size)
        yield row, (index >= end) & (index < start + len(window))
        end = start + len(window)
        if end >= len(stream):
            return
