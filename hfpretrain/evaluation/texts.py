"""The documents to score: from a list, from files, or the validation text of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from hfpretrain.data import corpus
from hfpretrain.data.source_files import format_of
from hfpretrain.recipe.schema import DataSection, RecipeError, SourceSection

Texts = dict[str, list[str]]
"""The documents of each set, by its name."""


def checked_texts(texts: Mapping[str, Sequence[str]]) -> Texts:
    """The documents of each set as lists. Raises `RecipeError` for anything that is not a list of valid strings."""
    checked: Texts = {}
    for name, documents in texts.items():
        path = f"texts.{name}" if name else "texts"
        if isinstance(documents, str) or not isinstance(documents, Iterable):
            raise RecipeError.at(path, f"has the type {type(documents).__name__}; give a list of documents")
        checked[name] = list(documents)
        for number, text in enumerate(checked[name]):
            if not isinstance(text, str):
                raise RecipeError.at(f"{path}.{number}", f"has the type {type(text).__name__}, but must be a string")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RecipeError.at(f"{path}.{number}", f"is not valid Unicode: {error.reason}") from error
    return checked


def recipe_texts(data: DataSection) -> Texts:
    """The documents of a recipe's validation sets, by domain. `data`: its section."""
    if not data.has_validation:
        raise RecipeError.at("data", "has no validation text; set validation_fraction or validation_sources")
    texts: Texts = {}
    for source, split, text in _validation_documents(data):
        texts.setdefault(split.removeprefix("validation-"), []).append(_Text(text).from_source(source))
    return texts


def file_texts(names: list[str]) -> Texts:
    """The documents of files, given as FILE or NAME=FILE. A .txt is one document.

    Each line of a .jsonl is one document, under the key `text`.
    """
    texts: Texts = {}
    for given in names:
        name, _, path = (
            given.partition("=") if "=" in given and not Path(given).exists() else (Path(given).name, "", given)
        )
        if not Path(path).exists():
            raise RecipeError.at("--data", f"there is no file {path}")
        kind = format_of(path)
        if kind not in ("text", "json"):
            raise RecipeError.at("--data", f"{path} is neither a .txt nor a .jsonl file")
        source = SourceSection(path=kind, data_files=path, sample_by="document" if kind == "text" else None)
        texts.setdefault(name, []).extend(d.text for d in corpus.Reader(source, "--data").read() if d.text)
    return texts


class _Text(str):
    """A document with the `special_tokens` of its source, which say how names of special tokens in it are read."""

    special_tokens: str | tuple[str, ...] = "text"

    def from_source(self, source: SourceSection) -> _Text:
        self.special_tokens = source.special_tokens
        return self


def _validation_documents(data: DataSection) -> Iterator[tuple[SourceSection, str, str]]:
    """Source, split and text of the validation documents."""
    key = "validation_sources" if data.validation_sources else "sources"
    sources: tuple[SourceSection, ...] = getattr(data, key)
    if len({source.special_tokens for source in sources}) == 1:
        yield from ((sources[0], *found) for found in corpus.validation_documents(data))
        return
    for source in sources:  # the held-out documents of a source don't depend on the other sources
        for split, text in corpus.validation_documents(data.model_copy(update={key: (source,)})):
            yield source, split, text
