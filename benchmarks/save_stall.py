"""How long a save stops training: `python benchmarks/save_stall.py [--hidden-size N] [--num-layers N]`.

Two runs of the same model, one that saves in the foreground and one in the background. The limit is a plain copy of as
many bytes in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from small import small_text, train, write_jsonl, write_recipe


def saves(folder: Path, asynchronous: bool, hidden_size: int, num_layers: int) -> tuple[list[dict], list[float]]:
    """Train; returns the rows of `metrics.jsonl` about saves in the middle of the run, and tokens per second."""
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    sizes = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": num_layers}
    changes = {f"model__config__{key}": value for key, value in sizes.items()}
    changes |= {"data__validation_fraction": 0.0, "training__mixed_precision": "bf16", "training__max_steps": 13}
    checkpoint = {"every_steps": 4, "keep_last": 1, "async_save": asynchronous}
    result = train(write_recipe(folder, checkpoint=checkpoint, **changes), timeout=3000, OMP_NUM_THREADS="2")
    if result.returncode:
        raise SystemExit(result.stderr)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "save/seconds" in line and line["step"] < 13]
    return found, [line["tokens_per_second"] for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--num-layers", type=int, default=12)
    args = parser.parse_args()
    print("| save | MiB | training is stopped, s | until the checkpoint is complete, s |\n|---|---|---|---|")
    size = 0
    for asynchronous in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            found, _ = saves(Path(folder), asynchronous, args.hidden_size, args.num_layers)
        size = found[0]["save/bytes"]
        # Most saves wait for the previous one, which is not measured here.
        stalls = [row["save/stall_seconds"] - row["save/waited_seconds"] for row in found]
        seconds = [row["save/seconds"] - row["save/waited_seconds"] for row in found]
        name = "in the background" if asynchronous else "in the foreground"
        spread = f"{median(stalls):.2f} ({min(stalls):.2f} to {max(stalls):.2f})"
        print(f"| {name} | {size / 2**20:,.0f} | {spread} | {median(seconds):.1f} |", flush=True)
    tensor = torch.ones(size // 4)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        tensor.clone()
        times.append(time.perf_counter() - start)
    print(f"| a copy in memory, the limit | {size / 2**20:,.0f} | {median(times):.2f} | |")


if __name__ == "__main__":
    main()
