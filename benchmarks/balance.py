"""What balances experts: `python benchmarks/balance.py [--steps 300] [--engines single ddp fsdp2 zero2]`.

A tiny deepseek_v3 and a tiny qwen3_moe train on the source of the Python standard library with and without what
balances their experts. For the last log interval it prints the load of each layer: tokens of the most used expert over
the mean, the share of experts with less than a tenth of the mean, and the entropy over its maximum; and the validation
loss. Engines other than `single` run two processes. benchmarks/README.md has the figures.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import yaml
from small import rows, train

NUM_EXPERTS = 16
_SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4,
         "moe_intermediate_size": 32, "num_experts_per_tok": 2, "max_position_embeddings": 128}  # fmt: skip
MODELS = {
    "deepseek_v3": {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
                    "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
                    "qk_nope_head_dim": 16, "v_head_dim": 16, "num_hidden_layers": 4, **_SIZE},
    "qwen3_moe": {"num_experts": NUM_EXPERTS, "head_dim": 16, "norm_topk_prob": True, "num_hidden_layers": 3, **_SIZE},
}  # fmt: skip
KEYS = {"deepseek_v3": "router_bias_rate", "qwen3_moe": "router_aux_loss_coef"}
VALUES = {"deepseek_v3": (0.0, 1e-3, 0.01, 0.03), "qwen3_moe": (0.0, 1e-3, 0.01, 0.03)}


def recipe_of(folder: Path, name: str, steps: int, lr: float, seed: int) -> dict[str, object]:
    return {
        "seed": seed,
        "output_dir": "given by the command",
        "model": {"config": {"model_type": name, **MODELS[name]}},
        "tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 1024},
        "data": {
            "sources": [{"path": "builtin:python-stdlib", "max_bytes": 6_000_000}],
            "validation_fraction": 0.02,
            "block_size": 128,
            "prepared_dir": str(folder / "prepared"),
        },
        "optimizer": {"lr": lr},
        "scheduler": {"name": "cosine", "num_warmup_steps": steps // 20},
        "training": {"tokens_per_step": 1024, "micro_batch_size": 4, "max_steps": steps, "mixed_precision": "no"},
        "logging": {"every_steps": 50, "trackers": []},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--values", type=float, nargs="+", help="values of the key that balances, in place of VALUES")
    parser.add_argument("--engines", nargs="+", default=["single"])
    arguments = parser.parse_args()
    print(
        "| model | value | lr | seed | engine | largest load over mean, by layer | dead | entropy | validation loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [
            (model, value, lr, seed, engine)
            for model in arguments.models
            for lr in arguments.lr
            for value in arguments.values or VALUES[model]
            for seed in arguments.seeds
            for engine in arguments.engines
        ]
        for number, (model, value, lr, seed, engine) in enumerate(cases):
            path = folder / "recipe.yaml"
            path.write_text(yaml.safe_dump(recipe_of(folder, model, arguments.steps, lr, seed)))
            run = folder / str(number)
            done = train(
                path,
                f"--output_dir={run}",
                f"--training.{KEYS[model]}={value}",
                engine=None if engine == "single" else engine,
                processes=None if engine == "single" else 2,
                timeout=3600,
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            *_, last = rows(run, "experts/dead").values()
            *_, evaluated = rows(run, "eval/loss").values()
            loads = ", ".join(f"{value:.2f}" for value in last["experts/max_over_mean"])
            dead, entropy = max(last["experts/dead"]), min(last["experts/entropy"])
            cells = [model, f"{KEYS[model]} {value:g}", f"{lr:g}", seed, engine, loads, f"{dead:.0%}", f"{entropy:.3f}"]
            print(f"| {' | '.join(map(str, cells))} | {evaluated['eval/loss']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
