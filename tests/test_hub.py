"""Everything that touches the Hub, with the real client against a server on localhost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, rows, small_text, write_jsonl, write_recipe
from hub_server import HubServer
from huggingface_hub import ModelCard

from hfpretrain.hub import model_card
from hfpretrain.recipe import HubSection

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub with a dataset, a run trained on it, and the run's model pushed."""
    folder = tmp_path_factory.mktemp("hub")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    with HubServer() as hub:
        env = hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}

        def run(*command):
            return subprocess.run(list(map(str, command)), env=env, cwd=ROOT, capture_output=True, text=True)

        assert run(BIN / "hf", "upload", "user/data", folder / "corpus.jsonl", "--repo-type", "dataset").returncode == 0
        recipe = write_recipe(folder, data__sources=[{"path": "user/data"}], hub__license="apache-2.0")
        trained = run(sys.executable, "-m", "hfpretrain.train", recipe)
        assert trained.returncode == 0, trained.stderr
        pushed = run(BIN / "hfpretrain", "push", folder / "run", "user/tiny")
        assert pushed.returncode == 0, pushed.stderr
        yield hub, folder, run, pushed


def test_the_export_is_pushed_as_it_is(published):
    hub, folder, _, pushed = published
    assert "user/tiny/commit/" in pushed.stdout
    stored = hub.repos["models/user/tiny"].at("main").files
    for path in (folder / "run" / "model").iterdir():
        assert stored[path.name] == path.read_bytes(), path.name
    manifest = json.loads(next((folder / "prepared").glob("*/manifest.json")).read_text())
    assert manifest["source_identities"] == [[hub.repos["datasets/user/data"].commits[-1].oid]]
    assert ModelCard((folder / "run" / "model" / "README.md").read_text()).data.datasets == ["user/data"]


def test_training_goes_on_from_a_hub_model_and_its_tokenizer(published):
    _, folder, run, _ = published
    recipe = write_recipe(
        folder,
        output_dir=str(folder / "continued"),
        model={"pretrained": "user/tiny"},
        tokenizer={"pretrained": "user/tiny"},
        data__sources=[{"path": "user/data"}],
    )
    result = run(sys.executable, "-m", "hfpretrain.train", recipe)
    assert result.returncode == 0, result.stderr
    last = list(rows(folder / "run", "eval/loss").values())[-1]
    first = rows(folder / "continued", "eval/loss")[0]
    assert first["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)
    card = ModelCard((folder / "continued" / "model" / "README.md").read_text())
    assert card.data.base_model == "user/tiny"


def test_a_hub_model_is_evaluated(published):
    _, folder, run, _ = published
    result = run(BIN / "hfpretrain", "evaluate", "user/tiny", "--data", folder / "corpus.jsonl", "--block-size", 32)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["documents"] == 200


def test_what_cannot_be_pushed_is_said_without_a_traceback(published):
    _, folder, run, _ = published
    missing = run(BIN / "hfpretrain", "push", folder / "nowhere", "user/tiny")
    assert missing.returncode == 2 and "no exported model here" in missing.stderr
    refused = run(BIN / "hfpretrain", "push", folder / "run", "not a name!")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "not a name!" in refused.stderr


def test_the_card_without_evaluations_or_license_is_valid():
    text = model_card(
        name="run",
        section=HubSection(),
        origin="scratch",
        base_model=None,
        datasets=[],
        results={},
        data="none",
        training={},
        recipe="a: 1",
        report={"loss_export": 1.0, "loss_training": 1.0, "sample": "```"},
        bos="<|endoftext|>",
    )
    card = ModelCard(text)
    assert card.data.tags == ["hfpretrain"] and card.data.license is None and card.data.eval_results is None
    assert "No validation split was held out." in card.text and "'''" in card.text
