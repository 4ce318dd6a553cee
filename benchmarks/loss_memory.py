"""Peak memory and time of the loss: with all logits at once, as transformers computes it, and in chunks.

    python benchmarks/loss_memory.py [--quick | --train]

One forward and backward of output embedding and loss; on a CPU, each case in a new process. The last of four rounds is
timed. Memory is the peak minus that of hidden states and weight: on a CPU the resident memory of the process
(`ru_maxrss`), on a GPU what torch allocated. bf16 is autocast with float32 weights. `--train` instead runs whole steps
of a llama with a vocabulary of 128k through `accelerate launch -m hfpretrain.train`; memory is then the whole resident
memory of the largest process, sampled every 20 ms.
"""

import argparse
import contextlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import yaml
from transformers.loss.loss_utils import ForCausalLMLoss

from hfpretrain.modeling.loss import head_loss

CASES = [(32768, 1024, 8192), (131072, 512, 2048), (131072, 512, 4096), (131072, 1024, 2048)]
if torch.cuda.is_available():
    CASES = [(50304, 768, 32768), (131072, 2048, 8192), (131072, 2048, 16384)]
ROOT = Path(__file__).parent.parent


def measure(kind: str, dtype: str, vocab_size: int, hidden_size: int, num_tokens: int) -> dict[str, float]:
    """Peak MiB above the inputs, seconds, loss and the gradients' norms of one forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(1, num_tokens, hidden_size, device=device, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size, device=device).mul_(0.02).requires_grad_()
    labels = torch.randint(vocab_size, (1, num_tokens), device=device)
    labels[:, 0] = -100  # so that rolling shifts
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    for _ in range(4):
        hidden.grad = weight.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            if kind == "chunked":
                loss = head_loss(hidden, weight, None, labels.roll(-1)).sum() / num_tokens
            else:
                logits = torch.nn.functional.linear(hidden, weight)
                loss = ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch=num_tokens)
        loss.backward()
        value = loss.item()
        seconds = time.perf_counter() - start
        logits = loss = None
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * resource.getrusage(0).ru_maxrss
    norms = [tensor.grad.float().norm().item() for tensor in (hidden, weight)]
    return {"mebibytes": (peak - before) / 2**20, "seconds": seconds, "loss": value, "norms": norms}


def compare_losses(cases: list[tuple[int, int, int]]) -> None:
    print("| vocabulary | hidden | tokens | dtype | whole | chunked | memory | time | loss differs |")
    print("|---|---|---|---|---|---|---|---|---|")
    for case in cases:
        for dtype in ("float32", "bf16"):
            found = []
            for kind in ("whole", "chunked"):
                if torch.cuda.is_available():  # torch's allocator measures the peak of each case
                    found.append(measure(kind, dtype, *case))
                    continue
                command = [sys.executable, __file__, "--case", kind, dtype, *map(str, case)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found.append(json.loads(output.splitlines()[-1]))
            whole, chunked = found
            memory, seconds = (chunked[key] / whole[key] for key in ("mebibytes", "seconds"))
            differs = abs(chunked["loss"] - whole["loss"]) / whole["loss"]
            sizes = " | ".join(f"{number:,}" for number in case)
            megabytes = " | ".join(f"{entry['mebibytes']:,.0f} MiB" for entry in found)
            print(f"| {sizes} | {dtype} | {megabytes} | {memory:.2f} | {seconds:.2f} | {differs:.0e} |", flush=True)


def write_recipe(folder: Path) -> Path:
    """Write a recipe of three steps, each with 2,048 tokens for each of two processes."""
    draw = random.Random(0)
    words = ["river", "stone", "light", "runs", "falls", "under", "over", "quiet", "green", "water"]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) for _ in range(200)]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    model = {"model_type": "llama", "vocab_size": 131072, "hidden_size": 128, "intermediate_size": 256}
    recipe = {
        "output_dir": str(folder / "run"),
        "model": {"config": {**model, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}},
        "tokenizer": {"algorithm": "byte_level_bpe", "vocab_size": 320},
        "data": {"sources": [{"path": "json", "data_files": str(folder / "corpus.jsonl")}], "block_size": 512},
        "optimizer": {"lr": 1e-3},
        "training": {"tokens_per_step": 4096, "micro_batch_size": 4, "max_steps": 3, "mixed_precision": "no"},
        "logging": {"every_steps": 1, "trackers": []},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def run(recipe: Path, engine: str, chunked: bool) -> tuple[float, list[dict[str, float]]]:
    """Train; returns the peak MiB of the largest process, and the rows of the steps."""
    output_dir = recipe.parent / f"{engine}-{chunked}"
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{engine}.yaml"), "-m", "hfpretrain.train", str(recipe)]
    command += [f"--output_dir={output_dir}", f"--training.chunked_loss={str(chunked).lower()}"]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    most = 0
    while process.poll() is None:
        for member in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                most = max(most, member.memory_info().rss)
        time.sleep(0.02)
    assert process.returncode == 0, " ".join(command)
    lines = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return most / 2**20, [line for line in lines if "loss" in line]


def compare_runs() -> None:
    print("| engine | whole | chunked | memory | step time | largest difference of a loss |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        recipe = write_recipe(Path(name))
        for engine in ("single", "ddp", "fsdp2", "zero3"):
            (whole, theirs), (chunked, ours) = (run(recipe, engine, kind) for kind in (False, True))
            rate = theirs[-1]["tokens_per_second"] / ours[-1]["tokens_per_second"]
            differs = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, theirs, strict=True))
            memory = f"{whole:,.0f} MiB | {chunked:,.0f} MiB | {chunked / whole:.2f}"
            print(f"| {engine} | {memory} | {rate:.2f} | {differs:.0e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case[:2], *map(int, args.case[2:]))))
    elif args.train:
        compare_runs()
    else:
        compare_losses([(8192, 256, 2048)] if args.quick else CASES)


if __name__ == "__main__":
    main()
