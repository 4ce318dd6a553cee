"""Score any checkpoint folder or Hub id on a recipe's validation split or on a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfpretrain import corpus, evaluation
from hfpretrain.dataloader import collate
from hfpretrain.loss import IGNORE_INDEX, use_chunked_loss
from hfpretrain.model import isolates_documents
from hfpretrain.recipe import Recipe, RecipeError, SourceSection, TokenizerSection
from hfpretrain.tokenizer import Encoder, load_tokenizer, token_bytes


def evaluate_checkpoint(
    model: str,
    recipe: Recipe | None = None,
    data: str | None = None,
    *,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `model` on the recipe's validation documents or the file `data`.

    Documents are joined as in training, one EOS after each. `stride` < `block_size` slides the window, so that every
    token has at least `block_size - stride` tokens of context where the document has them. Attention ends at document
    boundaries where the model isolates and the recipe does not forbid it; the result says so.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(TokenizerSection(pretrained=model))
    try:
        network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    except Exception as error:  # a broken file may raise anything
        raise RecipeError.at("model", f"cannot load {model!r}: {(str(error).splitlines() or [''])[0]}") from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    network.to(device)
    context = getattr(network.config, "max_position_embeddings", None) or 1024
    if block_size is None:
        block_size = recipe.data.block_size if recipe else min(context, 1024)
    stride = block_size if stride is None else stride
    if batch_size < 1:
        raise RecipeError.at("--batch-size", f"{batch_size} must be at least 1")
    if not 1 <= stride <= block_size:
        raise RecipeError.at("--stride", f"{stride} must be between 1 and the block size {block_size}")
    if block_size < 2 or block_size > context:
        raise RecipeError.at("--block-size", f"{block_size} must be between 2 and the model's context {context}")
    wanted = recipe.training.document_masking if recipe else "auto"
    masking = wanted is not False and isolates_documents(network)
    use_chunked_loss(network, "auto")
    stream, num_documents, num_bytes = _stream(tokenizer, _documents(recipe, data))
    table = token_bytes(tokenizer, network.config.vocab_size)
    batches = _batches(stream, block_size, stride, batch_size, tokenizer.eos_token_id, masking)
    sums = evaluation.loss_sums(network, batches, torch.from_numpy(table).to(device))
    result = evaluation.figures(sums, num_bytes / max(1, int(table[stream].sum())))
    return {
        **result,
        "documents": num_documents,
        "bytes": num_bytes,
        "block_size": block_size,
        "stride": stride,
        "document_masking": masking,
    }


def _documents(recipe: Recipe | None, data: str | None) -> Iterator[str]:
    if recipe is not None:
        if not recipe.data.has_validation:
            raise RecipeError.at("data", "the recipe holds no validation text out")
        return corpus.validation_documents(recipe.data)
    assert data is not None
    if not Path(data).exists():
        raise RecipeError.at("--data", f"no such file: {data}")
    suffixes = [suffix for suffix in Path(data).suffixes if suffix not in (".gz", ".zst", ".xz", ".bz2")]
    if suffixes[-1:] not in ([".txt"], [".jsonl"], [".json"]):
        raise RecipeError.at("--data", f"{data} is neither a .txt nor a .jsonl file")
    is_text = suffixes[-1] == ".txt"
    source = SourceSection(
        path="text" if is_text else "json", data_files=data, sample_by="document" if is_text else None
    )
    return (document.text for document in corpus.Reader(source, "--data").read() if document.text)


def _stream(tokenizer: Any, documents: Iterator[str]) -> tuple[np.ndarray, int, int]:
    """All tokens, int64 (n,), with the number of documents and their UTF-8 bytes."""
    encode = Encoder(tokenizer, np.dtype(np.int64))
    ids: list[np.ndarray] = []
    num_bytes = 0
    for text in documents:
        ids += encode([text])
        num_bytes += len(text.encode("utf-8", "surrogatepass"))
    if not ids:
        raise RecipeError.at("data", "there is no text to evaluate on")
    return np.concatenate(ids), len(ids), num_bytes


def _batches(
    stream: np.ndarray, block_size: int, stride: int, batch_size: int, eos_token_id: int, masking: bool
) -> Iterator[dict[str, torch.Tensor]]:
    windows = list(evaluation.sliding_windows(stream, block_size, stride, eos_token_id))
    for start in range(0, len(windows), batch_size):
        rows, scored = (np.stack(part) for part in zip(*windows[start : start + batch_size], strict=True))
        batch = collate(rows, eos_token_id if masking else None)
        batch["labels"][torch.from_numpy(~scored)] = IGNORE_INDEX
        yield batch
