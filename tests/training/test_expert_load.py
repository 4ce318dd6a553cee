"""The figures of how evenly experts are used, and the warning if few are."""

import json

import pytest
import torch
from conftest import rows, small_text, write_jsonl, write_recipe
from PIL import Image
from tiny_models import MOE, build

from hfpretrain import load_recipe
from hfpretrain.modeling.routers import Balance, RouterRecorder, find_routers
from hfpretrain.train import train as train_here
from hfpretrain.training.expert_load import ExpertLoad, load_figures
from hfpretrain.training.history import HeatMap

STEPS = 6


def test_figures_of_even_and_uneven_loads():
    counts = torch.tensor([[25, 25, 25, 25], [100, 0, 0, 0], [97, 1, 1, 1], [0, 0, 0, 0], [50, 50, 0, 900]])
    found = load_figures(counts, [4, 4, 4, 4, 2])  # the last router has two experts
    assert found["max_over_mean"] == pytest.approx([1, 4, 3.88, 0, 1])
    assert found["entropy"] == pytest.approx([1, 0, 0.12097, 0, 1], abs=1e-4)
    assert found["dead"] == [0, 0.75, 0.75, 0, 0]


def test_a_heat_map_keeps_the_largest_values_of_many_columns():
    heat_map = HeatMap()
    for step in range(2000):
        heat_map.add(float(step), [step == 777, 0.5])
    assert len(heat_map.columns) <= 400 and heat_map.x[-1] == 1999
    assert max(column[0] for column in heat_map.columns) == 1
    assert heat_map.x == sorted(heat_map.x)


def test_a_run_records_the_load_of_its_experts(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", small_text(100))
    config = {**{key: value for key, value in MOE.items() if key != "vocab_size"}, "num_experts": 8}
    changes = {"training__max_steps": STEPS, "logging__every_steps": 2, "evaluation__every_steps": 3}
    path = write_recipe(tmp_path, model__config=config, model__gradient_checkpointing=True, **changes)
    recipe = load_recipe(path)
    train_here(recipe)
    run = tmp_path / "run"
    logged = rows(run, "experts/entropy")
    assert list(logged) == [2, 4, 6]
    for row in logged.values():
        for key in ("max_over_mean", "entropy", "dead", "router_z"):
            assert len(row[f"experts/{key}"]) == 3 and min(row[f"experts/{key}"]) >= 0
        assert all(1 <= value <= 4 for value in row["experts/max_over_mean"])
        assert all(value > 0 for value in row["experts/router_z"])
    routers = json.loads((run / "environment.json").read_text())["routers"]
    assert routers == [f"model.layers.{number}.mlp" for number in range(3)]
    for folder in (run, run / "model"):
        Image.open(folder / "experts.png").verify()
    assert "(experts.png)" in (run / "model" / "README.md").read_text()


class Recorded:
    """Stands in for `Records`: keeps the events."""

    def __init__(self):
        self.events = []

    def write_event(self, step, text):
        self.events.append((step, text))

    def print_line(self, text):
        pass


class OneProcess:
    """Stands in for an engine of one process."""

    @staticmethod
    def total_loss(value):
        return value


def test_a_layer_that_collapses_is_reported_once_with_the_key_that_helps():
    recorder = RouterRecorder(find_routers(build(MOE)), torch.device("cpu"), Balance(coefficient=0.001))
    load, records = ExpertLoad(recorder, OneProcess()), Recorded()

    def log(step, *counts):
        recorder.window.copy_(torch.tensor(counts))
        return load.figures(step, records)

    even, few, hardly_any = [50, 50, 50, 50], [100, 92, 4, 4], [4, 4, 0, 0]
    assert log(10, even, even, hardly_any)["experts/dead"] == [0, 0, 0.5]
    assert records.events == []  # eight tokens say nothing
    log(20, even, few, even)
    ((step, text),) = records.events
    assert step == 20 and "model.layers.1.mlp (50% of 4 experts)" in text
    assert "training.router_aux_loss_coef (now 0.001)" in text
    log(30, even, few, even)
    assert len(records.events) == 1
    log(40, few, few, even)
    assert len(records.events) == 2 and "model.layers.0.mlp" in records.events[1][1]
