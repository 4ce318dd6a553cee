"""Run all benchmarks for a GPU and write their tables into one page: `python benchmarks/gpu.py [--only WORD ...]`.

Each part is a benchmark of this folder with sizes for a GPU. Nothing is downloaded. `--quick` takes fewer steps, to try
a new machine. Without a GPU all sizes are tiny, and fp8 is left out. The page is written to `--results`. The exit code
is 1 if any part fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from small import ROOT, environment, small_text, write_jsonl

TOY = ("--model.config.n_layer=2", "--model.config.n_embd=64", "--model.config.n_head=2", "--data.block_size=64",
       "--training.tokens_per_step=512", "--training.micro_batch_size=4")  # fmt: skip
LLAMA_TOY = ("--model.config.num_hidden_layers=2", "--model.config.hidden_size=64", "--model.config.head_dim=16",
             "--model.config.intermediate_size=128", "--model.config.num_attention_heads=4", "--data.block_size=64",
             "--model.config.num_key_value_heads=2", "--training.tokens_per_step=512")  # fmt: skip


def parts(corpus: Path, nanogpt: Path | None, quick: bool) -> dict[str, list[str]]:
    """The arguments of `python` for each part, by its title."""
    toy = not torch.cuda.is_available()
    local = [f"--data.sources=[{{path: json, data_files: {corpus}}}]", "--data.validation_fraction=0.0"]
    local += ["--evaluation.every_steps=null"]
    local += [f"--data.prepared_dir={corpus.parent / 'prepared'}", "--tokenizer.pretrained=null"]
    local += ["--tokenizer.algorithm=byte_level_bpe", "--tokenizer.vocab_size=512"]
    local += ["--training.document_masking=false"]  # the other programs don't mask documents
    gpt2 = ["recipes/gpt2-124m-openwebtext.yaml", *local, "--steps", "6" if quick else "18"]
    gpt2 += TOY if toy else ["--training.micro_batch_size=32"]
    # Two processes share the GPU's memory, so that batches are smaller.
    few = ["--training.tokens_per_step=131072", "--training.micro_batch_size=16"]
    of_gpt2 = ["nothing", "bf16", "tf32", "fused", "sdpa", "masked", "compiled", "chunked", "prefetch", "foreach"]
    defaults = ["benchmarks/defaults.py", *gpt2, *([] if toy else few), "--only", *(["fused"] if toy else of_gpt2)]
    gpt2 = ["benchmarks/train_step.py", *gpt2, "--rounds", "1"]
    llama = ["recipes/llama-1b-fineweb-edu.yaml", *local, "--steps", "6" if quick else "12"]
    llama += LLAMA_TOY if toy else ["--training.tokens_per_step=131072", "--training.micro_batch_size=8"]
    layers = ["--training.micro_batch_size=4", "--model.config.num_hidden_layers=6", "--model.config.vocab_size=32768"]
    of_llama = ["benchmarks/defaults.py", *llama, *([] if toy else layers)]
    of_llama += ["--only", *(["compiled"] if toy else ["fp8", "Liger", "flex"])]
    llama = ["benchmarks/train_step.py", *llama, "--rounds", "1"]
    small_steps = [] if toy else ["--training.micro_batch_size=2", "--training.tokens_per_step=65536"]
    beside_trainer = [*llama, "--training.compile=true", *small_steps]
    llama += ["--no-trainer"]
    peer = ["--nanogpt", str(nanogpt)] if nanogpt else []
    commands = {
        "engines": ["benchmarks/gpu_check.py", "--jobs", "5", "--steps", "5" if quick else "20"],
        "GPT-2 124M, compiled": [*gpt2, *peer, "--training.compile=true"],
        "GPT-2 124M": [*gpt2, "--training.compile=false"],
        "llama 1 B, compiled": [*llama, "--training.compile=true"],
        "llama 1 B, compiled, activations checkpointed": [
            *llama,
            "--training.compile=true",
            "--model.gradient_checkpointing=true",
        ],
        "llama 1 B, compiled, heads of 128": [
            *llama,
            "--training.compile=true",
            *([] if toy else ["--model.config.head_dim=128", "--model.config.num_attention_heads=16"]),
        ],
        "llama 1 B, compiled, fp8": [*llama, "--training.compile=true", "--training.mixed_precision=fp8"],
        "llama 1 B, compiled, micro-steps of 4,096 tokens, beside Trainer": beside_trainer,
        "defaults of GPT-2": defaults,
        "defaults of a llama": of_llama,
        "the loss": ["benchmarks/loss_memory.py", *(["--quick"] if toy else [])],
        "a save": ["benchmarks/save_stall.py", "--num-layers", *(["2", "--hidden-size", "64"] if toy else ["4"])],
    }
    if toy:
        del commands["llama 1 B, compiled, fp8"]
    return commands


def tables(command: list[str]) -> tuple[list[str], int]:
    """Run a benchmark; returns the rows of its tables, which are also printed, and its exit code."""
    env = environment(OMP_NUM_THREADS=str(max(1, len(os.sched_getaffinity(0)) // 2)))  # the CPU draws the weights
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        if line.startswith("|"):
            lines.append(line.rstrip())
            print(lines[-1], flush=True)
    return lines, process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="parts whose title contains one of these words")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("gpu.md"))
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    page = [f"# On {device}, torch {torch.__version__}"]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_jsonl(Path(folder) / "corpus.jsonl", small_text(20_000))
        commands = parts(corpus, args.nanogpt, args.quick)
        titles = [title for title in commands if any(word in title for word in args.only)]
        if not titles:
            parser.error(f"--only {' '.join(args.only)}: matches none of {', '.join(commands)}")
        args.results.write_text("", encoding="utf-8")  # fails now if the file can't be written
        for title in titles:
            command = commands[title]
            start = time.perf_counter()
            shown = " ".join(command).replace(str(corpus.parent), "CORPUS")
            page.append(f"## {title}\n\n`python {shown}`")
            print(page[-1], end="\n\n", flush=True)
            lines, code = tables([sys.executable, *command])
            failed += code != 0
            page.append("\n".join(lines))
            print(f"exit code {code}, {time.perf_counter() - start:.0f} s\n", flush=True)
            args.results.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
