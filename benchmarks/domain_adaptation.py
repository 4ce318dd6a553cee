"""Train a base model further on new text, with and without replay of its old text and new tokens, at equal tokens.

    python benchmarks/domain_adaptation.py NEW.jsonl.gz [--base RUN] [--base-recipe quickstart] [--base-steps 500]
        [--steps 500] [--lr 2e-3] [--replay 0.25] [--learn 1000] [--arms plain replay extend both] [--output FOLDER]

NEW has one document a line under the key `text`. The base is the finished run `--base`, or is trained first, from the
recipe `--base-recipe`. Four runs train it further for the same number of tokens: `plain` on new text alone, `replay` on
a mixture in which the share `--replay` is old text, `extend` on new text with `--learn` more tokens learned on it
(`tokenizer.extend`), `both` on the mixture with more tokens. The table has the bits per byte of held-out old and new
text, which don't depend on the tokenizer, and what each run gained or lost, with 95% intervals of the paired
difference. Old held-out text is the validation text of the base's recipe. One in twenty documents of NEW is held out,
by a hash of its text.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from small import train, write_jsonl

ARMS = {"plain": (False, False), "replay": (True, False), "extend": (False, True), "both": (True, True)}
"""For each run, whether it has replay and new tokens."""
HELD_OUT = 20


def is_held_out(text: str) -> bool:
    """Whether a document of the new text is held out."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % HELD_OUT == 0


def base_run(recipe: str, steps: int, output: Path) -> Path:
    """Train the base, or return its run folder if that was done before."""
    from hfpretrain import load_recipe

    run = output / "base"
    if not (run / "model" / "config.json").is_file():
        path = output / "base.yaml"
        mapping = load_recipe(recipe, [f"--output_dir={run}", f"--training.max_steps={steps}"]).model_dump(mode="json")
        path.write_text(yaml.safe_dump(mapping), encoding="utf-8")
        train_recipe(path)
    return run


def train_recipe(recipe: Path) -> None:
    """Train a recipe, or resume it. Raises `RuntimeError` if the run fails."""
    done = train(recipe, timeout=24 * 3600)
    if done.returncode:
        raise RuntimeError(f"the training of {recipe} failed:\n{done.stdout}{done.stderr}")
    print(f"trained {recipe.stem}", file=sys.stderr, flush=True)


def write_held_out(base: Path, new: Path, output: Path) -> dict[str, list[str]]:
    """Write `old.jsonl` and `new.jsonl`, the held-out text, and return their documents by domain."""
    from hfpretrain.data.corpus import Reader
    from hfpretrain.evaluation.texts import recipe_texts
    from hfpretrain.recipe.schema import SourceSection
    from hfpretrain.recipe.yaml import read_recipe

    old = [str(text) for some in recipe_texts(read_recipe(base / "recipe.yaml").data).values() for text in some]
    read = Reader(SourceSection(path="json", data_files=str(new)), "NEW").read()
    texts = {"old": old, "new": [found.text for found in read if found.text and is_held_out(found.text)]}
    for name, documents in texts.items():
        if not documents:
            raise SystemExit(f"no document of the {name} text is held out; give more text")
        write_jsonl(output / f"{name}.jsonl", documents)
    return texts


def write_recipe(arm: str, base: Path, new: Path, output: Path, args: argparse.Namespace) -> Path:
    """The recipe of a run. A training document that is equal to a held-out one is left out by hfpretrain itself."""
    from hfpretrain.recipe.yaml import read_recipe

    replays, extends = ARMS[arm]
    mapping: dict[str, Any] = read_recipe(base / "recipe.yaml").model_dump(mode="json", exclude_defaults=True)
    model = str(base / "model")
    source: dict[str, Any] = {"path": "json", "data_files": str(new)}
    sources = [{**source, "weight": 1 - args.replay}] if replays else [source]
    if replays:
        old = mapping["data"]["sources"]
        sources += [{**one, "weight": args.replay / len(old)} for one in old]
    held_out = [
        {"path": "json", "data_files": str(output / f"{domain}.jsonl"), "domain": domain} for domain in ("old", "new")
    ]
    recipe = {
        "output_dir": str(output / arm),
        "model": {"pretrained": model},
        "tokenizer": {"pretrained": model, **({"extend": {"learn": args.learn}} if extends else {})},
        "data": {"sources": sources, "validation_sources": held_out, "block_size": mapping["data"]["block_size"]},
        "optimizer": {"lr": args.lr},
        "scheduler": {"name": "linear", "num_warmup_steps": min(20, args.steps // 10)},
        "training": {**mapping["training"], "max_steps": args.steps},
        "evaluation": {"every_steps": max(1, args.steps // 5)},
        "logging": {"trackers": []},
    }
    recipe["training"].pop("max_tokens", None)
    path = output / f"{arm}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def measure(arms: Sequence[str], base: Path, output: Path, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Compare each run with the base on the held-out text. The figures are those of `hfpretrain compare`."""
    from hfpretrain.evaluation.score import Windows, compare_checkpoints
    from hfpretrain.recipe.yaml import read_recipe

    windows = Windows(read_recipe(base / "recipe.yaml").data.block_size)
    found = {}
    for arm in arms:
        found[arm] = compare_checkpoints(str(base / "model"), str(output / arm / "model"), texts, windows)
        for side in "ab":
            size = sum(len(text.encode()) for text in texts["new"])
            found[arm][side]["new/bytes_per_token"] = size / found[arm][side]["new/tokens"]
    return found


def table(found: dict[str, Any]) -> str:
    """A table with a row for the base and for each run."""
    from hfpretrain.evaluation.base import gain_text

    columns = ["run", "old: bits per byte", "old, compared with the base", "new: bits per byte"]
    columns += ["new, compared with the base", "new: bytes per token"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, report in (("base", next(iter(found.values()))), *found.items()):
        figures, cells = report["a" if name == "base" else "b"], [name]
        for domain in ("old", "new"):
            key = f"{domain}/bits_per_byte_difference"
            gain = "" if name == "base" else gain_text(report[key], report[f"{key}_interval"])
            cells += [f"{figures[f'{domain}/bits_per_byte']:.4f}", gain]
        cells.append(f"{figures['new/bytes_per_token']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def adapt(args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Train all runs and return the figures of each."""
    output.mkdir(parents=True, exist_ok=True)
    base = Path(args.base) if args.base else base_run(args.base_recipe, args.base_steps, output)
    new = Path(args.new).absolute()
    texts = write_held_out(base, new, output)
    for arm in args.arms:
        train_recipe(write_recipe(arm, base, new, output, args))
    return measure(args.arms, base, output, texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--base", metavar="RUN")
    parser.add_argument("--base-recipe", default="quickstart")
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--replay", type=float, default=0.25)
    parser.add_argument("--learn", type=int, default=1000)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--output", metavar="FOLDER", help="keeps the runs; the same folder again resumes them")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = adapt(args, Path(args.output or scratch).absolute())
    if args.output:
        (Path(args.output) / "figures.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
