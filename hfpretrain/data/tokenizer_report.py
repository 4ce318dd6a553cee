"""Compare tokenizers on the same text: bytes and characters per token by domain and by script, vocabulary, speed."""

from __future__ import annotations

import itertools
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from hfpretrain.data import corpus
from hfpretrain.data.encode import Encoder, token_bytes
from hfpretrain.data.prepare import load_prepared_tokenizer, make_tokenizer, prepared_path
from hfpretrain.data.prepared import PreparedData, is_validation
from hfpretrain.data.tokenizer import load_tokenizer, no_threads_in_tokenizers, tokenizer_size
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.redaction import redact
from hfpretrain.recipe.schema import DataSection, Recipe, RecipeError, SourceSection, TokenizerSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_FILES = 16
NUM_LONGEST = NUM_UNKNOWN = 5
_BATCH = 64
_MAX_SCRIPTS = 14
_OTHER, _NUMBERS, _SYMBOLS, _SPACES = "other letters", "numbers", "symbols", "spaces"
# By Unicode's `Script_Extensions`. A character that several scripts share, such as `ー`, counts for the first of them.
_SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Ethiopic", "Devanagari", "Bengali"),
    *("Gurmukhi", "Gujarati", "Oriya", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Khmer"),
    *("Myanmar", "Tibetan", "Mongolian", "Hangul", "Hiragana", "Katakana", "Han"),
)
_CLASSES = (*_SCRIPTS, _OTHER, _NUMBERS, _SYMBOLS, _SPACES)
_SCRIPT = regex.compile("|".join(rf"(?P<{name}>\p{{Script_Extensions={name}}})" for name in _SCRIPTS))
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass
class Size:
    """An amount of text, and the number of its tokens without BOS and EOS."""

    bytes: int = 0
    characters: int = 0
    tokens: int = 0

    def add(self, other: Size) -> None:
        """Add another amount to this one."""
        for name in ("bytes", "characters", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes per token; None without tokens."""
        return self.bytes / self.tokens if self.tokens else None

    @property
    def characters_per_token(self) -> float | None:
        """Unicode characters per token; None without tokens."""
        return self.characters / self.tokens if self.tokens else None


@dataclass
class Measured:
    """The figures of one tokenizer."""

    name: str
    vocab_size: int
    """Largest id + 1."""
    domains: dict[str, Size] = field(default_factory=dict)
    """By the name of the domain, as in `domain_texts`."""
    scripts: dict[str, Size] = field(default_factory=dict)
    """By the script of a token's letters. Tokens without letters count as numbers, symbols or spaces."""
    uses: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """How often each id occurs: int64 (vocab_size,)."""
    longest: list[tuple[str, int]] = field(default_factory=list)
    """The longest tokens and how often each occurs, the longest first."""
    seconds: float = 0.0
    """Time to encode all text, in seconds, on `num_threads` threads."""
    num_threads: int = 1
    unknown: dict[str, int] = field(default_factory=dict)
    """By domain: number of tokens that are the unknown token."""
    lost: dict[str, int] = field(default_factory=dict)
    """By domain: number of characters without a token, other than spaces."""
    unknown_texts: list[tuple[str, int]] = field(default_factory=list)
    """Texts that become the unknown token, and how often, the most frequent first."""

    @property
    def total(self) -> Size:
        """All domains together."""
        total = Size()
        for size in self.domains.values():
            total.add(size)
        return total

    @property
    def used(self) -> int:
        """Number of different ids that occur."""
        return int((self.uses > 0).sum())


def domain_texts(data: DataSection, max_bytes: int) -> dict[str, list[str]]:
    """Documents of each training source and of the validation text, by the name of the domain.

    At most `max_bytes` of UTF-8 are taken from a source: the same amount from the beginning of each of up to
    `MAX_FILES` files, which are spread evenly over all. Raises `RecipeError` if the sources have no text.
    """
    texts: dict[str, list[str]] = {}
    splitter = corpus.Splitter(data)
    for number, reader in enumerate(corpus.training_readers(data)):
        name = f"{number} {_source_name(data.sources[number])}"
        for document in _beginnings(reader, max_bytes):
            for split, text in splitter(document):
                if split == "train":
                    texts.setdefault(name, []).append(text)
                elif is_validation(split):
                    texts.setdefault("validation", []).append(text)
    for number, reader in enumerate(corpus.validation_readers(data)):
        name = data.validation_split(number).replace("-", " ", 1)
        texts.setdefault(name, []).extend(document.text for document in _beginnings(reader, max_bytes) if document.text)
    if not any(texts.values()):
        raise RecipeError.at("data.sources", "the sources have no text")
    return texts


def limit_texts(texts: dict[str, list[str]], max_bytes: int) -> dict[str, list[str]]:
    """The first documents of each domain, at most `max_bytes` of UTF-8. The last document is cut."""
    limited: dict[str, list[str]] = {}
    for name, documents in texts.items():
        room = max_bytes
        for text in documents:
            if room <= 0:
                break
            limited.setdefault(name, []).append(_cut(text, room))
            room -= len(text.encode())
    return limited


def _beginnings(reader: corpus.Reader, max_bytes: int) -> Iterator[corpus.Document]:
    """The first documents of up to `MAX_FILES` files of the reader. The last document of each file may be cut."""
    chosen = sorted(
        {int(index) for index in np.linspace(0, len(reader.pieces) - 1, min(MAX_FILES, len(reader.pieces)))}
    )
    for index in chosen:
        room = max_bytes // len(chosen)
        for document in reader.read([index]):
            yield document._replace(text=_cut(document.text, room))
            room -= document.num_bytes
            if room <= 0:
                break


def _cut(text: str, num_bytes: int) -> str:
    """The beginning of a text, at most `num_bytes` in UTF-8."""
    return text.encode()[:num_bytes].decode(errors="ignore")


def _source_name(source: SourceSection) -> str:
    name = source.name or (source.patterns or (source.data_dir or source.path,))[0]
    return redact(name).rstrip("/").rpartition("/")[2]


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer: that of its prepared data if they exist, else made as the recipe says."""
    prepared = PreparedData.open(prepared_path(recipe))
    if prepared is not None:
        return load_prepared_tokenizer(prepared, recipe.tokenizer.trust_remote_code)
    return make_tokenizer(recipe.tokenizer, recipe.data).tokenizer


def stored_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hub id or a folder, which may be a run, an export or prepared data.

    Raises `RecipeError` if there is none.
    """
    path = Path(name)
    inside = [path, path / "tokenizer", path / "model"]
    found = [folder for folder in inside if any((folder / file).is_file() for file in _TOKENIZER_FILES)]
    if path.is_dir() and not found:
        raise RecipeError.at(name, f"is a folder without a tokenizer, which has one of {', '.join(_TOKENIZER_FILES)}")
    try:
        return load_tokenizer(TokenizerSection(pretrained=str(found[0]) if found else name))
    except RecipeError as error:
        raise RecipeError.at(name, error.problems[0].message) from error


def measure(
    name: str, tokenizer: PreTrainedTokenizerFast, texts: dict[str, list[str]], num_threads: int | None = None
) -> Measured:
    """Encode the documents of each domain as training does, and count their tokens.

    `num_threads` threads encode, by default one for each core, whichever library encodes.
    """
    size = tokenizer_size(tokenizer)
    measured = Measured(name, size, uses=np.zeros(size, np.int64), num_threads=num_threads or num_cores())
    encoder = Encoder(tokenizer, np.dtype(np.uint32))
    encoder([""])  # makes what encodes the text, so that `seconds` does not count it
    batches = [
        (domain, documents[start : start + _BATCH])
        for domain, documents in texts.items()
        for start in range(0, len(documents), _BATCH)
    ]
    with no_threads_in_tokenizers(), ThreadPoolExecutor(measured.num_threads) as pool:
        began = time.perf_counter()
        encoded = list(pool.map(encoder, [batch for _, batch in batches]))
        measured.seconds = time.perf_counter() - began
    scripts = _Scripts(tokenizer)
    for domain in texts:
        measured.domains[domain], measured.unknown[domain], measured.lost[domain] = Size(), 0, 0
    for (domain, batch), documents in zip(batches, encoded, strict=True):
        ids = np.concatenate([one[len(encoder.prefix) : -1] for one in documents])
        measured.uses += np.bincount(ids, minlength=size)
        num_bytes, characters = sum(len(text.encode()) for text in batch), sum(map(len, batch))
        measured.domains[domain].add(Size(num_bytes, characters, len(ids)))
        measured.unknown[domain] += encoder.count_unknown(ids)
        measured.lost[domain] += scripts.count(batch, encoder.unknown_ids)
    measured.scripts = scripts.sizes()
    measured.unknown_texts = scripts.unknown_texts.most_common(NUM_UNKNOWN)
    measured.longest = _longest_tokens(tokenizer, measured.uses)
    return measured


def _longest_tokens(tokenizer: PreTrainedTokenizerFast, uses: np.ndarray) -> list[tuple[str, int]]:
    """The tokens with the longest text in bytes, without special tokens, and how often each occurs."""
    sizes = token_bytes(tokenizer, len(uses))
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    sizes[special] = 0
    order = np.argsort(-sizes, kind="stable")[:NUM_LONGEST].tolist()
    return [(tokenizer.decode([index]), int(uses[index])) for index in order if sizes[index]]


class _Scripts:
    """Counts tokens, and the text that each stands for, by script."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True  # the names of special tokens are text, as in training
        self._backend.no_truncation()
        self._backend.no_padding()
        self._class_of = np.full(0x110000, 255, dtype=np.uint8)
        self._counts = np.zeros((3, len(_CLASSES)), dtype=np.int64)
        self.unknown_texts: Counter[str] = Counter()
        """How often each text became the unknown token."""

    def count(self, texts: Sequence[str], unknown_ids: Sequence[int]) -> int:
        """Count the tokens of texts. A token's text reaches from the end of the token before it to its own end.

        `unknown_ids`: ids of the unknown token. Returns the number of characters without a token, other than spaces.
        """
        num_lost = 0
        for text, encoding in zip(
            texts, self._backend.encode_batch(list(texts), add_special_tokens=False), strict=True
        ):
            points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            edges = np.zeros(len(points) + 1, dtype=np.int64)
            np.add.at(edges, offsets[:, 0], 1)
            np.add.at(edges, offsets[:, 1], -1)
            is_space = self._classes(points) == _CLASSES.index(_SPACES)
            # Only their number is right: behind a lost character, the offsets of a word's tokens may be shifted.
            num_lost += int(((np.cumsum(edges[:-1]) == 0) & ~is_space).sum())
            unknown = offsets[np.isin(np.array(encoding.ids, dtype=np.int64), unknown_ids)]
            self.unknown_texts.update(text[start:end] for start, end in unknown.tolist())
            if not len(encoding):
                continue
            bytes_before = np.zeros(len(points) + 1, dtype=np.int64)
            lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
            np.cumsum(lengths, out=bytes_before[1:])
            ends = np.maximum.accumulate(offsets[:, 1])
            ends[-1] = len(points)
            starts = np.concatenate([[0], ends[:-1]])
            classes = self._classes(points)
            # If several tokens spell one character in bytes, they have the same end. The first one counts its text.
            of_token = classes[np.maximum(ends, 1) - 1]
            has_text = ends > starts
            of_token[has_text] = np.minimum.reduceat(classes, starts[has_text])
            for row, weights in enumerate((bytes_before[ends] - bytes_before[starts], ends - starts, None)):
                found = np.bincount(of_token, weights, minlength=len(_CLASSES))
                self._counts[row] += found.astype(np.int64)
        return num_lost

    def _classes(self, points: np.ndarray) -> np.ndarray:
        """The index in `_CLASSES` of each character, uint8 (n,), of `points`, uint32 (n,)."""
        classes = self._class_of[points]
        if (new := np.unique(points[classes == 255])).size:
            for point in new.tolist():
                self._class_of[point] = _CLASSES.index(_class_of(chr(point)))
            classes = self._class_of[points]
        return classes

    def sizes(self) -> dict[str, Size]:
        """The amount of text in each script that occurs. Beyond the `_MAX_SCRIPTS` largest, all are `other letters`."""
        found = {name: Size(*map(int, self._counts[:, number])) for number, name in enumerate(_CLASSES)}
        scripts = sorted((name for name in _SCRIPTS if found[name].tokens), key=lambda name: -found[name].bytes)
        for name in scripts[_MAX_SCRIPTS:]:
            found[_OTHER].add(found[name])
        shown = (*scripts[:_MAX_SCRIPTS], _OTHER, _NUMBERS, _SYMBOLS, _SPACES)
        return {name: found[name] for name in shown if found[name].tokens}


def _class_of(character: str) -> str:
    if character.isspace():
        return _SPACES
    category = unicodedata.category(character)[0]
    if category == "N":
        return _NUMBERS
    if category not in "LM":
        return _SYMBOLS
    match = _SCRIPT.match(character)
    return _OTHER if match is None else str(match.lastgroup)


def as_json(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The figures of each tokenizer, for a JSON file."""
    return [
        {
            "tokenizer": one.name,
            "vocab_size": one.vocab_size,
            "vocab_used": one.used,
            "bytes_per_second": one.total.bytes / one.seconds,
            "tokens_per_second": one.total.tokens / one.seconds,
            "num_threads": one.num_threads,
            "unknown_tokens": one.unknown,
            "characters_without_token": one.lost,
            "unknown_texts": one.unknown_texts,
            "domains": {name: vars(size) for name, size in one.domains.items()},
            "scripts": {name: vars(size) for name, size in one.scripts.items()},
            "longest_tokens": one.longest,
        }
        for one in measured
    ]


def format_report(measured: Sequence[Measured]) -> str:
    """A table with two columns for each tokenizer, then the longest tokens of each."""
    first = measured[0]
    rows: list[list[str]] = [["", "text"] + ["bytes/token", "chars/token"] * len(measured)]

    def add(label: str, text: str, cells: Iterable[tuple[str, str]]) -> None:
        rows.append([label, text, *itertools.chain.from_iterable(cells)])

    def add_sizes(label: str, text: str, sizes: Iterable[Size]) -> None:
        add(label, text, ((_rate(size.bytes_per_token), _rate(size.characters_per_token)) for size in sizes))

    rows.append(["domain"])
    for name, size in first.domains.items():
        add_sizes(f"  {name}", f"{size.bytes / 1e6:,.2f} MB", [one.domains[name] for one in measured])
    if len(first.domains) > 1:
        add_sizes("  all", f"{first.total.bytes / 1e6:,.2f} MB", [one.total for one in measured])
    rows.append(["script"])
    for name in _script_names(measured):
        share = first.scripts.get(name, Size()).bytes / first.total.bytes
        add_sizes(f"  {name}", f"{share:.1%}", [one.scripts.get(name, Size()) for one in measured])
    rows.append(["vocabulary"])
    add("  tokens", "", ((f"{one.vocab_size:,}", "") for one in measured))
    add("  used", "", ((f"{one.used:,}", f"{one.used / one.vocab_size:.1%}") for one in measured))
    for label, counts, of in (
        ("unknown tokens", [one.unknown for one in measured], "tokens"),
        ("characters without a token", [one.lost for one in measured], "characters"),
    ):
        rows.append([label])
        for name in first.domains if any(any(some.values()) for some in counts) else ():
            shares = [
                some[name] / max(1, getattr(one.domains[name], of)) for some, one in zip(counts, measured, strict=True)
            ]
            add(f"  {name}", "", ((f"{share:.2%}" if share else "none", "") for share in shares))
        if rows[-1] == [label]:
            add("  all", "", (("none", "") for _ in measured))
    rows.append(["speed", f"{first.num_threads} thread(s)"])
    add("  text", "", ((f"{one.total.bytes / one.seconds / 1e6:,.1f} MB/s", "") for one in measured))
    add("  tokens", "", ((f"{one.total.tokens / one.seconds / 1e6:,.2f} M/s", "") for one in measured))
    lines = _align(rows, [one.name for one in measured])
    for one in measured:
        if one.unknown_texts:
            lines.append(f"most frequent unknown text of {one.name}, and how often the text has it")
            lines += [f"  {uses:>8,}  {_short(text)}" for text, uses in one.unknown_texts]
    for one in measured:
        lines.append(f"longest tokens of {one.name}, and how often the text has them")
        lines += [f"  {uses:>8,}  {_short(token)}" for token, uses in one.longest]
    return "\n".join(lines)


def _align(rows: list[list[str]], names: list[str]) -> list[str]:
    """The rows as lines with aligned columns. Above them, a line with each tokenizer's name over its two columns."""
    num_columns = 2 + 2 * len(names)
    rows = [row + [""] * (num_columns - len(row)) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(num_columns)]
    for number, name in enumerate(names):
        pair = slice(2 + 2 * number, 4 + 2 * number)
        missing = len(name) - sum(widths[pair]) - 2
        widths[pair.start] += max(0, missing)
    pairs = [sum(widths[column : column + 2]) + 2 for column in range(2, num_columns, 2)]
    head = [
        "".ljust(widths[0]),
        "".rjust(widths[1]),
        *(name.rjust(pair) for name, pair in zip(names, pairs, strict=True)),
    ]
    aligned = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return ["  ".join(cells).rstrip() for cells in (head, *aligned)]


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _short(token: str, most: int = 60) -> str:
    return repr(token) if len(token) <= most else f"{token[:most]!r}... ({len(token)} characters)"


def _script_names(measured: Sequence[Measured]) -> list[str]:
    """The scripts that occur, those with the most text first, then the classes without letters."""
    names = dict.fromkeys(itertools.chain.from_iterable(one.scripts for one in measured))
    return sorted(names, key=lambda name: name in (_OTHER, _NUMBERS, _SYMBOLS, _SPACES))


def plot_report(measured: Sequence[Measured], path: Path) -> None:
    """Draw a PNG: bytes per token by domain, characters per token by script, and how much of the vocabulary is used."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    domains, scripts = list(measured[0].domains), _script_names(measured)
    domains += ["all"] if len(domains) > 1 else []
    height = min(14, max(6, 1.5 + 0.2 * len(measured) * max(2 * len(domains), len(scripts))))
    figure = Figure(figsize=(12, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic([["domain", "script"], ["vocabulary", "script"]])
    of_domains = [[{**one.domains, "all": one.total}[name].bytes_per_token for name in domains] for one in measured]
    _draw_bars(panels["domain"], domains, of_domains)
    panels["domain"].set_title("bytes per token, by domain", loc="left")
    of_scripts = [[one.scripts.get(name, Size()).characters_per_token for name in scripts] for one in measured]
    _draw_bars(panels["script"], scripts, of_scripts)
    panels["script"].set_title("characters per token, by script", loc="left")
    curves = panels["vocabulary"]
    for one in measured:
        covered = np.cumsum(np.sort(one.uses)[::-1][: one.used]) / one.uses.sum()
        label = f"{one.name} ({one.vocab_size:,} tokens, {one.used:,} used)"
        curves.plot(np.arange(1, one.used + 1), covered, label=label, lw=1.5)
    curves.set_title("share of the text that the most frequent tokens make up", loc="left")
    curves.set(xlabel="number of most frequent tokens", xscale="log", ylim=(0, 1.02))
    curves.yaxis.set_major_formatter("{x:.0%}")
    curves.grid(alpha=0.3)
    for axes in panels.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside upper center", frameon=False, ncols=3)
    figure.savefig(path)


def _draw_bars(axes: Any, names: Sequence[str], values: Sequence[Sequence[float | None]]) -> None:
    """Horizontal bars, a group for each name from top to bottom, with a bar for each tokenizer."""
    height = 0.8 / len(values)
    for number, row in enumerate(values):
        places = [index + (number - (len(values) - 1) / 2) * height for index in range(len(names))]
        bars = axes.barh(places, [value or 0 for value in row], height)
        axes.bar_label(bars, [_rate(value) for value in row], padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.12)
