import json
import shutil

import pytest
from conftest import hfpretrain, rows, small_text, train, write_jsonl, write_recipe
from hub_server import HubServer
from safetensors.torch import load_file
from warm import WarmProcess

from hfpretrain import evaluate_perplexity, load_recipe
from hfpretrain.checkpoints import locate
from hfpretrain.recipe.schema import ModelSection, RecipeError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 8 steps with two checkpoints, evaluated at both."""
    folder = tmp_path_factory.mktemp("plain")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    recipe = write_recipe(folder, checkpoint__every_steps=4, evaluation__every_steps=4)
    assert train(recipe).returncode == 0
    return folder / "run"


def checkpoint(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def refusal(*arguments):
    result = hfpretrain(*map(str, arguments))
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def test_an_export_of_the_last_checkpoint_equals_the_export_of_the_run(run, tmp_path):
    for given, name in ((checkpoint(run, 8), "last"), (run, "newest")):
        result = hfpretrain("export", str(given), str(tmp_path / name))
        assert result.returncode == 0 and "loaded with plain transformers" in result.stdout, result.stderr
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / name, run / "model"))
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    assert {path.name for path in (run / "model").iterdir()} - {"manifest.json"} <= {
        path.name for path in (tmp_path / "last").iterdir()
    }
    card = (tmp_path / "last" / "README.md").read_text()
    assert "step 8" in card and "get_vocab_base_pre" in card and 'res = "gpt-2"' in card  # for llama.cpp's converter
    assert not list(tmp_path.glob("*.incomplete"))


def test_a_checkpoint_gets_the_scores_of_the_run(run):
    recipe = load_recipe(run.parent / "recipe.yaml")
    recorded = rows(run, "eval/loss")
    for step in (4, 8):
        report = evaluate_perplexity(checkpoint(run, step), recipe)
        assert report["loss"] == pytest.approx(recorded[step]["eval/loss"], abs=1e-5)
    report = json.loads(
        hfpretrain("compare", str(run), str(checkpoint(run, 4)), recipe.output_dir + "/recipe.yaml").stdout
    )
    assert report["bits_per_byte_difference"] < 0 and report["a"]["loss"] < report["b"]["loss"]
    result = hfpretrain("generate", str(checkpoint(run, 8)), "the river", "--temperature", "0")
    assert result.returncode == 0 and result.stdout.startswith("the river"), result.stderr
    assert hfpretrain("generate", str(run), "the river", "--temperature", "0").stdout == result.stdout


def test_a_run_without_an_export_is_loaded_from_its_newest_checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    with locate.locate_model(str(tmp_path / "run")) as source, locate.locate_model(str(checkpoint(run, 8))) as same:
        ours, theirs = (load_file(f"{found.path}/model.safetensors") for found in (source, same))
        assert all(ours[key].equal(theirs[key]) for key in ours)


def test_a_failed_export_reports_why_and_replaces_nothing(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "already exists" in refusal("export", checkpoint(run, 8), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    assert "there is no file or folder" in refusal("export", run / "checkpoints" / "step-00000007", tmp_path / "x")
    assert "neither a checkpoint" in refusal("export", run / "model", tmp_path / "x")
    shutil.copytree(checkpoint(run, 8), tmp_path / "step-00000008")
    assert "not in the `checkpoints` folder of its run" in refusal("export", tmp_path / "step-00000008", tmp_path / "x")
    shutil.copytree(run, tmp_path / "run")
    weights = max(checkpoint(tmp_path / "run", 8).glob("*.distcp"), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "checksum" in refusal("export", checkpoint(tmp_path / "run", 8), tmp_path / "x")
    assert "checksum" in refusal("generate", checkpoint(tmp_path / "run", 8), "the river")
    assert not (tmp_path / "x").exists()


def test_generate_loads_a_revision_from_the_hub(run, tmp_path):
    local = hfpretrain("generate", str(checkpoint(run, 4)), "the river", "--temperature", "0")
    with HubServer() as hub, WarmProcess(hub.environment(tmp_path / "home")) as warm:
        assert warm.run("hfpretrain.cli", "push", run, "USER/NAME").returncode == 0
        for given in ("USER/NAME@step-00000004", "hub://USER/NAME@step-00000004"):
            result = warm.run("hfpretrain.cli", "generate", given, "the river", "--temperature", "0")
            assert result.returncode == 0 and result.stdout == local.stdout, result.stderr
        wrong = warm.run("hfpretrain.cli", "generate", "USER/NAME@step-00000005", "the river")
        assert wrong.returncode == 2 and "model: there is no folder 'USER/NAME'" in wrong.stderr


def test_model_pretrained_takes_an_id_with_its_revision(run):
    section = ModelSection(pretrained="USER/NAME@step-00000004")
    assert (section.pretrained, section.revision) == ("USER/NAME", "step-00000004")
    with pytest.raises(ValueError, match="give one"):
        ModelSection(pretrained="USER/NAME@a", revision="b")
    for given, message in ((checkpoint(run, 4), "hfpretrain export"), (run, f"did you mean {run / 'model'}")):
        with pytest.raises(RecipeError, match=message):
            from hfpretrain.modeling.config import load_config

            load_config(ModelSection(pretrained=str(given)))
