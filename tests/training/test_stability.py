import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import rows, small_text, train, write_jsonl, write_recipe
from safetensors.torch import load_file

from hfpretrain.recipe.schema import StabilitySection
from hfpretrain.training.stability import find_problem


def events(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" in line]


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def test_losses_that_are_not_finite_or_jump_are_found():
    section, losses = StabilitySection(spike_std=4.0, spike_window=10), []
    assert find_problem(section, losses, math.nan, 1.0) == "the loss is nan"
    assert find_problem(section, losses, 1.0, math.inf) == "the gradient's norm is inf"
    for step in range(10):
        assert find_problem(section, losses, 5.0 + 0.1 * (step % 2), 1.0) is None
    assert "standard deviations above the mean 5.0500 of the last 10 steps" in find_problem(section, losses, 6.0, 1.0)
    assert find_problem(section, losses, 5.1, 1.0) is None and find_problem(section, losses, 3.0, 1.0) is None
    assert losses[-2:] == [5.1, 3.0] and len(losses) == 10  # the last stable steps
    # A run that continues with a smaller window compares with the newest losses.
    assert find_problem(StabilitySection(spike_std=4.0, spike_window=2), losses, 4.0, 1.0) is None
    assert losses == [3.0, 4.0]
    assert find_problem(StabilitySection(), losses, 1e9, 1.0) is None and losses == []


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """A run on one process that skipped a step with NaN gradients."""
    folder = tmp_path_factory.mktemp("skipped")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    recipe = write_recipe(
        folder, training__max_steps=10, checkpoint__every_steps=3, stability__policy="skip", optimizer__lr=1e-2
    )
    result = train(recipe, fault="gradient:5")
    assert result.returncode == 0, result.stderr
    return folder


def test_a_step_with_a_nan_gradient_is_skipped(skipped):
    run = skipped / "run"
    (event,) = events(run)
    assert event["event"] == "the gradient's norm is nan: skip" and event["step"] == 5
    assert rows(run, "loss")[6]["grad_norm"] == "nan"  # recorded as it is
    assert list(rows(run, "loss")) == list(range(1, 11))
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
    incident = json.loads((run / "incidents" / "step-00000006.json").read_text())
    assert (incident["step"], incident["policy"], incident["grad_norm"]) == (6, "skip", "nan")
    assert len(incident["sequences"]) == 8 and incident["gradient_norms"]["model.embed_tokens.weight"] == "nan"
    documents = [document for sequence in incident["sequences"] for document in sequence["documents"]]
    assert incident["sequences"][0]["split"] == "train-0" and "river" in " ".join(d["text"] for d in documents)
    assert documents[0]["origin"].startswith(str(skipped / "corpus.jsonl"))


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_all_ranks_skip_a_step_with_a_nan_gradient_on_one_rank(skipped, engine):
    run = skipped / engine
    result = train(skipped / "recipe.yaml", f"--output_dir={run}", engine=engine, fault="gradient:5")
    assert result.returncode == 0, result.stderr
    assert [event["step"] for event in events(run)] == [5]
    here, there = rows(run, "loss"), rows(skipped / "run", "loss")
    for step in here:
        assert here[step]["loss"] == pytest.approx(there[step]["loss"], rel=1e-5), step
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(skipped / "run")[name], rtol=0, atol=2e-4)


@pytest.mark.parametrize("engine", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_deepspeed_skips_a_step_whose_loss_jumps(skipped, engine):
    run = skipped / f"jump-{engine}"
    arguments = [f"--output_dir={run}", "--stability.spike_std=20", "--stability.spike_window=4"]
    result = train(skipped / "recipe.yaml", *arguments, engine=engine, fault="jump:5")
    assert result.returncode == 0, result.stderr
    (event,) = events(run)
    assert "standard deviations above the mean" in event["event"] and event["step"] == 5
    # The step did not change the weights, like the step with the NaN gradient.
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(skipped / "run")[name], rtol=0, atol=2e-4)
    norms = json.loads((run / "incidents" / "step-00000006.json").read_text())["gradient_norms"]
    assert all(0 < float(norm) < 10 for norm in norms.values()) and len(norms) == 21


def test_the_stop_policy_ends_the_run_and_names_the_incident_file(skipped):
    run = skipped / "stopped"
    result = train(skipped / "recipe.yaml", f"--output_dir={run}", "--stability.policy=stop", fault="loss:5")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "stopped: the loss is nan at step 6" in result.stderr and "stability.policy" in result.stderr
    assert str(run / "incidents" / "step-00000006.json") in result.stderr
    # With another policy, the same folder resumes.
    result = train(skipped / "recipe.yaml", f"--output_dir={run}", fault="loss:5")
    assert result.returncode == 0, result.stderr
    assert all(torch.equal(tensor, weights(skipped / "run")[name]) for name, tensor in weights(run).items())


def test_a_run_stops_after_max_events_skipped_steps(skipped):
    run = skipped / "bounded"
    arguments = [f"--output_dir={run}", "--stability.max_events=3", "--stability.spike_std=1e-6", "--optimizer.lr=1e-9"]
    result = train(skipped / "recipe.yaml", *arguments, "--stability.spike_window=2", "--training.max_steps=60")
    assert result.returncode == 1 and "stopped: the loss" in result.stderr
    assert [event["event"].rpartition(": ")[2] for event in events(run)] == ["skip", "skip", "skip", "stop"]


def test_a_rollback_without_a_checkpoint_stops_the_run(skipped):
    run = skipped / "nowhere-to-go"
    arguments = [f"--output_dir={run}", "--stability.policy=rollback", "--checkpoint.every_steps=null"]
    result = train(skipped / "recipe.yaml", *arguments, fault="gradient:5")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert [event["event"] for event in events(run)] == ["the gradient's norm is nan: stop"]


@pytest.mark.parametrize(
    ("engine", "streaming"),
    [(None, False), (None, True), ("fsdp2", False), pytest.param("zero2", True, marks=pytest.mark.slow)],
)
def test_a_rollback_returns_to_the_checkpoint_and_skips_the_data_since(skipped, engine, streaming):
    run, straight = skipped / f"rollback-{engine}-{streaming}", skipped / f"straight-{streaming}"
    data = []
    if streaming:
        data = ["--data.streaming=true", "--data.validation_fraction=0", f"--tokenizer.pretrained={skipped}/run/model"]
        data += ["--tokenizer.algorithm=null", "--tokenizer.vocab_size=null"]
    arguments = [str(skipped / "recipe.yaml"), *data, f"--output_dir={run}", "--stability.policy=rollback"]
    result = train(*arguments, engine=engine, fault="gradient:5")
    assert result.returncode == 0, result.stderr
    assert [event["event"] for event in events(run)] == ["the gradient's norm is nan: rollback"]
    state = json.loads((run / "checkpoints" / "step-00000010" / "train_state.json").read_text())
    assert state["skipped"] == [[3, 3]] and state["step"] == 10 and state["num_events"] == 1
    assert list(rows(run, "loss")) == list(range(1, 11))
    if not straight.exists():
        result = train(skipped / "recipe.yaml", *data, f"--output_dir={straight}", "--training.max_steps=13")
        assert result.returncode == 0, result.stderr
    there = np.load(straight / "checkpoints" / "step-00000013" / "ledger.npy")
    here = np.load(run / "checkpoints" / "step-00000010" / "ledger.npy")
    assert here.tolist() == [*there[:3], *there[6:]]
    if engine is None and streaming:
        return
    # A resume after the rollback trains on the same blocks.
    before = {step: (row["loss"], row["ledger"]) for step, row in rows(run, "loss").items()}
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    result = train(*arguments, engine=engine, fault="gradient:5")
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    assert {step: (row["loss"], row["ledger"]) for step, row in rows(run, "loss").items()} == before
