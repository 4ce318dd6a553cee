"""A small corpus, a small recipe, and the commands that train it, for benchmarks and tests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
WORDS = ("the", "a", "of", "river", "stone", "light", "runs", "falls", "under", "over", "quiet", "green", "water")


def small_text(num_documents: int, seed: int = 0) -> list[str]:
    """Documents of random words with some Unicode, which depend only on the seed."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(WORDS) for _ in range(draw.randint(20, 120))) + f" №{number} — ünïcode 漢字 🌊"
        for number in range(num_documents)
    ]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def recipe_mapping(folder: Path, **changes: object) -> dict:
    """A valid recipe of a tiny llama on `folder/corpus.jsonl`. `changes`: recipe keys with `__` instead of dots."""
    mapping: dict = {
        "output_dir": str(folder / "run"),
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            }
        },
        "tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 320},
        "data": {
            "sources": [{"path": "json", "data_files": str(folder / "corpus.jsonl")}],
            "validation_fraction": 0.1,
            "block_size": 32,
        },
        "optimizer": {"lr": 3e-3},
        "scheduler": {"name": "cosine", "num_warmup_steps": 2},
        "training": {"tokens_per_step": 256, "micro_batch_size": 2, "max_steps": 8, "mixed_precision": "no"},
        "logging": {"every_steps": 1, "trackers": []},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = mapping
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return mapping


def write_recipe(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_mapping(folder, **changes)), encoding="utf-8")
    return path


def environment(**extra: str) -> dict[str, str]:
    launcher = ("ACCELERATE_", "FSDP_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launcher)}
    return {**kept, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "HF_HUB_OFFLINE": "1", **extra}


FAULTS = ROOT / "tests" / "faults.py"


def command(
    recipe: Path, *overrides: str, engine: str | None = None, processes: int | None = None, faults: bool = False
) -> list[str]:
    """`accelerate launch` with an engine's file, or `python -m` without an engine.

    `faults`: whether the process can inject the faults of `tests/faults.py`.
    """
    training = [str(FAULTS)] if faults else ["-m", "hfpretrain.train"]
    if engine is None:
        return [sys.executable, *training, str(recipe), *overrides]
    config = str(ROOT / "accelerate_configs" / f"{engine}.yaml")
    # A free port for each launch, since several may run at once.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0"]
    launch += ["--config_file", config, *(["--num_processes", str(processes)] if processes else [])]
    return [*launch, *training, str(recipe), *overrides]


def train(
    recipe: Path,
    *overrides: str,
    engine: str | None = None,
    processes: int | None = None,
    timeout: int = 300,
    **env: str,
) -> subprocess.CompletedProcess:
    """Run `command`, and return the finished process."""
    return subprocess.run(
        command(recipe, *overrides, engine=engine, processes=processes),
        cwd=ROOT,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def rows(run: Path, key: str) -> dict[int, dict]:
    """Lines of `metrics.jsonl` that have `key`, by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if key in line}
