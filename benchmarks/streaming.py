"""Speed of streaming, in tokens per second, beside the encoder alone on texts in memory.

    python benchmarks/streaming.py [CORPUS.jsonl] [--megabytes 64] [--files 8] [--rounds 5] [--threads N]
        [--vocab-size 16384] [--tokenizer FOLDER]

The encoder alone uses as many threads as streaming, on the same texts in batches of the same size. Streaming is
measured as a run reads it: `Prefetcher.next`, step after step, from files on the disk, without the first steps.

- `files side by side`: files of one size, all of which are read at the same time
- `one file`: all texts in one file
- `one file, one thread`: the same, with one thread that tokenizes
- `shuffled`: one file, with `data.shuffle_buffer`
- `mixture`: two sources with several files each

Every round measures each of them once. Prints the medians and the range of the ratios. If a device trains faster than
the row of its kind, it waits for data. The corpus (default: random words) is repeated up to `--megabytes`.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from small import small_text
from transformers import AutoTokenizer

from hfpretrain.data.batches import Prefetcher
from hfpretrain.data.encode import Encoder, token_dtype
from hfpretrain.data.streaming import StreamingData
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.recipe.machine import num_cores
from hfpretrain.recipe.schema import DataSection, TokenizerSection

BLOCK_SIZE, BATCH_CHARS, WARM_UP_STEPS = 1024, 2**16, 3


def encode_alone(encoder, texts, threads):
    """Tokens per second of the encoder on all texts."""
    batches, chars = [[]], 0
    for text in texts:
        if chars >= BATCH_CHARS:
            batches.append([])
            chars = 0
        batches[-1].append(text)
        chars += len(text)
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        count = sum(pool.map(lambda batch: sum(map(len, encoder(batch))), batches))
        return count / (time.perf_counter() - start)


def stream(encoder, data, threads, num_tokens, sequences):
    """Tokens per second of streaming about `num_tokens` tokens in steps of `sequences`."""
    streamed = StreamingData(
        data,
        encoder,
        frozenset(),
        first_step=0,
        states={},
        micro_batch_size=sequences,
        accumulation_steps=1,
        process_index=0,
        num_processes=1,
        eos_token_id=encoder.eos_token_id,
        document_masking=True,
        num_threads=threads,
    )
    steps = max(1, num_tokens // (sequences * BLOCK_SIZE))
    prefetcher = Prefetcher(streamed.step, range(WARM_UP_STEPS + steps), pin_memory=False)
    for _ in range(WARM_UP_STEPS):
        prefetcher.next()
    start = time.perf_counter()
    for _ in range(steps):
        prefetcher.next()
    seconds = time.perf_counter() - start
    prefetcher.close()
    return steps * sequences * BLOCK_SIZE / seconds


def sections(folder, num_files):
    """The data sections that are compared, by name."""

    def source(pattern, **more):
        return {"path": "json", "data_files": f"{folder}/{pattern}", **more}

    whole = [source("all.jsonl")]
    half = [str(folder / f"part-{number}.jsonl") for number in range(num_files)]
    mixture = [
        source("", weight=0.7) | {"data_files": half[: max(1, num_files // 2)]},
        source("", weight=0.3) | {"data_files": half[num_files // 2 :]},
    ]
    made = {
        "files side by side": ([source("part-*.jsonl")], {}),
        "one file": (whole, {}),
        "one file, one thread": (whole, {}),
        "shuffled": (whole, {"shuffle_buffer": 10_000}),
        "mixture": (mixture, {}),
    }
    return {
        name: DataSection(sources=sources, block_size=BLOCK_SIZE, streaming=True, **more)
        for name, (sources, more) in made.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?")
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--sequences", type=int, default=64, help="in a step, of 1,024 tokens each")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--tokenizer")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.corpus:
        with open(args.corpus) as file:
            texts = [json.loads(line)["text"] for line in file]
    else:
        texts = small_text(5000)
    repeats = max(1, round(args.megabytes * 1e6 / sum(len(text.encode()) for text in texts)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.tokenizer:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        else:
            section = TokenizerSection(algorithm="byte_level_bpe", vocab_size=args.vocab_size)
            tokenizer = train_tokenizer(section, texts[:20_000])
        encoder = Encoder(tokenizer, token_dtype(len(tokenizer)))
        texts = texts * repeats
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / "all.jsonl").write_text("".join(lines))
        for number in range(args.files):
            (folder / f"part-{number}.jsonl").write_text("".join(lines[number :: args.files]))
        num_tokens = sum(map(len, encoder(texts[: len(texts) // repeats]))) * repeats
        rates: dict[str, list[float]] = {"encoder alone": []}
        for turn in range(args.rounds + 1):
            found = {"encoder alone": encode_alone(encoder, texts, args.threads)}
            for kind, data in sections(folder, args.files).items():
                threads = 1 if kind.endswith("one thread") else args.threads
                found[kind] = stream(encoder, data, threads, num_tokens, args.sequences)
            if turn:  # the first round warms up
                for kind, rate in found.items():
                    rates.setdefault(kind, []).append(rate)
    what = f"{num_tokens:,} tokens, {args.threads} threads on {num_cores()} cores"
    print(f"{what}\n| {args.rounds} rounds | tokens/s, median | of the encoder alone, median (min to max) |")
    print("|---|---|---|")
    for kind, values in rates.items():
        ratios = sorted(rate / alone for rate, alone in zip(values, rates["encoder alone"], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {kind} | {statistics.median(values):,.0f} | {spread} |")


if __name__ == "__main__":
    main()
