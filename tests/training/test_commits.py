"""Which commits a run loads. `tests/publishing/test_hub.py` tests two ranks with a push between their starts."""

import json
from pathlib import Path

import pytest
from conftest import recipe_mapping

from hfpretrain.recipe.schema import Recipe, RecipeError
from hfpretrain.training import commits

OID, OTHER = "a" * 40, "b" * 40


def recipe(folder, **changes):
    sections = {"model": {"pretrained": "user/base"}, "tokenizer": {"pretrained": "user/base"}}
    return Recipe.model_validate(recipe_mapping(folder, **sections | changes))


def find(given):
    return commits.find(given.model, given.tokenizer, Path(given.output_dir), given.checkpoint.resume_from)


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache of the Hub, in offline mode, that has `user/base` at `OID`."""
    repo = tmp_path / "hub" / "models--user--base"
    for path, content in ((f"snapshots/{OID}/config.json", "{}"), ("refs/main", OID)):
        (repo / path).parent.mkdir(parents=True, exist_ok=True)
        (repo / path).write_text(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


def test_offline_mode_uses_the_commit_in_the_cache(tmp_path, cached):
    given = recipe(tmp_path)
    found = find(given)
    assert found == {"model.pretrained": OID, "tokenizer.pretrained": OID}
    pinned = commits.pin_revisions(given, found)
    assert (pinned.model.revision, pinned.tokenizer.revision) == (OID, OID)
    assert list(commits.notes(given.model, given.tokenizer, found)) == [
        f"{key}: user/base is loaded at commit {OID}" for key in ("model.pretrained", "tokenizer.pretrained")
    ]
    named = recipe(tmp_path, model={"pretrained": "user/base", "revision": OTHER})
    assert find(named)["model.pretrained"] == OTHER


def test_a_resumed_run_and_a_run_that_starts_from_its_checkpoint_use_the_same_commit(tmp_path, cached):
    record = {"hub_commits": {"model.pretrained": OTHER, "tokenizer.pretrained": OTHER}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text(json.dumps(record))
    assert find(recipe(tmp_path)) == record["hub_commits"]
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    other = {"output_dir": str(tmp_path / "other"), "checkpoint__resume_from": checkpoint}
    assert find(recipe(tmp_path, **other)) == record["hub_commits"]
    (tmp_path / "run" / "environment.json").write_text("{")
    with pytest.raises(RecipeError, match=r"environment\.json: is damaged"):
        find(recipe(tmp_path))


def test_a_name_that_is_a_folder_on_only_one_machine_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_hub = {"model.pretrained": OID, "tokenizer.pretrained": OID}
    (tmp_path / "user" / "base").mkdir(parents=True)
    given = recipe(tmp_path)
    assert find(given) == dict.fromkeys(of_hub) and commits.pin_revisions(given, find(given)) == given
    with pytest.raises(RecipeError, match=r"user/base is a local folder for rank 0 on .*, but not for rank 0"):
        commits.pin_revisions(given, of_hub)
    (tmp_path / "user" / "base").rmdir()
    (tmp_path / "user").rmdir()
    with pytest.raises(RecipeError, match="user/base is a local folder for rank 0, but not for rank 0 on"):
        commits.pin_revisions(given, dict.fromkeys(of_hub))
