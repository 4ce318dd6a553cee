"""Corpus, tokenizer and packing put together: from a recipe to prepared data, once for each fingerprint."""

from __future__ import annotations

import logging
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfpretrain import corpus, files, packing, tokenizer
from hfpretrain.packing import PreparedData
from hfpretrain.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


def prepared_path(recipe: Recipe) -> Path:
    """The folder of this recipe's prepared data, whether it exists or not."""
    sources = [*recipe.data.sources, *recipe.data.validation_sources]
    identities: list[Any] = [corpus.identity(source) for source in sources]
    if recipe.tokenizer.pretrained is not None and Path(recipe.tokenizer.pretrained).is_dir():
        folder = Path(recipe.tokenizer.pretrained)
        tokenizer_files = [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".txt", ".model", ".jinja")]
        identities.append([[file.name, files.sha256(file)] for file in tokenizer_files])
    return recipe.prepared_dir / packing.fingerprint(recipe.data, recipe.tokenizer, identities)


def prepare(recipe: Recipe) -> PreparedData:
    """The recipe's prepared data: opened if they are there, made otherwise.

    Raises `RecipeError` for what is wrong with the sources.
    """
    from filelock import FileLock

    path = prepared_path(recipe)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError.at("data.prepared_dir", f"{path.parent} can't be made: {error.strerror}") from error
    with FileLock(str(path) + ".lock"):
        prepared = PreparedData.open(path)
        if prepared is None:
            return _prepare(recipe, path)
        reason = files.damage(path, checksums=False)
        if reason is not None:
            raise RecipeError.at("data", f"prepared data are damaged: {reason}; delete {path}")
        return prepared


def wait_for_prepared(recipe: Recipe, poll_seconds: float = 0.5) -> PreparedData:
    """The prepared data that another process of this run is making.

    Not a barrier of the process group: preparing may take longer than any of its time-outs.
    """
    path = prepared_path(recipe)
    while (prepared := PreparedData.open(path)) is None:
        time.sleep(poll_seconds)
    return prepared


def load_prepared_tokenizer(prepared: PreparedData) -> PreTrainedTokenizerFast:
    """The tokenizer that made the blocks."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepared.path / "tokenizer")


def _prepare(recipe: Recipe, path: Path) -> PreparedData:
    import datasets

    datasets.disable_progress_bars()
    start = time.perf_counter()
    if recipe.tokenizer.pretrained is not None:
        fast_tokenizer = tokenizer.load_tokenizer(recipe.tokenizer)
    else:
        logger.info("training the tokenizer on the training text")
        documents = _progress(corpus.training_documents(recipe.data), "tokenizer")
        fast_tokenizer = tokenizer.train_tokenizer(recipe.tokenizer, documents)
    logger.info("tokenizing and packing into blocks of %d tokens", recipe.data.block_size)
    vocab_size = tokenizer.padded_vocab_size(recipe.tokenizer, fast_tokenizer)
    extra = {
        "vocab_size": vocab_size,
        "tokenizer_size": tokenizer.tokenizer_size(fast_tokenizer),
        "sources": [source.model_dump(mode="json", exclude_none=True) for source in recipe.data.sources],
        "source_identities": [corpus.identity(source) for source in recipe.data.sources],
        "versions": {name: version(name) for name in ("datasets", "tokenizers", "transformers")}
        | {"python": platform.python_version()},
    }
    prepared = packing.pack(
        path,
        _progress(corpus.split_documents(recipe.data), "packing"),
        fast_tokenizer,
        tokenizer.token_bytes(fast_tokenizer, vocab_size),
        recipe.data,
        extra,
    )
    logger.info("prepared %s in %.1f s", path, time.perf_counter() - start)
    return prepared


def _progress(documents: Iterator[Any], description: str) -> Iterator[Any]:
    from tqdm import tqdm

    # disable=None: no bar where nobody watches a terminal
    return iter(tqdm(documents, desc=description, unit=" documents", disable=None, leave=False))


def summary(prepared: PreparedData) -> str:
    """What was prepared, a line for each split."""
    lines = [f"prepared data    {prepared.path}"]
    for name, entry in prepared.manifest["splits"].items():
        lines.append(
            f"  {name:<14} {entry['documents']:,} documents, {entry['bytes']:,} bytes -> {entry['tokens']:,} tokens + "
            f"{entry['separators']:,} separators = {entry['rows']:,} blocks x {prepared.manifest['block_size']} + "
            f"{entry['remainder']} remainder"
        )
    dropped = prepared.manifest["documents_dropped"]
    if dropped:
        lines.append("  dropped        " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    return "\n".join(lines)
