"""Extend the context of a model from 256 to 1,024 tokens, and compare with as much training at 256.

    python benchmarks/extend_context.py [--base RUN] [--steps 200] [--rope-theta 80000] [--output FOLDER]

The base is the finished run `--base` of `recipes/quickstart.yaml`, or is trained first for 500 steps. Two runs train it
further on the same text, for the same number of tokens and with the same rates: `256 tokens` with the base's blocks,
`1,024 tokens` with a stage of longer blocks and a larger rope_theta, which begins at a tenth of the steps. The table
has the loss in nats per token on the held-out text, by the number of tokens that a prediction sees.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml
from domain_adaptation import base_run, train_recipe
from small import rows

RANGES = ("32-63", "64-127", "128-255", "256-511", "512-1023")
SHORT, LONG = 256, 1024


def recipes(base: Path, args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """The recipes of the two runs, by the name of the run in the table."""
    from hfpretrain.recipe.yaml import read_recipe

    mapping: dict[str, Any] = read_recipe(base / "recipe.yaml").model_dump(mode="json", exclude_defaults=True)
    model = str(base / "model")
    mapping |= {
        "model": {"pretrained": model, "config_overrides": {"max_position_embeddings": LONG}},
        "tokenizer": {"pretrained": model},
        "scheduler": {"name": "linear", "num_warmup_steps": args.steps // 20},
        "evaluation": {"every_steps": args.steps},
        "logging": {"trackers": []},
        "optimizer": {"lr": args.lr},
    }
    mapping["training"].pop("max_tokens", None)
    mapping["training"] |= {"max_steps": args.steps, "tokens_per_step": 8 * LONG}
    mapping["data"]["block_size"] = SHORT
    stage = {
        "from_tokens": args.steps // 10 * 8 * LONG,
        "block_size": LONG,
        "rope_parameters": {"rope_theta": args.rope_theta},
    }
    longer = {**mapping["data"], "stages": [stage]}
    return {
        f"{SHORT} tokens": {**mapping, "output_dir": str(folder / "same")},
        f"{LONG:,} tokens": {**mapping, "output_dir": str(folder / "longer"), "data": longer},
    }


def losses(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Losses by context of the base and of both runs."""
    from hfpretrain import load_recipe
    from hfpretrain.evaluation.score import evaluate_perplexity

    folder.mkdir(parents=True, exist_ok=True)
    base = Path(args.base).absolute() if args.base else base_run("quickstart", 500, folder)
    found: dict[str, dict[str, float]] = {}
    for name, mapping in recipes(base, args, folder).items():
        run = Path(mapping["output_dir"])
        path = folder / f"{run.name}.yaml"
        path.write_text(yaml.safe_dump(mapping), encoding="utf-8")
        train_recipe(path)
        found[name] = evaluate_perplexity(run / "model", load_recipe(path), block_size=LONG)["loss_by_context"]
    # The base's own config allows fewer than 1,024 tokens. The longer run has evaluated it with more before training.
    return {"base": rows(folder / "longer", "eval/loss")[0]["eval/loss_by_context"], **found}


def table(found: dict[str, dict[str, float]]) -> str:
    """A table with a row for each model."""
    lines = [f"| trained further with | {' | '.join(RANGES)} |", "|---" * (len(RANGES) + 1) + "|"]
    for name, by_range in found.items():
        lines.append(f"| {name} | {' | '.join(f'{by_range[one]:.3f}' for one in RANGES)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="RUN")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rope-theta", type=float, default=80_000)
    parser.add_argument("--output", metavar="FOLDER", help="keeps the runs; the same folder again resumes them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(table(losses(args, Path(args.output or scratch).absolute())))


if __name__ == "__main__":
    main()
