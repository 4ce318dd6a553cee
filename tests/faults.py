"""`python faults.py RECIPE [--section.key=value ...]`: a training with something wrong on purpose, for tests.

FAULT=gradient:STEP, loss:STEP or jump:STEP spoils the step that takes the data of that step, counted from 0, on the
last rank alone; FAULT=slow:PHASE makes a beat of the watch in that phase take seconds, FAULT=units:SECONDS each unit of
work that a rank does on its own, as reading a file, and preparing the data. FAULT=SIGKILL:PHASE sends that signal, or
any other, to rank FAULT_RANK (default: the last) when it enters the phase. PHASE_FILE names a file where the phase the
main thread is in is written.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import torch

from hfpretrain.data import batches, streaming
from hfpretrain.engines.base import Engine
from hfpretrain.modeling.loss import StepLoss
from hfpretrain.training import watchdog

train = importlib.import_module("hfpretrain.train")

kind, _, place = os.environ.get("FAULT", "").partition(":")
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LAST = WORLD_SIZE - 1 == RANK
bad_rows: list[torch.Tensor] = []
now = {"bad": False}


def spoil(data_class):
    original = data_class.step

    def step(self, number):
        data = original(self, number)
        if number == int(place):
            bad_rows.append(data.batches[0]["input_ids"][0])
        return data

    data_class.step = step


if kind in ("gradient", "loss", "jump") and LAST:
    spoil(batches.TrainingData)
    spoil(streaming.StreamingData)
    backward, loss_of = Engine.backward, StepLoss.__call__

    def spoiled_backward(self, loss):
        backward(self, loss * float("nan") if now["bad"] and kind == "gradient" else loss)

    def spoiled_loss(self, model, batch, *arguments):
        now["bad"] = any(torch.equal(row, batch["input_ids"][0]) for row in bad_rows)
        loss, objective = loss_of(self, model, batch, *arguments)
        extra = {"loss": float("nan"), "jump": 50.0}.get(kind, 0.0) if now["bad"] else 0.0
        return loss + extra, objective

    Engine.backward, StepLoss.__call__ = spoiled_backward, spoiled_loss

beat, from_main, finish = watchdog.Watch.beat, watchdog.Watch.from_main, Engine.finish


def strike(phase):
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if kind.startswith("SIG") and phase == place and int(os.environ.get("FAULT_RANK", WORLD_SIZE - 1)) == RANK:
        print(f"{kind} at {time.time():.2f}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), getattr(signal, kind))


def told_from_main(self, task, work):
    if task.startswith("prepare"):
        strike("prepare")
        time.sleep(float(place) if kind == "units" and RANK == 0 else 0)
    return from_main(self, task, work)


def told_finish(self):
    strike("end")
    finish(self)


watchdog.Watch.from_main, Engine.finish = told_from_main, told_finish
if kind == "units":
    unit_done = watchdog.Watch.unit_done
    watchdog.Watch.unit_done = lambda self: (unit_done(self), time.sleep(float(place)))


def told_beat(self, phase, step):
    beat(self, phase, step)
    strike(phase)
    if RANK == 0 and "PHASE_FILE" in os.environ:
        Path(os.environ["PHASE_FILE"]).write_text(f"{phase} {step}")
    if kind == "slow" and phase == place:
        time.sleep(0.5)


watchdog.Watch.beat = told_beat
main = train.main

if __name__ == "__main__":
    sys.exit(main())
