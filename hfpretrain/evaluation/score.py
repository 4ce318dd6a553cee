"""Perplexity, bits per byte and lm-eval's tasks for any causal LM; comparing two checkpoints on the same text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hfpretrain.data.encode import Encoder, token_bytes, unknown_id
from hfpretrain.data.prepared import PreparedData
from hfpretrain.evaluation import lm_eval_tasks, sums
from hfpretrain.evaluation.checkpoint import load_checkpoint, require_embedded
from hfpretrain.evaluation.texts import Texts, checked_texts, recipe_texts
from hfpretrain.evaluation.validation import ValidationSets
from hfpretrain.modeling.checks import explain_leak, keep_documents_apart, use_chunked_loss
from hfpretrain.modeling.structure import eval_mode
from hfpretrain.recipe.schema import DataSection, LmEvalSection, Recipe, RecipeError, TrainingSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Windows:
    """How text is cut into windows for a model."""

    block_size: int | None = None
    """Tokens of a window; None: the model's context up to 1,024."""
    stride: int | None = None
    """Tokens by which a window advances; None: the block size, so that windows don't overlap."""
    batch_size: int = 8
    document_masking: bool = True
    """Whether attention ends at document boundaries, if the model supports it."""

    def as_trained(self, data: DataSection, training: TrainingSection) -> Windows:
        """These windows, with the recipe's block size if they have none, and with the recipe's document masking."""
        block_size = data.longest_block_size if self.block_size is None else self.block_size
        masking = self.document_masking and training.document_masking is not False
        return replace(self, block_size=block_size, document_masking=masking)


@dataclass(frozen=True)
class Score:
    """The report of `evaluate_checkpoint`, and the sums of each document."""

    documents: np.ndarray
    """As in `sums.Sums`, but with the bytes of the text instead of those of the tokens."""
    report: dict[str, Any]


def evaluate_perplexity(
    model: str | Path | PreTrainedModel,
    texts: Recipe | Sequence[str] | Mapping[str, Sequence[str]],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    block_size: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Loss (nats per token), perplexity and bits per byte of a model on whole documents, with 95% intervals.

    `model`: a folder, a Hub id, or a causal LM in memory with its fast `tokenizer`; it stays on its device and in its
    dtype. `texts`: a list of documents; a mapping from names to lists, for figures of each and of all; or a recipe, for
    its validation text. `block_size`: in tokens, by default that of the recipe, or else the model's context up to
    1,024. `stride`: in tokens, by default the block size, so that windows don't overlap. The report is that of
    `hfpretrain evaluate`. Raises `RecipeError` if there is nothing to score or the model can't be loaded.
    """
    if isinstance(texts, str):
        raise RecipeError.at("texts", "is a single string; give a list of documents")
    windows = Windows(block_size, stride, batch_size)
    if isinstance(texts, Recipe):
        documents, windows = recipe_texts(texts.data), windows.as_trained(texts.data, texts.training)
    else:
        documents = checked_texts(texts if isinstance(texts, Mapping) else {"": texts})
    if isinstance(model, (str, Path)):
        return evaluate_checkpoint(str(model), documents, windows)
    if tokenizer is None:
        raise RecipeError.at("tokenizer", "is missing; pass the tokenizer of the model that you pass")
    if tokenizer.eos_token_id is None:
        raise RecipeError.at("tokenizer", "has no EOS token, which must end every document; set one")
    with eval_mode(model):  # dropout would look as if documents affected each other
        return _score_network(tokenizer, model, documents, windows).report


def evaluate_checkpoint(model: str, texts: Texts, windows: Windows) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `model` on all `texts`, and on each set if there are several.

    The documents of a set are joined as in training: each begins with the tokens that calling the tokenizer adds, and
    ends with EOS. A document longer than a window continues in the next one. With a `stride` less than the
    `block_size`, every token sees at least `block_size - stride` tokens of its document, if it has that many. The
    report's `document_masking` says whether attention ended at document boundaries.
    """
    return _score(model, texts, windows).report


def evaluate_prepared(
    model: str, prepared: PreparedData, *, batch_size: int, document_masking: bool
) -> dict[str, dict[str, Any]]:
    """Loss, perplexity and bits per byte of `model` on the validation sets of prepared data, by domain.

    The blocks are those of the evaluations during training. The key "" means all sets together.
    """
    tokenizer, network = load_checkpoint(model)
    use_chunked_loss(network, "auto")
    sets, block_size = ValidationSets(prepared), prepared.manifest["block_size"]
    leak = keep_documents_apart(network, block_size) if document_masking else None
    if leak is not None:
        message = f"the run kept documents apart, which can't be done here: {explain_leak(network, block_size, leak)}"
        raise RecipeError.at("model", message)
    table = torch.from_numpy(token_bytes(tokenizer, network.config.vocab_size)).to(network.device)
    batches = sets.batches(batch_size=batch_size, process_index=0, num_processes=1, document_masking=document_masking)
    found = sums.loss_sums(network, batches, table, sets.num_documents)
    by_domain: dict[str, dict[str, Any]] = {}
    for key, value in sets.figures(found.documents.cpu().numpy()).items():
        domain, _, figure = key.rpartition("/")
        by_domain.setdefault(domain, {})[figure] = value
    return by_domain


def compare_checkpoints(a: str, b: str, texts: Texts, windows: Windows) -> dict[str, Any]:
    """Score both models on the same documents, and compare their bits per byte, which don't depend on the tokenizers.

    The result has the difference a - b with its 95% interval over documents, and `wins_of_a`: the share of documents on
    which a has fewer bits. A document with equal bits counts half. If there are several sets of texts, the result has
    these figures for each of them, too: `NAME/bits_per_byte_difference` and so on.
    """
    scores = [_score(model, texts, windows) for model in (a, b)]
    for model, score in zip((a, b), scores, strict=True):
        if score.report["unknown_tokens"]:
            message = (
                f"the tokenizer of {model} gives {score.report['unknown_tokens']} unknown tokens, whose text it loses"
            )
            raise RecipeError.at("data", f"{message}, so bits per byte can't be compared; choose other text")
    bits = [score.documents[:, 2:] for score in scores]  # nll and bytes
    found: dict[str, Any] = {"a": {"model": a, **scores[0].report}, "b": {"model": b, **scores[1].report}}
    found |= _comparison("data", *bits)
    if len(texts) > 1:
        ends = np.cumsum([len(some) for some in texts.values()])[:-1]
        for name, *parts in zip(texts, *(np.split(part, ends) for part in bits), strict=True):
            found |= {f"{name}/{key}": value for key, value in _comparison(f"data.{name}", *parts).items()}
    return found


def _comparison(path: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """The figures of `compare_checkpoints` for documents, whose nll and bytes are `a` and `b`: float64 (documents, 2).

    `path`: names the documents in a message.
    """
    difference = sums.bits_per_byte_difference(a, b)
    if difference is None:
        raise RecipeError.at(path, "contains no document with tokens to score for both models")
    scored = (a[:, 1] > 0) & (b[:, 1] > 0)
    ours, theirs = (part[scored, 0] / part[scored, 1] for part in (a, b))
    return {
        "bits_per_byte_difference": difference[0],
        "bits_per_byte_difference_interval": difference[1],
        "wins_of_a": float((ours < theirs).mean() + (ours == theirs).mean() / 2),
        "documents": len(ours),
    }


def evaluate_tasks(model: str, section: LmEvalSection, batch_size: int) -> dict[str, Any]:
    """Run lm-eval's tasks on `model` in float32: `results` by task, `n-samples`, `n-shot`, `versions`."""
    tasks = lm_eval_tasks.Tasks(section, "--tasks")
    tokenizer, network = load_checkpoint(model)
    language_model = lm_eval_tasks.shared_language_model(
        network, tokenizer, network.device, batch_size, lm_eval_tasks.Processes()
    )
    return tasks.run(language_model)


def _score(model: str, texts: Texts, windows: Windows) -> Score:
    tokenizer, network = load_checkpoint(model)
    use_chunked_loss(network, "auto")
    return _score_network(tokenizer, network, texts, windows)


def _score_network(tokenizer: Any, network: Any, texts: Texts, windows: Windows) -> Score:
    device = network.device
    block_size, stride = _sizes(windows, getattr(network.config, "max_position_embeddings", None) or 1024)
    masking = windows.document_masking and keep_documents_apart(network, block_size) is None
    table = token_bytes(tokenizer, network.config.vocab_size)
    encode = Encoder(tokenizer, np.dtype(np.int64))
    streams = {
        name: [ids for text in some for ids in encode.for_source(getattr(text, "special_tokens", "text"))([text])]
        for name, some in texts.items()
    }
    num_documents = sum(map(len, streams.values()))
    for name, some in {"": [ids for part in streams.values() for ids in part], **streams}.items():
        if sum(map(len, some)) < 2:
            raise RecipeError.at(f"data.{name}" if name else "data", "contains no text to evaluate on")
    require_embedded(network, max(int(ids.max()) for some in streams.values() for ids in some if len(ids)))
    unknown = unknown_id(tokenizer)
    eos, has_prefix = tokenizer.eos_token_id, bool(encode.prefix)
    batches = _batches(streams, block_size, stride, windows.batch_size, eos, masking, has_prefix)
    found = sums.loss_sums(network, batches, torch.from_numpy(table).to(device), num_documents)
    documents = found.documents.cpu().numpy()
    num_bytes = np.array([len(t.encode("utf-8", "surrogatepass")) for some in texts.values() for t in some])
    bytes_of_tokens = np.array([table[ids].sum() for some in streams.values() for ids in some])
    documents[:, 3] *= num_bytes / np.maximum(1, bytes_of_tokens)  # a tokenizer that normalizes text changes its bytes
    report = sums.figures(documents)
    if not np.isfinite(report["loss"]):
        raise RecipeError.at("model", f"its loss is {report['loss']}, which is not a finite number")
    if len(texts) > 1:
        ends = np.cumsum([len(some) for some in streams.values()])[:-1]
        report |= sums.figures_of_sets(dict(zip(streams, np.split(documents, ends), strict=True)))
    context = f"blocks of {block_size} tokens" if stride == block_size else f"{block_size} tokens, sliding by {stride}"
    return Score(
        documents,
        {
            **report,
            "bytes": int(num_bytes.sum()),
            "unknown_tokens": sum(int((ids == unknown).sum()) for some in streams.values() for ids in some),
            "block_size": block_size,
            "stride": stride,
            "context": f"{context}; a longer document continues in the next",
            "document_masking": masking,
            "loss_by_context": sums.loss_by_context(found.contexts.cpu().numpy()),
        },
    )


def _sizes(windows: Windows, context: int) -> tuple[int, int]:
    """Block size and stride."""
    block_size = min(context, 1024) if windows.block_size is None else windows.block_size
    stride = block_size if windows.stride is None else windows.stride
    if windows.batch_size < 1:
        raise RecipeError.at("--batch-size", f"{windows.batch_size} must be at least 1")
    if not 1 <= stride <= block_size:
        raise RecipeError.at("--stride", f"{stride} must be between 1 and the block size {block_size}")
    if block_size < 2 or block_size > context:
        raise RecipeError.at("--block-size", f"{block_size} must be between 2 and the model's context {context}")
    return block_size, stride


def sliding_windows(length: int, block_size: int, stride: int) -> Iterator[tuple[int, int]]:
    """Windows of `block_size` tokens over `length` tokens, which advance by `stride`: (start, first scored position).

    Every token is scored in the first window that contains it, so a smaller stride gives it more context. With
    `stride == block_size` these are the blocks of training, whose first token has no context and is not scored.
    """
    end = 0
    for start in range(0, max(1, length - block_size + stride), stride):
        yield start, end
        end = start + block_size
        if end >= length:
            return


def _batches(
    streams: dict[str, list[np.ndarray]],
    block_size: int,
    stride: int,
    batch_size: int,
    eos_token_id: int,
    masking: bool,
    has_prefix: bool,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of windows over the token ids of each set's documents, laid end to end."""
    document_end, eos_before_bos = eos_token_id if masking else None, eos_token_id if has_prefix else None
    windows = _windows(streams, block_size, stride, eos_token_id)
    while rows := list(itertools.islice(windows, batch_size)):
        ids, numbers, scored = (np.stack(part) for part in zip(*rows, strict=True))
        yield sums.scored_batch(ids, numbers, scored, eos_token_id=document_end, eos_before_bos=eos_before_bos)


def _windows(
    streams: dict[str, list[np.ndarray]], block_size: int, stride: int, padding: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For every window, three arrays (block_size,): token ids, document numbers, and whether each token is scored."""
    num_before = 0
    for documents in filter(None, streams.values()):
        ids = np.concatenate(documents)
        numbers = np.repeat(
            np.arange(num_before, num_before + len(documents)), [len(document) for document in documents]
        )
        num_before += len(documents)
        for start, first in sliding_windows(len(ids), block_size, stride):
            part = slice(start, start + block_size)
            missing = (0, block_size - len(ids[part]))
            scored = np.arange(start, start + block_size) >= first
            scored[len(ids[part]) :] = False
            yield np.pad(ids[part], missing, constant_values=padding), np.pad(numbers[part], missing), scored
