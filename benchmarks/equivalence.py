"""One recipe with every engine on two CPU processes, compared with one process.

    python benchmarks/equivalence.py [--engines ddp fsdp2 ...] [--models llama gpt2 qwen3_moe] [--accumulation 1 3]
                                     [--precision no bf16] [--steps 50]

Documents are masked in all runs. Each figure is the largest relative difference of any step from the run of one process
in the same precision; `weights` is the largest absolute difference of an exported weight. `initial` is whether the
checksum of all weights before the first step is the same.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import yaml
from safetensors.torch import load_file
from small import rows, train, write_jsonl

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
_SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": {"model_type": "llama", "intermediate_size": 176, "num_key_value_heads": 2, **_SIZE},
    "gpt2": {"model_type": "gpt2", "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
             **_SIZE},
    "qwen3_moe": {"model_type": "qwen3_moe", "intermediate_size": 176, "moe_intermediate_size": 32, "num_experts": 8,
                  "num_experts_per_tok": 2, "norm_topk_prob": True, "output_router_logits": True,
                  "router_aux_loss_coef": 0.01, "num_key_value_heads": 2, **_SIZE},
}  # fmt: skip
# The largest allowed relative differences of loss and gradient norm, and the largest absolute difference of an exported
# weight. In bf16, engines that shard cast weights and gradients to bf16, but one process and ddp autocast float32
# weights. Measured over 50 steps: results/equivalence.md.
TOLERANCES = {"no": (1e-5, 1e-4, 1e-4), "bf16": (5e-4, 5e-2, 2e-2)}


def write_recipe(folder: Path, model: str, accumulation: int, precision: str, steps: int) -> Path:
    """A recipe with 4 x `accumulation` sequences a step in micro-batches of 2, and its corpus of random words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(200)]
    documents = [" ".join(draw.choices(words, k=draw.randint(10, 80))) for _ in range(400)]
    corpus = write_jsonl(folder / "corpus.jsonl", documents)
    recipe = {
        "output_dir": "given by the command",
        "model": {"config": MODELS[model]},
        "tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 512},
        "data": {
            "sources": [{"path": "json", "data_files": str(corpus)}],
            "validation_fraction": 0.05,
            "block_size": 64,
            "prepared_dir": str(folder / "prepared"),
        },
        "optimizer": {"lr": 1e-3},
        "scheduler": {"name": "cosine", "num_warmup_steps": min(5, steps // 2)},
        "training": {
            "tokens_per_step": 4 * accumulation * 64,
            "micro_batch_size": 2,
            "max_steps": steps,
            "mixed_precision": precision,
            "document_masking": True,
        },
        "logging": {"every_steps": 1, "trackers": []},
    }
    path = folder / f"{model}-{accumulation}-{precision}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def run(recipe: Path, engine: str) -> Path:
    """Train `recipe` with `engine` on two processes (`single`: one), and return the run folder."""
    output_dir = recipe.with_suffix("") / engine
    done = train(recipe, f"--output_dir={output_dir}", engine=engine, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{engine} failed on {recipe}:\n{done.stdout}{done.stderr}")
    return output_dir


def differences(single: Path, other: Path) -> dict[str, float | bool]:
    """Compare two runs of one recipe. Raises `AssertionError` if they did not train on the same data."""
    found: dict[str, float | bool] = {}
    environments = [json.loads((run / "environment.json").read_text()) for run in (single, other)]
    found["initial"] = environments[0]["initial_weights"] == environments[1]["initial_weights"]
    assert all(environment["document_masking"] for environment in environments)
    ledgers = [{step: row["ledger"] for step, row in rows(run, "ledger").items()} for run in (single, other)]
    assert ledgers[0] == ledgers[1] and len(set(ledgers[0].values())) == len(ledgers[0])
    for key in ("loss", "grad_norm", "eval/perplexity", "eval/bits_per_byte"):
        ours, theirs = rows(other, key), rows(single, key)
        assert list(ours) == list(theirs)
        found[key] = max(abs(ours[s][key] - theirs[s][key]) / abs(theirs[s][key]) for s in theirs)
    exports = [load_file(run / "model" / "model.safetensors") for run in (single, other)]
    assert exports[0].keys() == exports[1].keys()
    found["weights"] = max((exports[0][name] - exports[1][name]).abs().max().item() for name in exports[0])
    return found


def holds(found: dict[str, float | bool], precision: str) -> bool:
    """Whether the differences are within `TOLERANCES`."""
    loss, grad_norm, weights = TOLERANCES[precision]
    within = found["loss"] <= loss and found["grad_norm"] <= grad_norm and found["weights"] <= weights
    return bool(found["initial"] and within and found["eval/perplexity"] <= 10 * loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--accumulation", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--precision", nargs="+", default=["no", "bf16"], choices=list(TOLERANCES))
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for precision in args.precision:
            loss, grad_norm, weights = TOLERANCES[precision]
            kind = "float32" if precision == "no" else precision
            allowed = f"loss {loss:g}, gradient norm {grad_norm:g}, weight {weights:g}"
            print(f"\n{kind}, {args.steps} steps; allowed: {allowed}\n")
            print("| model, accumulation | engine | initial | loss | gradient norm | perplexity | weights | |")
            print("|---|---|---|---|---|---|---|---|")
            for model in args.models:
                for accumulation in args.accumulation:
                    recipe = write_recipe(Path(name), model, accumulation, precision, args.steps)
                    single = run(recipe, "single")
                    for engine in args.engines:
                        found = differences(single, run(recipe, engine))
                        good = holds(found, precision)
                        failed += not good
                        print(
                            f"| {model}, {accumulation} | `{engine}` | {'same' if found['initial'] else 'OTHER'} | "
                            f"{found['loss']:.1e} | {found['grad_norm']:.1e} | {found['eval/perplexity']:.1e} | "
                            f"{found['weights']:.1e} | {'holds' if good else 'FAILS'} |",
                            flush=True,
                        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
