"""A run that moves from engine to engine, beside one that never moved: `python benchmarks/resume_anywhere.py`.

Each leg is `accelerate launch -m hfpretrain.train`, which goes on from the checkpoint of the leg before. Prints the
largest relative difference of a step's loss and gradient norm on each leg, and of the weights at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
CHAIN = (
    ("zero3", 2),
    ("fsdp2", 2),
    ("ddp", 1),
    ("zero2", 2),
    ("single", 1),
    ("zero1", 2),
    ("fsdp2_offload", 1),
    ("ddp", 3),
    ("zero3_offload", 2),
    ("tp", 2),
    ("zero2", 1),
    ("fsdp2", 3),
)
STEPS = 5
TOLERANCE = 1e-5


def mapping(folder: Path, mixed_precision: str) -> dict:
    """A recipe of a llama on text that is written into `folder`; its schedule does not depend on its length."""
    words = "the a of river stone light runs falls under over quiet green water"
    text = "".join(
        json.dumps({"text": " ".join(words.split()[(n * k) % 13] for k in range(20 + n % 60))}) + "\n"
        for n in range(300)
    )
    (folder / "corpus.jsonl").write_text(text)
    return {
        "output_dir": str(folder / "run"),
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            }
        },
        "tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 300},
        "data": {
            "sources": [{"path": "json", "data_files": str(folder / "corpus.jsonl")}],
            "validation_fraction": 0.1,
            "block_size": 32,
        },
        "optimizer": {"lr": 1e-3},
        "scheduler": {"name": "constant_with_warmup", "num_warmup_steps": 4},
        "training": {
            "tokens_per_step": 384,
            "micro_batch_size": 2,
            "max_steps": STEPS,
            "mixed_precision": mixed_precision,
        },
        "checkpoint": {"every_steps": 3},
        "logging": {"every_steps": 1, "trackers": []},
    }


def train(recipe: Path, engine: str, processes: int, *overrides: str) -> str:
    """One leg; returns what it wrote to stderr."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml"), "--num_processes", str(processes)]
    command += ["-m", "hfpretrain.train", str(recipe), *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "20000", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{engine} with {processes}:\n{result.stderr}")
    return result.stderr


def rows(run: Path) -> dict[int, dict]:
    """The log lines by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def chain(folder: Path, legs: tuple[tuple[str, int], ...], mixed_precision: str = "no") -> tuple[list[dict], float]:
    """Run the legs and the run that never moved: of each leg its greatest differences, and that of the last weights,
    relative to the largest weight."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(mapping(folder, mixed_precision)))
    straight, moved = folder / "straight", folder / "moved"
    steps = STEPS * len(legs)
    train(recipe, "single", 1, f"--output_dir={straight}", f"--training.max_steps={steps}")
    for number, (engine, processes) in enumerate(legs, 1):
        arguments = [f"--output_dir={moved}", f"--training.max_steps={STEPS * number}"]
        stderr = train(recipe, engine, processes, *arguments)
        if number > 1 and "resumed from" not in stderr:
            raise SystemExit(f"{engine} did not resume:\n{stderr}")
    there, here = rows(straight), rows(moved)
    table = []
    for number, (engine, processes) in enumerate(legs):
        leg = range(STEPS * number + 1, STEPS * (number + 1) + 1)
        row = {"engine": engine, "processes": processes, "steps": f"{leg[0]}-{leg[-1]}"}
        for key in ("loss", "grad_norm"):
            row[key] = max(abs(here[step][key] / there[step][key] - 1) for step in leg)
        row["ledger"] = all(here[step]["ledger"] == there[step]["ledger"] for step in leg)
        table.append(row)
    weights = [load_file(run / "model" / "model.safetensors") for run in (straight, moved)]
    largest = max(float(tensor.abs().max()) for tensor in weights[0].values())
    return table, max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) / largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table, weights = chain(Path(folder), CHAIN, args.mixed_precision)
    print("| engine | processes | steps | loss | gradient norm | same ledger |\n|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row['engine']} | {row['processes']} | {row['steps']} | {row['loss']:.1e} | {row['grad_norm']:.1e} | "
            f"{'yes' if row['ledger'] else 'NO'} |"
        )
    print(f"\nlargest difference of a weight at the end, relative to the largest weight: {weights:.1e}")
    if args.mixed_precision == "no" and not all(row["loss"] <= TOLERANCE and row["ledger"] for row in table):
        raise SystemExit(f"a loss differs by more than {TOLERANCE}, or a ledger does")


if __name__ == "__main__":
    main()
