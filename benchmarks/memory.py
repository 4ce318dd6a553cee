"""Peak memory of the whole process tree of `hfpretrain prepare`, for corpora of several sizes.

    python benchmarks/memory.py CORPUS.jsonl[.gz] [--megabytes 100 2000] [--document-megabytes 100]

The given corpus is repeated, and every copy of a document has another first line. The last corpus is one single
document. A tokenizer of 16,384 tokens is trained once on the given corpus. Memory is the sum of the proportional
set sizes of all processes, sampled every 50 ms. Memory that processes share is counted once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from hfpretrain.data.corpus import Reader
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.recipe.schema import SourceSection, TokenizerSection


def write(path: Path, texts: list[str], num_bytes: int, as_one: bool) -> None:
    written, copy = 0, 0
    with path.open("w", encoding="utf-8") as file:
        if as_one:
            file.write('{"text": "')
        while written < num_bytes:
            for text in texts:
                changed = f"Copy {copy} of this document.\n{text}" if copy else text
                file.write(json.dumps(changed)[1:-1] + "\\n" if as_one else json.dumps({"text": changed}) + "\n")
                written += len(changed.encode())
                if written >= num_bytes:
                    break
            copy += 1
        if as_one:
            file.write('"}\n')


def peak(recipe: Path) -> tuple[float, float, dict[str, int]]:
    """Prepare; returns the peak MiB of the process tree, the seconds, and the account of the training split."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "hfpretrain.cli", "prepare", str(recipe)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    most = 0
    while process.poll() is None:
        try:
            tree = [process, *process.children(recursive=True)]
            most = max(most, sum(member.memory_full_info().pss for member in tree))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.05)
    folder = Path(process.stdout.read().split()[2])
    split = json.loads((folder / "manifest.json").read_text())["splits"]["train-0"]
    return most / 2**20, time.perf_counter() - start, split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[100, 2000])
    parser.add_argument("--document-megabytes", type=int, default=100)
    args = parser.parse_args()
    texts = [document.text for document in Reader(SourceSection(path="json", data_files=args.corpus)).read()]
    print("| corpus | peak memory of all processes | time | tokens |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        section = TokenizerSection(algorithm="byte_level_bpe", vocab_size=16384)
        train_tokenizer(section, texts).save_pretrained(folder / "tokenizer")
        jobs = [(megabytes, False) for megabytes in args.megabytes] + [(args.document_megabytes, True)]
        for megabytes, as_one in jobs:
            corpus = folder / "corpus.jsonl"
            write(corpus, texts, megabytes * 10**6, as_one)
            recipe = {
                "output_dir": str(folder / "run"),
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": {"pretrained": str(folder / "tokenizer")},
                "data": {
                    "sources": [{"path": "json", "data_files": str(corpus)}],
                    "validation_fraction": 0 if as_one else 0.01,
                    "block_size": 1024,
                },
                "optimizer": {"lr": 1e-3},
                "training": {"tokens_per_step": 1024, "micro_batch_size": 1, "max_steps": 1},
            }
            (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            mebibytes, seconds, split = peak(folder / "recipe.yaml")
            what = f"{megabytes:,} MB" + (", one document" if as_one else "")
            print(f"| {what} | {mebibytes:,.0f} MiB | {seconds:,.0f} s | {split['tokens']:,} |", flush=True)
            corpus.unlink()


if __name__ == "__main__":
    main()
