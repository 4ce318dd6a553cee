"""Speed of preparation, in tokens per second.

Four ways are compared: the whole `prepare`; its limits, which are `encode_batch_fast` of tokenizers and hfpretrain's
own encoder on texts in memory; and the run_clm example of transformers (`datasets.map` to tokenize, `map` to group).

    python benchmarks/prepare.py CORPUS.jsonl[.gz] [--copies 1] [--rounds 5] [--vocab-size 16384] [--tokenizer FOLDER]

Every round measures each way once. Prints the medians and the range of the ratios, then the CPU time of each stage of
one more `prepare`. `--copies`: how often the corpus is repeated.
"""

import argparse
import contextlib
import functools
import gzip
import io
import logging
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
from transformers import AutoTokenizer

from hfpretrain import files
from hfpretrain.data import assemble, corpus, duplicates, packing
from hfpretrain.data import prepare as preparation
from hfpretrain.data.corpus import Reader
from hfpretrain.data.encode import Encoder
from hfpretrain.data.fast_tokenizer import FastTokenizer
from hfpretrain.data.prepare import prepare
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import Recipe, SourceSection, TokenizerSection

BLOCK_SIZE = 1024


def raw(tokenizer, texts):
    backend = tokenizer.backend_tokenizer
    return sum(
        len(encoding)
        for start in range(0, len(texts), 1000)
        for encoding in backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)
    )


def encode_alone(tokenizer, texts):
    """hfpretrain's encoder, with the comparison of fastokens and tokenizers, on batches as `prepare` makes them."""
    encoder = Encoder(tokenizer, np.dtype(np.uint16))
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size >= packing.BATCH_CHARS:
            batches.append([])
            size = 0
    with ThreadPoolExecutor(num_cores()) as pool:
        return sum(len(ids) for encoded in pool.map(encoder, batches) for ids in encoded)


def run_clm(tokenizer, dataset):
    def group(examples):
        joined = list(chain(*examples["input_ids"]))
        total = len(joined) // BLOCK_SIZE * BLOCK_SIZE
        rows = [joined[i : i + BLOCK_SIZE] for i in range(0, total, BLOCK_SIZE)]
        masks = [[1] * BLOCK_SIZE for _ in rows]
        return {"input_ids": rows, "attention_mask": masks, "labels": [row.copy() for row in rows]}

    tokenized = dataset.map(
        lambda examples: tokenizer(examples["text"]), batched=True, remove_columns=dataset.column_names
    )
    return len(tokenized.map(group, batched=True)) * BLOCK_SIZE


def repeat(path: Path, copies: int, folder: Path) -> str:
    """The path of the file, or of a new one in `folder` that has its content `copies` times."""
    if copies == 1:
        return str(path)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = file.read()
    name = folder / path.name
    with opened(name, "wb") as file:
        for _ in range(copies):
            file.write(content)
    return str(name)


def ours(recipe):
    prepared = prepare(recipe)
    return sum(split["tokens"] for split in prepared.manifest["splits"].values())


class Stages:
    """CPU seconds of each stage of `prepare`, on the main thread and on others, without the stages inside it."""

    def __init__(self) -> None:
        self.main: defaultdict[str, float] = defaultdict(float)
        self.others: defaultdict[str, float] = defaultdict(float)
        self._inner = threading.local()
        self._lock = threading.Lock()

    def run(self, stage: str, work: Callable[[], Any]) -> Any:
        inner = self._inner.__dict__.setdefault("seconds", [])
        start = time.thread_time()
        inner.append(0.0)
        try:
            return work()
        finally:
            seconds, inside = time.thread_time() - start, inner.pop()
            if inner:
                inner[-1] += seconds
            is_main = threading.current_thread() is threading.main_thread()
            with self._lock:
                (self.main if is_main else self.others)[stage] += seconds - inside

    def function(self, owner: Any, name: str, stage: str) -> Any:
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            return self.run(stage, lambda: original(*arguments, **keywords))

        return mock.patch.object(owner, name, timed)

    def generator(self, owner: Any, name: str, stage: str) -> Any:
        original = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Iterator[Any]:
            items, end = original(*arguments, **keywords), object()
            while (item := self.run(stage, lambda: next(items, end))) is not end:
                yield item

        return mock.patch.object(owner, name, timed)

    def stream(self, owner: Any, name: str, stage: str) -> Any:
        original, stages = getattr(owner, name), self

        class Timed(io.RawIOBase):
            def __init__(self, inner: Any):
                self._stream = inner

            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                return stages.run(stage, lambda: self._stream.readinto(buffer))

        def timed(*arguments: Any) -> Any:
            return io.BufferedReader(Timed(original(*arguments)), 2**16)

        return mock.patch.object(owner, name, timed)

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        patches = (
            self.stream(corpus, "_decompress", "decompress"),
            self.generator(Reader, "read", "read lines and JSON"),
            self.function(corpus, "_make_document", "hash documents"),
            self.function(corpus.Splitter, "__call__", "split"),
            self.function(preparation._Preparation, "_add_document", "split"),
            self.function(FastTokenizer, "_check", "proof"),
            self.function(FastTokenizer, "_encode", "encode"),
            self.function(Encoder, "encode_proven", "arrays of each document"),
            self.function(Encoder, "count_special", "count special tokens"),
            self.function(packing._PartPacker, "add", "pack"),
            self.function(packing._PartPacker, "_sample_lost_text", "look for lost text"),
            self.function(packing._PartPacker, "close", "write"),
            self.function(packing.RowWriter, "write", "write"),
            self.function(files, "checksum_entries", "checksums"),
            self.function(duplicates, "ngram_overlap", "n-gram overlap"),
            self.function(duplicates.Ngrams, "_hashes", "n-gram overlap"),
            self.function(duplicates, "count_distinct", "count duplicates"),
            self.function(assemble, "assemble", "assemble"),
            self.function(preparation._Preparation, "_load_or_make_tokenizer", "load the tokenizer"),
            self.function(preparation, "prepared_path", "load the tokenizer"),
            self.function(preparation, "_path", "load the tokenizer"),
            self.function(Encoder, "__init__", "load the tokenizer"),
            self.function(FastTokenizer, "__init__", "load the tokenizer"),
            self.function(preparation, "token_bytes", "load the tokenizer"),
        )
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield


def print_stages(recipe: Recipe) -> None:
    stages, start = Stages(), time.process_time()
    with stages.measure():
        stages.run("other", lambda: ours(recipe))
    total = time.process_time() - start
    stages.others["other"] += total - sum(stages.main.values()) - sum(stages.others.values())
    print("\n| stage | CPU seconds, reading thread | other threads | share |\n|---|---|---|---|")
    names = sorted({*stages.main, *stages.others}, key=lambda name: -stages.main[name] - stages.others[name])
    for name in names:
        here, there = stages.main[name], stages.others[name]
        print(f"| {name} | {here:.2f} | {there:.2f} | {(here + there) / total:.1%} |")
    print(f"| all | {sum(stages.main.values()):.2f} | {sum(stages.others.values()):.2f} | {total:.2f} s |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--tokenizer")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    with tempfile.TemporaryDirectory() as folder:
        source = {"path": "json", "data_files": repeat(Path(args.corpus), args.copies, Path(folder))}
        texts = [document.text for document in Reader(SourceSection(**source)).read() if document.text]
        tokenizer_path = args.tokenizer or str(Path(folder) / "tokenizer")
        if not args.tokenizer:
            section = TokenizerSection(algorithm="byte_level_bpe", vocab_size=args.vocab_size)
            train_tokenizer(section, texts[:20_000]).save_pretrained(tokenizer_path)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        tokenizer.model_max_length = int(1e30)
        dataset = datasets.Dataset.from_dict({"text": texts})
        recipe = Recipe.model_validate(
            {
                "output_dir": f"{folder}/run",
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": {"pretrained": tokenizer_path},
                "data": {"sources": [source], "validation_fraction": 0.01, "block_size": BLOCK_SIZE},
                "optimizer": {"lr": 1e-3},
                "training": {"tokens_per_step": BLOCK_SIZE, "micro_batch_size": 1, "max_steps": 1},
            }
        )
        names = ("encode_batch_fast", "encode alone", "run_clm", "hfpretrain")
        rates: dict[str, list[float]] = {name: [] for name in names}
        for number in range(args.rounds + 1):
            for name, call in (
                ("encode_batch_fast", lambda: raw(tokenizer, texts)),
                ("encode alone", lambda: encode_alone(tokenizer, texts)),
                ("run_clm", lambda: run_clm(tokenizer, dataset)),
                ("hfpretrain", lambda: ours(recipe)),
            ):
                start = time.perf_counter()
                tokens = call()
                if number:  # the first round warms up
                    rates[name].append(tokens / (time.perf_counter() - start))
                shutil.rmtree(Path(folder) / "prepared", ignore_errors=True)
        print(f"{args.corpus}: {len(texts):,} documents, {sum(map(len, texts)):,} characters, {num_cores()} cores")
        print(f"| {args.rounds} rounds | tokens/s, median | hfpretrain is, median (min to max) |\n|---|---|---|")
        for name, values in rates.items():
            ratios = sorted(a / b for a, b in zip(rates["hfpretrain"], values, strict=True))
            ratio = f"{statistics.median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {name} | {statistics.median(values):,.0f} | {ratio if name != 'hfpretrain' else ''} |")
        print_stages(recipe)


if __name__ == "__main__":
    main()
