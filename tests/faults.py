"""`python faults.py RECIPE [--section.key=value ...]`: a training with something wrong on purpose, for tests.

FAULT=gradient:STEP, loss:STEP or jump:STEP spoils the step that takes the data of that step, counted from 0, on the
last rank alone; FAULT=slow:PHASE makes a beat of the watch in that phase take seconds. PHASE_FILE names a file where
the phase the main thread is in is written.
"""

import importlib
import os
import sys
import time
from pathlib import Path

import torch

from hfpretrain import dataloader, engine, ranks, streaming

train = importlib.import_module("hfpretrain.train")

kind, _, place = os.environ.get("FAULT", "").partition(":")
RANK = int(os.environ.get("RANK", "0"))
LAST = int(os.environ.get("WORLD_SIZE", "1")) - 1 == RANK
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
    spoil(dataloader.TrainingData)
    spoil(streaming.StreamingData)
    split, backward, loss_of = engine.split_sequences, engine.backward, train._loss

    def split_sequences(accelerator, batch):
        now["bad"] = any(torch.equal(row, batch["input_ids"][0]) for row in bad_rows)
        return split(accelerator, batch)

    def spoiled_backward(accelerator, model, loss):
        backward(accelerator, model, loss * float("nan") if now["bad"] and kind == "gradient" else loss)

    def spoiled_loss(*arguments):
        loss, objective = loss_of(*arguments)
        extra = {"loss": float("nan"), "jump": 50.0}.get(kind, 0.0) if now["bad"] else 0.0
        return loss + extra, objective

    engine.split_sequences, engine.backward, train._loss = split_sequences, spoiled_backward, spoiled_loss

beat = ranks.Watch.beat


def told_beat(self, phase, step):
    beat(self, phase, step)
    if RANK == 0 and "PHASE_FILE" in os.environ:
        Path(os.environ["PHASE_FILE"]).write_text(f"{phase} {step}")
    if kind == "slow" and phase == place:
        time.sleep(0.5)


ranks.Watch.beat = told_beat
main = train.main

if __name__ == "__main__":
    sys.exit(main())
