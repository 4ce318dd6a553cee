"""`hfpretrain average`: the mean of the weights of several checkpoints."""

import json
import shutil

import pytest
import torch
from conftest import hfpretrain, rows, small_text, train, write_jsonl, write_recipe
from transformers import AutoModelForCausalLM

from hfpretrain import files
from hfpretrain.checkpoints.average import AveragedTensors
from hfpretrain.engines.pieces import load_whole_tensors
from hfpretrain.recipe.yaml import read_recipe


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs of 8 steps that save every 2: `run` under fsdp2 on two processes, `free` schedule-free."""
    folder = tmp_path_factory.mktemp("average")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    write_jsonl(folder / "held.jsonl", small_text(20, seed=2))
    held = [{"path": "json", "data_files": str(folder / "held.jsonl"), "domain": name} for name in ("one", "two")]
    recipe = write_recipe(
        folder,
        scheduler={"name": "constant_with_warmup", "num_warmup_steps": 2},
        checkpoint__every_steps=2,
        checkpoint__keep_last=9,
        data__validation_fraction=0,
        data__validation_sources=held,
        model__dtype="bfloat16",
    )
    for result in (
        train(recipe, engine="fsdp2", processes=2),
        train(
            recipe, f"--output_dir={folder / 'free'}", "--optimizer.name=adamw_schedule_free", "--model.dtype=float32"
        ),
    ):
        assert result.returncode == 0, result.stderr
    return folder


def weights(run, step, part="model"):
    return load_whole_tensors(run / "checkpoints" / f"step-{step:08d}", (part,))


def test_the_last_checkpoints_are_averaged_and_evaluated_beside_the_newest(runs):
    run = runs / "run"
    before = {path: files.sha256(path) for path in run.rglob("*") if path.is_file()}
    result = hfpretrain("average", str(run), "--last", "3")
    assert result.returncode == 0, result.stderr
    folder = run / "averages" / "steps-4-6-8"
    assert f"{folder}: the mean of the weights of the steps 4, 6, 8" in result.stdout
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    parts = [weights(run, step) for step in (4, 6, 8)]
    for name in parts[0]:
        mean = torch.stack([part[name].double() for part in parts]).mean(dim=0)
        torch.testing.assert_close(found[name], mean.bfloat16(), rtol=2**-7, atol=1e-7)
    lines = [line.split() for line in result.stdout.splitlines()]
    labels = [" ".join(line[:-3]) for line in lines[3:]]
    assert labels == [
        f"{what}{domain}" for domain in ("", ", one", ", two") for what in ("average", "step 8, the newest")
    ]
    newest = rows(run, "eval/loss")[8]
    # The newest is exported in bfloat16.
    assert float(lines[4][-3]) == pytest.approx(newest["eval/loss"], abs=0.02)
    assert float(lines[4][-1]) == pytest.approx(newest["eval/bits_per_byte"], abs=0.02)
    assert lines[3][-3] != lines[4][-3]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (
        metrics["average"] == "the mean of the weights of the steps 4, 6, 8"
        and f"{metrics['eval/loss']:.4f}" == lines[3][-3]
    )
    card = (folder / "README.md").read_text()
    assert "Its weights are the mean of the weights of the steps 4, 6, 8." in card and "| average, two |" in card
    assert "step 8 |" not in card and str(runs) not in card
    assert {path: files.sha256(path) for path in before} == before
    verified = hfpretrain("verify", str(folder))
    assert verified.returncode == 0, verified.stderr
    for command in (
        ["generate", str(folder), "the river", "--max-new-tokens", "2"],
        ["evaluate", str(folder), "--data", str(runs / "held.jsonl")],
    ):
        assert hfpretrain(*command).returncode == 0
    again = hfpretrain("average", str(run), "--steps", "4,6,8")
    assert again.returncode == 2 and "is not overwritten" in again.stderr


def test_weights_give_a_weighted_mean_of_what_is_evaluated(runs):
    run, out = runs / "free", runs / "out"
    result = hfpretrain("average", str(run), str(out), "--steps", "2,8", "--weights", "1,3")
    assert result.returncode == 0 and "in the proportions 0.25, 0.75" in result.stdout, result.stderr
    exports = []
    for step in (2, 8):
        folder = runs / f"export-{step}"
        assert hfpretrain("export", str(run / "checkpoints" / f"step-{step:08d}"), str(folder)).returncode == 0
        exports.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, exports[0][name] / 4 + exports[1][name] * 3 / 4, rtol=1e-6, atol=1e-7)


def test_a_tensor_is_computed_when_it_is_asked_for(runs):
    run = runs / "run"
    paths = [run / "checkpoints" / f"step-{step:08d}" for step in (6, 8)]
    averaged = AveragedTensors(paths, [0.5, 0.5], read_recipe(run / "recipe.yaml").optimizer)
    assert set(averaged) == set(weights(run, 8)) and all(averaged[name].dtype == torch.float32 for name in averaged)
    copy = runs / "shrunk"
    shutil.copytree(paths[1], copy)
    (copy / "__0_0.distcp").unlink()
    broken = AveragedTensors([paths[0], copy], [0.5, 0.5], read_recipe(run / "recipe.yaml").optimizer)
    assert len(broken) == len(averaged)  # nothing has been read
    with pytest.raises(RuntimeError):
        dict(broken)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--last", "1"], "--last: must be at least 2"),
        (["--last", "9"], "--last: there are fewer than 9 checkpoints: "),
        (["--steps", "2,3"], "there is no checkpoint of step 3"),
        (["--steps", "4,2"], "in ascending order, each once"),
        (["--steps", "2,2"], "in ascending order, each once"),
        (["--steps", "2;4"], "'2;4' is not a number"),
        (["--last", "2", "--weights", "1"], "1 weights are given for 2 checkpoints"),
        (["--last", "2", "--weights", "0,0"], "not all 0"),
        (["--last", "2", "--weights", "1,-1"], "at least 0"),
        (["--last", "2", "--weights", "1,nan"], "'nan' is not a number"),
        ([], "one of the arguments --last --steps is required"),
        (["--last", "2", "--steps", "2,4"], "not allowed with argument"),
    ],
)
def test_wrong_arguments_are_refused(runs, arguments, expected):
    result = hfpretrain("average", str(runs / "run"), *arguments)
    assert result.returncode == 2 and expected in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not [path for path in (runs / "run").glob("averages/*") if path.name != "steps-4-6-8"]


def test_what_is_no_run_or_damaged_is_refused(runs):
    assert "is not a run folder" in hfpretrain("average", str(runs), "--last", "2").stderr
    run = runs / "damaged"
    shutil.copytree(runs / "run", run)
    path = run / "checkpoints" / "step-00000006" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    result = hfpretrain("average", str(run), "--last", "2")
    assert result.returncode == 2 and "leave this checkpoint out with --steps" in result.stderr
    shutil.rmtree(runs / "prepared")
    result = hfpretrain("average", str(run), "--steps", "4,8")
    assert result.returncode == 0 and "not evaluated" in result.stdout, result.stderr
