"""`python faults.py RECIPE [--section.key=value ...]`: a training run with a fault, for tests.

The environment variable FAULT chooses the fault:

- `gradient:STEP`, `loss:STEP`, `jump:STEP`: on the last rank, data step STEP, counted from 0, gives NaN gradients, a
  loss of NaN, or a loss that is too large.
- `slow:PHASE`: each call of `Watch.beat` in that phase takes half a second longer.
- `units:SECONDS`: each call of `Watch.unit_done` takes that much longer, and so does preparing the data.
- `SIGKILL:PHASE`, or any other signal: rank FAULT_RANK (default: the last) gets the signal when it enters the phase.
- `flash_attention`: `model.attn_implementation: flash_attention_2` calls functions in PyTorch instead of its package.

If PHASE_FILE is set, rank 0 writes its phase and step into that file.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import reference_kernels
import torch

from hfpretrain.data import batches, streaming
from hfpretrain.engines.base import Engine
from hfpretrain.modeling.loss import StepLoss
from hfpretrain.training import watchdog

train = importlib.import_module("hfpretrain.train")

kind, _, argument = os.environ.get("FAULT", "").partition(":")
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LAST = WORLD_SIZE - 1 == RANK
bad_rows: list[torch.Tensor] = []
current = {"bad": False}


def remember_bad_row(data_class):
    original = data_class.step

    def step(self, number):
        data = original(self, number)
        if number == int(argument):
            bad_rows.append(data.batches[0]["input_ids"][0])
        return data

    data_class.step = step


if kind in ("gradient", "loss", "jump") and LAST:
    remember_bad_row(batches.TrainingData)
    remember_bad_row(streaming.StreamingData)
    backward, loss_of = Engine.backward, StepLoss.__call__

    def spoiled_backward(self, loss):
        backward(self, loss * float("nan") if current["bad"] and kind == "gradient" else loss)

    def spoiled_loss(self, model, batch, *arguments):
        current["bad"] = any(torch.equal(row, batch["input_ids"][0]) for row in bad_rows)
        loss, objective = loss_of(self, model, batch, *arguments)
        extra = {"loss": float("nan"), "jump": 50.0}.get(kind, 0.0) if current["bad"] else 0.0
        return loss + extra, objective

    Engine.backward, StepLoss.__call__ = spoiled_backward, spoiled_loss

if kind == "flash_attention":
    reference_kernels.install_flash_attention()

beat, run_on_main, finish = watchdog.Watch.beat, watchdog.Watch.run_on_main, Engine.finish


def send_signal(phase):
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if kind.startswith("SIG") and phase == argument and int(os.environ.get("FAULT_RANK", WORLD_SIZE - 1)) == RANK:
        print(f"{kind} at {time.time():.2f}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, kind))


def run_on_main_with_fault(self, task, work):
    if task.startswith("prepare"):
        send_signal("prepare")
        time.sleep(float(argument) if kind == "units" and RANK == 0 else 0)
    return run_on_main(self, task, work)


def finish_with_fault(self):
    send_signal("end")
    finish(self)


watchdog.Watch.run_on_main, Engine.finish = run_on_main_with_fault, finish_with_fault
if kind == "units":
    unit_done = watchdog.Watch.unit_done
    watchdog.Watch.unit_done = lambda self: (unit_done(self), time.sleep(float(argument)))


def beat_with_fault(self, phase, step):
    beat(self, phase, step)
    send_signal(phase)
    if RANK == 0 and "PHASE_FILE" in os.environ:
        Path(os.environ["PHASE_FILE"]).write_text(f"{phase} {step}")
    if kind == "slow" and phase == argument:
        time.sleep(0.5)


watchdog.Watch.beat = beat_with_fault
main = train.main

if __name__ == "__main__":
    sys.exit(main())
