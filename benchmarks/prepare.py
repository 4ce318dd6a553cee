"""Speed of preparation, in tokens per second: the whole `prepare`; the limit, `encode_batch_fast` alone on texts in
memory; and transformers' run_clm example (`datasets.map` to tokenize, `map` to group).

    python benchmarks/prepare.py CORPUS.jsonl[.gz] [--rounds 5] [--vocab-size 16384] [--tokenizer FOLDER]

The three take turns in every round. Prints medians and the range of the ratios.
"""

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
from itertools import chain
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
from transformers import AutoTokenizer

from hfpretrain.data.corpus import Reader
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


def ours(recipe):
    prepared = prepare(recipe)
    return sum(split["tokens"] for split in prepared.manifest["splits"].values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--tokenizer")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    datasets.disable_caching()
    source = {"path": "json", "data_files": args.corpus}
    texts = [document.text for document in Reader(SourceSection(**source)).read() if document.text]
    with tempfile.TemporaryDirectory() as folder:
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
        rates: dict[str, list[float]] = {"encode_batch_fast": [], "run_clm": [], "hfpretrain": []}
        for number in range(args.rounds + 1):
            for name, call in (
                ("encode_batch_fast", lambda: raw(tokenizer, texts)),
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


if __name__ == "__main__":
    main()
