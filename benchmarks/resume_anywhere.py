"""Compare a run that changes its engine with one that does not: `python benchmarks/resume_anywhere.py`.

Each leg is `accelerate launch -m hfpretrain.train`, which resumes from the checkpoint of the previous leg. Prints the
largest relative difference of a step's loss and gradient norm in each leg, and of the weights at the end.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from small import rows, small_text, train, write_jsonl, write_recipe

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


def write(folder: Path, mixed_precision: str) -> Path:
    """Write a recipe whose schedule does not depend on its length."""
    write_jsonl(folder / "corpus.jsonl", small_text(300))
    changes = {"model__config__num_hidden_layers": 3, "scheduler__name": "constant_with_warmup"}
    changes |= {"training__tokens_per_step": 384, "training__mixed_precision": mixed_precision}
    return write_recipe(folder, checkpoint__every_steps=3, **changes)


def leg(recipe: Path, engine: str, processes: int, *overrides: str) -> str:
    """Train one leg; returns its stderr."""
    result = train(recipe, *overrides, engine=engine, processes=processes)
    if result.returncode:
        raise SystemExit(f"{engine} with {processes}:\n{result.stderr}")
    return result.stderr


def chain(folder: Path, legs: tuple[tuple[str, int], ...], mixed_precision: str = "no") -> tuple[list[dict], float]:
    """Train the legs, and a run that stays on one engine.

    Returns the largest differences in each leg, and that of the final weights, relative to the largest weight.
    """
    recipe = write(folder, mixed_precision)
    straight, changing = folder / "straight", folder / "changing"
    steps = STEPS * len(legs)
    leg(recipe, "single", 1, f"--output_dir={straight}", f"--training.max_steps={steps}")
    for number, (engine, processes) in enumerate(legs, 1):
        arguments = [f"--output_dir={changing}", f"--training.max_steps={STEPS * number}"]
        stderr = leg(recipe, engine, processes, *arguments)
        if number > 1 and "resumed from" not in stderr:
            raise SystemExit(f"{engine} did not resume:\n{stderr}")
    there, here = rows(straight, "loss"), rows(changing, "loss")
    table = []
    for number, (engine, processes) in enumerate(legs):
        steps = range(STEPS * number + 1, STEPS * (number + 1) + 1)
        row = {"engine": engine, "processes": processes, "steps": f"{steps[0]}-{steps[-1]}"}
        for key in ("loss", "grad_norm"):
            row[key] = max(abs(here[step][key] / there[step][key] - 1) for step in steps)
        row["ledger"] = all(here[step]["ledger"] == there[step]["ledger"] for step in steps)
        table.append(row)
    weights = [load_file(run / "model" / "model.safetensors") for run in (straight, changing)]
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
