"""Runs that branch off another run: `checkpoint.branch_from`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import hfpretrain, recipe_mapping, rows, small_text, train, write_jsonl, write_recipe

from hfpretrain import files
from hfpretrain.checkpoints import trunk
from hfpretrain.data.ledger import Ledger
from hfpretrain.engines.pieces import load_whole_tensors

CONSTANT = {"name": "constant_with_warmup", "num_warmup_steps": 2}
WSD = ["--scheduler.name=warmup_stable_decay", "--scheduler.scheduler_specific_kwargs.num_decay_steps=4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a trunk of 8 steps at a constant learning rate and a checkpoint every 2 steps."""
    folder = tmp_path_factory.mktemp("branch")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    write_jsonl(folder / "other.jsonl", small_text(120, seed=1))
    recipe = write_recipe(folder, scheduler=CONSTANT, checkpoint__every_steps=2, checkpoint__keep_last=9)
    result = train(recipe)
    assert result.returncode == 0, result.stderr
    (folder / "before.json").write_text(json.dumps(state_of(folder / "run")))
    yield folder
    assert state_of(folder / "run") == json.loads((folder / "before.json").read_text()), "a branch changed its trunk"


def state_of(run):
    """The checksum of every file of a run's checkpoints and export."""
    folders = [*files.step_folders(run / "checkpoints"), run / "model"]
    return {str(path): files.sha256(path) for folder in folders for path in sorted(folder.iterdir()) if path.is_file()}


def branch(folder, name, *overrides, step=4, engine=None, processes=None):
    arguments = [f"--output_dir={folder / name}", f"--checkpoint.branch_from={folder / 'run'}@{step}", *overrides]
    return train(folder / "recipe.yaml", *arguments, engine=engine, processes=processes)


def succeed(result):
    assert result.returncode == 0, result.stderr
    return result


def other_data(folder):
    source = {"path": "json", "data_files": str(folder / "other.jsonl")}
    return f"--data.sources={json.dumps([source])}"


def weights(run, step, part="model"):
    return load_whole_tensors(run / "checkpoints" / f"step-{step:08d}", (part,))


def assert_equal(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=tolerance, msg=name)


def events(run):
    return [row["event"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "event" in row]


def test_a_branch_with_the_same_recipe_trains_as_its_trunk_does(runs):
    result = succeed(branch(runs, "same", "--training.max_steps=4"))
    assert_equal(weights(runs / "same", 8), weights(runs / "run", 8))
    assert_equal(weights(runs / "same", 8, "optimizer"), weights(runs / "run", 8, "optimizer"))
    ours, theirs = (np.load(runs / name / "checkpoints/step-00000008/ledger.npy") for name in ("same", "run"))
    assert (ours == theirs[4:]).all() and len(ours) == 4
    (found,) = trunk.read_trunks(runs / "same")
    assert (found.step, found.tokens, found.continues_data, found.origin.sequence) == (4, 1024, True, 32)
    assert found.checkpoint == files.digest(runs / "run" / "checkpoints" / "step-00000004")
    assert found.ledger == Ledger(theirs[:4]).digest == rows(runs / "run", "ledger")[4]["ledger"]
    # The digest of the branch covers the trunk's steps, too.
    assert rows(runs / "same", "ledger")[8]["ledger"] == Ledger(ours, found.ledger).digest
    losses = {step: row["loss"] for step, row in rows(runs / "same", "lr").items()}
    assert losses == {step: row["loss"] for step, row in rows(runs / "run", "lr").items() if step > 4}
    assert [row["tokens"] for row in rows(runs / "same", "lr").values()] == [1280, 1536, 1792, 2048]
    for text in (
        f"a branch of {runs / 'run'}@4 (step 4, 1,024 tokens) that trains steps 5 to 8",
        "the data order of the trunk continues with sequence 32",
        "the learning rate is 3.00e-03 in step 5, the first of the branch, and was 3.00e-03 in the trunk's last",
    ):
        assert text in result.stderr and text in " ".join(events(runs / "same")), (text, result.stderr)
