"""Runs that branch off another run: `checkpoint.branch_from`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import hfpretrain, rows, small_text, train, write_jsonl, write_recipe

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
        "the learning rate is 3.00e-03 in step 5, the first of the branch, and was 3.00e-03 in step 4 of the trunk",
    ):
        assert text in result.stderr and text in " ".join(events(runs / "same")), (text, result.stderr)


def test_a_branch_with_other_data_schedule_and_batch_runs_on_other_processes_and_without_its_trunk(runs):
    copy = runs / "copy"
    shutil.copytree(runs / "run", copy)
    run, prepared = runs / "other", f"--data.prepared_dir={runs / 'prepared'}"
    arguments = [
        *(f"--output_dir={run}", f"--checkpoint.branch_from={copy}@4", other_data(runs), prepared),
        *(
            "--seed=7",
            "--training.tokens_per_step=512",
            "--training.max_steps=null",
            "--training.max_tokens=3072",
            "--checkpoint.every_steps=3",
        ),
        *("--scheduler.name=linear", "--scheduler.num_warmup_steps=0", "--scheduler.on_branch=restart"),
        *("--optimizer.lr=1e-3", "--evaluation.every_steps=3"),
    ]
    result = succeed(train(runs / "recipe.yaml", *arguments, engine="fsdp2", processes=2))
    for text in (
        "the data order begins at its first sequence, because `data` or `seed` is not that of the trunk",
        "1.00e-03 in step 5, the first of the branch, and was 3.00e-03 in step 4 of the trunk (scheduler.on_",
        "unlike the trunk's, training.tokens_per_step: is 512 now, was 256",
        "unlike the trunk's, seed: is 7 now, was 0",
    ):
        assert text in result.stderr and text in " ".join(events(run)), (text, result.stderr)
    assert [row["lr"] for row in rows(run, "lr").values()] == pytest.approx([1e-3 * n / 6 for n in range(6, 0, -1)])
    assert [row["tokens"] for row in rows(run, "lr").values()] == [1024 + 512 * n for n in range(1, 7)]
    assert sorted(rows(run, "eval/loss")) == [4, 6, 9, 10] and "before training" in result.stdout
    assert f"branch           of {copy}@4 (step 4, 1,024 tokens); 3,072 tokens in 6 steps of its own" in result.stdout
    assert f"bits per byte compared with {copy}@4" in result.stdout  # what the branch gained since it began
    # The tokenizer was trained on the trunk's text, and not on that of the branch.
    assert files.sha256(run / "model" / "tokenizer.json") == files.sha256(copy / "model" / "tokenizer.json")
    prepared_before = sorted((runs / "prepared").iterdir())
    # The trunk is deleted. The run resumes from its own checkpoint and ends with the same weights.
    shutil.rmtree(copy)
    whole = weights(run, 10)
    for step in (10, 9, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    assert [path.name for path in files.step_folders(run / "checkpoints")] == ["step-00000006"]
    succeed(train(runs / "recipe.yaml", *arguments, engine="fsdp2", processes=2))
    assert_equal(weights(run, 10), whole)
    assert sorted((runs / "prepared").iterdir()) == prepared_before
    listed = hfpretrain("runs", str(runs)).stdout.splitlines()
    assert "branch of" in listed[0] and any(f"{copy}@4" in line for line in listed), listed
    card = (run / "model" / "README.md").read_text()
    assert "- branch of: copy@4 (step 4, 1,024 tokens), then 6 steps of 512 tokens" in card
    assert "4,096 in 10 steps, the trunk's included" in card and str(runs) not in card, card
    shown = hfpretrain("data", str(runs / "recipe.yaml"), *arguments, "--step", "5")
    assert shown.returncode == 0 and "step 5: 16 sequences of 32 tokens" in shown.stdout, shown.stderr
    earlier = hfpretrain("data", str(runs / "recipe.yaml"), *arguments, "--step", "4")
    assert "whose steps are 5 to 10; earlier ones are of its trunk" in earlier.stderr


def test_a_schedule_continues_and_decays_and_several_branches_share_a_trunk(runs):
    for name, steps, rates in (("decay-4", 4, [4, 3, 2, 1]), ("decay-6", 6, [4, 4, 4, 3, 2, 1])):
        result = succeed(
            branch(
                runs,
                name,
                *WSD,
                f"--training.max_steps={steps}",
                "--scheduler.scheduler_specific_kwargs.decay_type=linear",
                step=8,
            )
        )
        found = [row["lr"] for row in rows(runs / name, "lr").values()]
        assert found == pytest.approx([3e-3 * rate / 4 for rate in rates]), found
        assert "the learning rate is 3.00e-03 in step 9" in result.stderr
        assert (
            "unlike the trunk's, scheduler.name: is 'warmup_stable_decay' now, was 'constant_with_warmup'"
            in result.stderr
        )


def test_a_branch_of_a_branch_continues_the_ledger_and_the_order(runs):
    succeed(branch(runs, "first", "--training.max_steps=2", step=2))
    arguments = [
        f"--output_dir={runs / 'second'}",
        f"--checkpoint.branch_from={runs / 'first'}@4",
        "--training.max_steps=4",
    ]
    succeed(train(runs / "recipe.yaml", *arguments))
    assert_equal(weights(runs / "second", 8), weights(runs / "run", 8))
    one, two = trunk.read_trunks(runs / "second")
    assert (one.step, two.step, one.given, two.given) == (2, 4, f"{runs / 'run'}@2", f"{runs / 'first'}@4")
    assert two.origin.sequence == 32 and two.origin.schedule_step == 0
    refused = train(runs / "recipe.yaml", arguments[0], f"--checkpoint.branch_from={runs / 'run'}@2")
    assert refused.returncode == 2 and f"contains a branch of {runs / 'first'}@4, but" in refused.stderr


@pytest.mark.parametrize(
    ("step", "overrides", "expected"),
    [
        (4, ["--model.config.hidden_size=64"], ["model.config.hidden_size: is 64 now, was 32", "undo the changes"]),
        (4, ["--tokenizer.vocab_size=330"], ["tokenizer.vocab_size: is 330 now, was 320"]),
        (4, ["--optimizer.name=muon"], ["optimizer.name: is 'muon' now, was 'adamw'"]),
        (5, [], ["run@5' is not a checkpoint", "run@2, ", "run@8 (`checkpoint.keep_every` keeps more of them)"]),
        (4, [*WSD, "--training.max_steps=3"], ["4 decay steps do not fit into a branch of 3 steps"]),
    ],
)
def test_what_a_branch_cannot_change_is_refused_with_both_values(runs, step, overrides, expected):
    arguments = [f"--output_dir={runs / 'refused'}", f"--checkpoint.branch_from={runs / 'run'}@{step}", *overrides]
    checked = hfpretrain("check", str(runs / "recipe.yaml"), *arguments)
    trained = train(runs / "recipe.yaml", *arguments)
    for result in (checked, trained):
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert all(text in result.stderr for text in expected), result.stderr
    assert not list((runs / "refused").glob("checkpoints/*"))


def test_a_branch_can_change_dropout_and_rotary_positions_but_no_shape(runs):
    changes = ["--model.config.attention_dropout=0.1", "--model.config.rope_theta=50000", "--training.max_steps=1"]
    result = succeed(branch(runs, "dropout", *changes))
    assert "unlike the trunk's, model.config.attention_dropout: is 0.1 now, was not set" in result.stderr


def test_a_branch_in_the_folder_of_its_trunk_is_refused(runs):
    result = train(runs / "recipe.yaml", f"--checkpoint.branch_from={runs / 'run'}@4")
    assert result.returncode == 2 and "contains a run that is no branch" in result.stderr
    both = train(runs / "recipe.yaml", f"--checkpoint.branch_from={runs / 'run'}@4", "--checkpoint.resume_from=x")
    assert both.returncode == 2 and "not both" in both.stderr


def test_a_finished_run_continues_in_place_or_names_the_command_of_a_branch(runs):
    arguments = [f"--output_dir={runs / 'wsd'}", *WSD, "--checkpoint.every_steps=2", "--checkpoint.keep_last=9"]
    succeed(train(runs / "recipe.yaml", *arguments))
    result = succeed(train(runs / "recipe.yaml", *arguments, "--training.max_steps=10"))
    expected = (
        f"hfpretrain train {runs / 'wsd'}/recipe.yaml --output_dir={runs / 'wsd'}-branch "
        f"--checkpoint.branch_from={runs / 'wsd'}@4 --training.max_steps=6"
    )
    assert expected in result.stderr, result.stderr
    words = expected.split()
    succeed(train(Path(words[2]), *words[3:]))
    assert [row["lr"] for row in rows(runs / "wsd-branch", "lr").values()][:3] == pytest.approx([3e-3] * 3)


def test_what_is_prepared_before_a_branch_is_what_it_trains_on(runs):
    arguments = [
        *(f"--output_dir={runs / 'later'}", f"--checkpoint.branch_from={runs / 'run'}@4", other_data(runs)),
        *(f"--data.prepared_dir={runs / 'prepared-before'}", "--training.max_steps=1"),
    ]
    for command in ("check", "prepare", "plan"):
        result = hfpretrain(command, str(runs / "recipe.yaml"), *arguments)
        assert result.returncode == 0, result.stderr
    (before,) = files_in(runs / "prepared-before")
    result = succeed(train(runs / "recipe.yaml", *arguments))
    assert files_in(runs / "prepared-before") == [before] and "training the tokenizer" not in result.stderr


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.slow
def test_a_branch_of_a_stream_continues_it_under_zero(runs):
    sources = [
        {"path": "json", "data_files": str(runs / f"{name}.jsonl"), "weight": weight}
        for name, weight in (("corpus", 3.0), ("other", 1.0))
    ]
    stream = [
        *(f"--tokenizer={{pretrained: {runs / 'run' / 'model'}}}", f"--data.sources={json.dumps(sources)}"),
        *("--data.validation_fraction=0", "--data.streaming=true", "--data.shuffle_buffer=8"),
        *("--checkpoint.every_steps=2", "--checkpoint.keep_last=9"),
    ]
    succeed(train(runs / "recipe.yaml", f"--output_dir={runs / 'stream'}", *stream))
    arguments = [f"--checkpoint.branch_from={runs / 'stream'}@4", "--training.max_steps=4", *stream]
    result = succeed(train(runs / "recipe.yaml", f"--output_dir={runs / 'continued'}", *arguments))
    assert "the data order of the trunk continues with sequence 32" in result.stderr
    assert_equal(weights(runs / "continued", 8), weights(runs / "stream", 8))
    shutil.rmtree(runs / "continued" / "checkpoints" / "step-00000008")
    succeed(train(runs / "recipe.yaml", f"--output_dir={runs / 'continued'}", *arguments))
    assert_equal(weights(runs / "continued", 8), weights(runs / "stream", 8))
    arguments += [f"--output_dir={runs / 'sharded'}", "--training.max_steps=2"]
    succeed(train(runs / "recipe.yaml", *arguments, engine="zero2", processes=2))
    assert_equal(weights(runs / "sharded", 6), weights(runs / "stream", 6), 1e-5)
    ledgers = [rows(runs / name, "ledger")[6]["ledger"] for name in ("continued", "sharded")]
    assert ledgers[0] == ledgers[1]
    arguments += [f"--output_dir={runs / 'larger'}", "--training.tokens_per_step=512", "--training.max_steps=1"]
    assert "the data order begins at its first sequence" in succeed(train(runs / "recipe.yaml", *arguments)).stderr
