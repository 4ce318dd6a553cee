"""A short `benchmarks/domain_adaptation.py`."""

import json

import pytest
from conftest import ROOT, script, small_text, write_jsonl, write_recipe
from test_base import other_text


@pytest.mark.slow
def test_replay_keeps_more_of_the_old_text(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", small_text(200))
    new = write_jsonl(tmp_path / "new.jsonl", other_text(200, seed=0))
    recipe, output = write_recipe(tmp_path, optimizer__lr=1e-2), tmp_path / "runs"
    sizes = ["--base-steps", 60, "--steps", 30, "--replay", 0.5, "--arms", "plain", "replay"]
    command = [new, "--base-recipe", recipe, *sizes, "--output", output]
    result = script(ROOT / "benchmarks" / "domain_adaptation.py", *command)
    assert result.returncode == 0, result.stderr
    found = json.loads((output / "figures.json").read_text())
    plain, replay = (found[arm] for arm in ("plain", "replay"))
    for report in (plain, replay):
        assert report["new/bits_per_byte_difference_interval"][0] > 0
    assert plain["old/bits_per_byte_difference_interval"][1] < 0
    assert replay["old/bits_per_byte_difference"] > plain["old/bits_per_byte_difference"]
    assert replay["new/bits_per_byte_difference"] < plain["new/bits_per_byte_difference"]
    assert result.stdout.count("| gained ") >= 2 and "| lost " in result.stdout
    # No held-out document is trained on, although the files with the training text have it.
    folder = json.loads((output / "replay" / "data.json").read_text())["prepared"]
    sources = json.loads((output / "prepared" / folder / "manifest.json").read_text())["sources"]
    for name, source in zip(("new", "old"), sources, strict=False):
        held_out = (output / f"{name}.jsonl").read_text().splitlines()
        assert source["dropped"] == {"also_in_validation": len(held_out)} and len(held_out) > 5
