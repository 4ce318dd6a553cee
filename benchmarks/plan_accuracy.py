"""Compare the predictions of `hfpretrain plan` with short runs of recipes on several engines.

    python benchmarks/plan_accuracy.py [--engines single ddp ...] [--shakespeare tinyshakespeare.txt] [--steps 10]
                                       [--section.key=value ...]

Shows the peak memory of the largest process, as `hfpretrain.training.peak_memory.PeakMemory` measures it, and the
seconds of a step. The time is predicted with the plan's default MFU, so it is wrong where the measured MFU differs.
Engines of several processes run with two. On a CPU, libraries that are loaded during the run count as memory, some tens
of MiB.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from small import ROOT

ENGINES = ("single", "ddp", "tp", "fsdp2", "fsdp2_offload", "zero1", "zero2", "zero3", "zero3_offload")
_SIZES = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10}
MEDIUM = [*(f"--model.config.{key}={value}" for key, value in _SIZES.items()), "--tokenizer.vocab_size=16384"]


def run(name: str, overrides: list[str], engine: str, output_dir: Path, steps: int) -> dict:
    """Train a recipe for a few steps; returns its `plan.json`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", "--main_process_port", "0", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{engine}.yaml"), "-m", "hfpretrain.train"]
    command += [str(ROOT / "recipes" / f"{name}.yaml"), f"--output_dir={output_dir}", f"--training.max_steps={steps}"]
    command += ["--scheduler.num_warmup_steps=2", "--logging.every_steps=2", "--logging.trackers=[]", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} under {engine} failed:\n{done.stdout}{done.stderr}")
    return json.loads((output_dir / "plan.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--shakespeare", type=Path, help="the text of recipes/shakespeare-char-cpu.yaml")
    parser.add_argument("--steps", type=int, default=10)
    args, more = parser.parse_known_args()
    cases = [("quickstart", "quickstart", []), ("quickstart, larger", "quickstart", MEDIUM)]
    if args.shakespeare is not None:
        text = f"--data.sources.0.data_files={args.shakespeare.absolute()}"
        cases.append(("shakespeare-char-cpu", "shakespeare-char-cpu", [text]))
    print("| recipe | parameters | precision | engine | peak memory | predicted | error | step | predicted | MFU |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for label, name, overrides in cases:
            for engine in ("single",) if name != "quickstart" else args.engines:
                output_dir = Path(folder) / label.replace(" ", "-") / engine
                found = run(name, [*overrides, *more], engine, output_dir, args.steps)
                plan, measured, predicted = found["plan"], found["measured"], found["prediction"]
                memory = " | ".join(f"{part['peak_memory'] / 2**20:,.0f} MiB" for part in (measured, predicted))
                seconds = " | ".join(f"{part['seconds_per_step']:.2g} s" for part in (measured, predicted))
                cells = [label, f"{plan['parameters']['total'] / 1e6:.1f} M", plan["mixed_precision"], f"`{engine}`"]
                cells += [memory, f"{found['error']['peak_memory']:+.0%}", seconds, f"{measured['mfu']:.2f}"]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
