"""Every engine on one device, a GPU or with tiny sizes this machine's CPU: a table with a row for each run.

    python benchmarks/gpu_check.py [--rows WORD ...] [--steps 20] [--jobs 1]

The same llama is trained on the same random words with every engine and one process; and with `single` in every
precision, with Liger's kernels, flash attention and the naive loss. Columns: whether the initial weights equal those of
the first row; the largest relative difference of a step's loss from the first row; tokens/s and MFU; measured and
predicted peak memory; the largest difference of a logit between the training process on the device and plain
transformers on the CPU. A row that is refused shows the reason. With several `--jobs` tokens/s are left out, since runs
slow each other down. The table is printed and written to benchmarks/results/gpu_check.md.
"""

import argparse
import itertools
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from equivalence import write_recipe
from small import ROOT, rows

# By row: engine and changes of the recipe. The other rows are compared with the first.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("single", {"training.mixed_precision": "bf16"}),
    **{
        f"{engine} bf16": (engine, {"training.mixed_precision": "bf16"})
        for engine in ("ddp", "fsdp2", "fsdp2_offload", "zero1", "zero2", "zero3", "zero3_offload")
    },
    "float32": ("single", {"training.mixed_precision": "no"}),
    "tf32": ("single", {"training.mixed_precision": "tf32"}),
    "fp16": ("single", {"training.mixed_precision": "fp16"}),
    "fp8": ("single", {"training.mixed_precision": "fp8"}),
    "fsdp2 fp16": ("fsdp2", {"training.mixed_precision": "fp16"}),
    "zero2 fp16": ("zero2", {"training.mixed_precision": "fp16"}),
    "compile": ("single", {"training.mixed_precision": "bf16", "training.compile": True}),
    "checkpointing": ("single", {"training.mixed_precision": "bf16", "model.gradient_checkpointing": True}),
    "naive loss": ("single", {"training.mixed_precision": "bf16", "training.chunked_loss": False}),
    "liger": ("single", {"training.mixed_precision": "bf16", "model.use_liger_kernel": True}),
    "flash 2": ("single", {"training.mixed_precision": "bf16", "model.attn_implementation": "flash_attention_2"}),
    "bf16 export": ("single", {"training.mixed_precision": "bf16", "model.dtype": "bfloat16"}),
}
# On a GPU the size of GPT-2 and a large vocabulary, so that memory and speed are realistic.
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
         "num_key_value_heads": 12, "max_position_embeddings": 1024, "vocab_size": 50304}  # fmt: skip


def recipe_of(folder: Path, steps: int) -> Path:
    """Write the recipe of all rows: that of `equivalence.py` with other sizes."""
    path = write_recipe(folder, "llama", 1, "no", steps)
    if torch.cuda.is_available():
        recipe = yaml.safe_load(path.read_text())
        recipe["model"]["config"].update(LARGE)
        recipe["data"]["block_size"] = 512
        recipe["training"].update(tokens_per_step=16 * 512, micro_batch_size=8)
        path.write_text(yaml.safe_dump(recipe))
    return path


def run(recipe: Path, name: str, engine: str, changes: dict[str, Any]) -> Path | str:
    """Train with one process; returns the run folder, or the reason if the run failed."""
    output_dir = recipe.parent / name.replace(" ", "-")
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml"), "--num_processes", "1"]
    command += ["-m", "hfpretrain.train", str(recipe), f"--output_dir={output_dir}"]
    command += [f"--{key}={str(value).lower()}" for key, value in changes.items()]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    except subprocess.TimeoutExpired:
        return "took longer than 500 s"
    if done.returncode == 0:
        return output_dir
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    refused = [lines[n + 1] for n, line in enumerate(lines[:-1]) if line.startswith("error in")]
    return (refused or [line for line in lines if "Error" in line][-1:] or lines[-1:] or ["no message"])[0]


def cells(run: Path, first: Path, with_rates: bool) -> list[str]:
    """The cells of a finished run."""
    losses, known = rows(run, "loss"), rows(first, "loss")
    difference = max(abs(losses[step]["loss"] / known[step]["loss"] - 1) for step in known)
    kept = json.loads((run / "plan.json").read_text())
    (export,) = rows(run, "export/max_logit_difference").values()
    ours, theirs = (json.loads((path / "environment.json").read_text())["initial_weights"] for path in (run, first))
    last = losses[max(losses)]
    memory = [kept[part]["peak_memory"] for part in ("measured", "prediction")]
    return [
        "same" if ours == theirs else "OTHER",
        f"{last['loss']:.4f}",
        f"{difference:.1e}",
        f"{last['tokens_per_second']:,.0f}" if with_rates else "",
        f"{last['mfu']:.3f}" if with_rates and last["mfu"] is not None else "",
        *("-" if size is None else f"{size / 2**20:,.0f} MiB" for size in memory),
        f"{export['export/max_logit_difference']:.1e}",
    ]


def print_rows(found: Iterable[tuple[str, Path | str]], first: Path, with_rates: bool) -> list[str]:
    """Compute the rows of the table, and print each when it is done."""
    lines = []
    for name, run in found:
        texts = [run.replace("|", "/")[:160]] if isinstance(run, str) else cells(run, first, with_rates)
        lines.append(f"| {name} | {' | '.join(texts)} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", help="only the first row and rows whose name contains one of these words")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_check.md")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor() or 'CPU'}, no GPU"
    lines = [
        f"{device}; torch {torch.__version__}, {args.steps} steps",
        "",
        "| run | initial | last loss | loss | tokens/s | MFU | peak memory | predicted | export logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print(*lines, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(Path(folder), args.steps)
        first_name = next(iter(RUNS))
        first = run(recipe, first_name, *RUNS[first_name])  # prepares the data for all rows
        if isinstance(first, str):
            sys.exit(f"the first row failed: {first}")
        wanted = [n for n in RUNS if n != first_name and (not args.rows or set(args.rows) & set(n.split()))]
        with ThreadPoolExecutor(args.jobs) as pool:
            others = pool.map(lambda name: run(recipe, name, *RUNS[name]), wanted)
            found_runs = zip([first_name, *wanted], itertools.chain([first], others), strict=True)
            lines += print_rows(found_runs, first, with_rates=args.jobs == 1)
    args.results.parent.mkdir(exist_ok=True)
    args.results.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
