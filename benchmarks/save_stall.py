"""How long training stands still for a save: `python benchmarks/save_stall.py [--hidden-size N] [--num-layers N]`.

One run that saves in the foreground and one in the background, of the same model, in the same call. The limit beside
them: a plain copy of as many bytes in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import yaml
from resume_anywhere import ROOT, mapping


def saves(folder: Path, asynchronous: bool, hidden_size: int, num_layers: int) -> tuple[list[dict], list[float]]:
    """Rows of `metrics.jsonl` of the saves in the middle of a run, and tokens per second."""
    recipe = mapping(folder, "bf16")
    recipe["output_dir"] = str(folder / f"run-{asynchronous}")
    recipe["model"]["config"] |= {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size}
    recipe["model"]["config"] |= {"num_hidden_layers": num_layers, "num_attention_heads": 16, "num_key_value_heads": 16}
    recipe["data"]["validation_fraction"] = 0.0
    recipe["training"] |= {"tokens_per_step": 256, "max_steps": 13}
    recipe["checkpoint"] = {"every_steps": 4, "keep_last": 1, "async_save": asynchronous}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "hfpretrain.train", str(folder / "recipe.yaml")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    lines = [json.loads(line) for line in (folder / f"run-{asynchronous}" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "save/seconds" in line and line["step"] < 13]
    return found, [line["tokens_per_second"] for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden-size", type=int, default=1536)
    parser.add_argument("--num-layers", type=int, default=12)
    args = parser.parse_args()
    print("| save | MiB | training stands still, s | until sealed, s |\n|---|---|---|---|")
    size = 0
    for asynchronous in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            found, _ = saves(Path(folder), asynchronous, args.hidden_size, args.num_layers)
        size = found[0]["save/bytes"]
        # A save that waits for the one before is the rule, but not what is measured.
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
