"""Peak memory of a process until its model is initialized, compared with the size of the model.

    python benchmarks/initialization.py [--engines single fsdp2 zero3]

A llama with 0.37 billion float32 weights is initialized and sharded as a run does it, with one process for `single` and
two for the other engines. Memory is the peak of `hfpretrain.training.peak_memory.PeakMemory` in the largest process,
until the optimizer is built. FSDP2 and ZeRO-3 shard each weight as soon as it is drawn. So a process holds its half of
the model, one whole weight (the largest is an embedding of 125 MiB), and what its libraries load.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from small import ROOT

CONFIG = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
          "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000}  # fmt: skip


def worker(output: Path) -> None:
    """Initialize the model in a process of an engine. The first writes the largest peak and the model's size."""
    import torch
    from transformers import AutoConfig

    from hfpretrain.engines import choose
    from hfpretrain.modeling import initialization
    from hfpretrain.modeling.build import build_model
    from hfpretrain.recipe.schema import ModelSection
    from hfpretrain.training.peak_memory import PeakMemory

    engine = choose.build_engine("no", [], str(output.parent), 600)
    config = AutoConfig.for_model(**CONFIG)
    memory = PeakMemory()
    with engine.plain_initialization():
        model = build_model(ModelSection(config=CONFIG), config)
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    weights = initialization.InitialWeights(model, 0)

    peaks = []

    def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        peaks.append(memory.peak())
        return torch.optim.AdamW(model.parameters())

    engine.prepare(model, weights, build_optimizer, micro_batch_size=1, accumulation_steps=1, max_grad_norm=1.0)
    peak = engine.largest(peaks[0])
    if engine.accelerator.is_main_process:
        output.write_text(json.dumps({"peak": peak, "size": size}))
    engine.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["single", "fsdp2", "zero3"])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    print("| engine | weights | peak of a process | of the weights |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for engine in args.engines:
            output = Path(folder) / f"{engine}.json"
            command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0"]
            command += ["--config_file", str(ROOT / "accelerate_configs" / f"{engine}.yaml"), __file__]
            subprocess.run([*command, "--worker", str(output)], check=True, stderr=subprocess.DEVNULL, cwd=ROOT)
            found = json.loads(output.read_text())
            sizes = " | ".join(f"{found[key] / 2**20:,.0f} MiB" for key in ("size", "peak"))
            print(f"| `{engine}` | {sizes} | {found['peak'] / found['size']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
