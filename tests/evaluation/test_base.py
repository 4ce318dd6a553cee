"""What a run that trains an existing model further gained and lost in bits per byte, by validation set."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import hfpretrain, rows, small_text, train, write_jsonl, write_recipe

from hfpretrain.evaluation import sums
from hfpretrain.evaluation.base import BASE_EVALUATION, BaseEvaluation, gain_text

OTHER = ("sea", "ship", "wave", "sail", "mast", "harbor", "storm", "anchor")


def other_text(num_documents, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(OTHER, draw.integers(10, 60))) for _ in range(num_documents)]


@pytest.fixture(scope="module")
def continued(tmp_path_factory):
    """A base trained on one kind of text, and a recipe that trains it further on another kind."""
    folder = tmp_path_factory.mktemp("base")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    base = write_recipe(folder, output_dir=str(folder / "base"), training__max_steps=40)
    assert train(base).returncode == 0
    write_jsonl(folder / "old.jsonl", small_text(20, seed=5))
    write_jsonl(folder / "new.jsonl", other_text(20, seed=1))
    write_jsonl(folder / "corpus.jsonl", other_text(200, seed=0))
    model = str(folder / "base" / "model")
    held_out = [
        {"path": "json", "data_files": str(folder / f"{name}.jsonl"), "domain": name} for name in ("old", "new")
    ]
    path = write_recipe(
        folder,
        model={"pretrained": model},
        tokenizer={"pretrained": model},
        data__validation_sources=held_out,
        data__validation_fraction=0.0,
        evaluation__every_steps=10,
        checkpoint__every_steps=10,
        training__max_steps=30,
    )
    result = train(path)
    assert result.returncode == 0, result.stderr
    return folder, path, result


def test_a_run_reports_what_it_gained_and_lost_by_domain(continued):
    folder, _, result = continued
    found = rows(folder / "run", "eval/loss")
    first, last = found[0], found[30]
    assert first["base"] == str(folder / "base" / "model") and not any("gained" in key for key in first)
    for prefix in ("eval/", "eval/old/", "eval/new/"):
        gained, (low, high) = last[f"{prefix}bits_per_byte_gained"], last[f"{prefix}bits_per_byte_gained_interval"]
        assert gained == pytest.approx(first[f"{prefix}bits_per_byte"] - last[f"{prefix}bits_per_byte"], abs=1e-9)
        assert low < gained < high
    # The run learned the new text and forgot the old one.
    assert last["eval/old/bits_per_byte_gained_interval"][1] < 0 < last["eval/new/bits_per_byte_gained_interval"][0]
    lost = f"lost {-last['eval/old/bits_per_byte_gained']:.4f}"
    new = f"gained {last['eval/new/bits_per_byte_gained']:.4f}"
    assert re.search(rf"  old: loss .*, bits per byte \d\.\d+: {lost} \(", result.stderr)
    assert f"compared with {folder / 'base' / 'model'}; 95% intervals" in result.stdout
    assert re.search(rf"\n    old +{lost} \(.*\n    new +{new} \(", result.stdout)
    card = (folder / "run" / "model" / "README.md").read_text()
    assert f"- old: {lost} (" in card and f"- new: {new} (" in card and "Compared with the base model `model`" in card


def test_a_new_model_has_no_base(continued):
    folder, *_ = continued
    assert not any(
        "gained" in key or key == "base" for row in rows(folder / "base", "eval/loss").values() for key in row
    )
    assert not (folder / "base" / "checkpoints" / "step-00000040" / BASE_EVALUATION).exists()


@pytest.mark.parametrize("engine", ["single", "ddp"])
def test_a_resumed_run_compares_with_the_same_base(continued, tmp_path, engine):
    folder, path, _ = continued
    checkpoint = folder / "run" / "checkpoints" / "step-00000020"
    result = train(path, f"--output_dir={tmp_path / 'run'}", f"--checkpoint.resume_from={checkpoint}", engine=engine)
    assert result.returncode == 0, result.stderr
    found = rows(tmp_path / "run", "eval/loss")
    assert min(found) == 20
    expected = rows(folder / "run", "eval/loss")
    for step in (20, 30):
        for key in ("eval/old/bits_per_byte_gained", "eval/new/bits_per_byte_gained", "eval/bits_per_byte_gained"):
            assert found[step][key] == pytest.approx(expected[step][key], abs=1e-5)
            bounds = expected[step][f"{key}_interval"]
            assert found[step][f"{key}_interval"] == pytest.approx(bounds, abs=1e-4)
    assert "compared with the model before training" in result.stdout


def test_a_checkpoint_without_the_base_is_reported(continued, tmp_path):
    folder, path, _ = continued
    checkpoint = tmp_path / "checkpoints" / "step-00000020"
    shutil.copytree(folder / "run" / "checkpoints" / "step-00000020", checkpoint)
    (checkpoint / BASE_EVALUATION).unlink()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["files"][BASE_EVALUATION], manifest["manifest_sha256"]  # as an older version wrote it
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    result = train(path, f"--output_dir={tmp_path / 'run'}", f"--checkpoint.resume_from={checkpoint}")
    assert result.returncode == 0, result.stderr
    text = f"has no evaluation of {folder / 'base' / 'model'}, so what the run gains and loses is not measured"
    assert text in result.stderr
    events = [row["event"] for row in rows(tmp_path / "run", "event").values()]
    assert any(text in event for event in events)
    assert not any("gained" in key for row in rows(tmp_path / "run", "eval/loss").values() for key in row)


def test_two_checkpoints_are_compared_by_domain_on_the_text_of_the_run(continued):
    folder, *_ = continued
    result = hfpretrain("compare", str(folder / "base"), str(folder / "run"))
    assert result.returncode == 0, result.stderr
    report, last = json.loads(result.stdout), rows(folder / "run", "eval/loss")[30]
    for name in ("old", "new"):
        difference = report[f"{name}/bits_per_byte_difference"]
        # The run's blocks are those of `compare`: documents of a set end to end.
        assert difference == pytest.approx(last[f"eval/{name}/bits_per_byte_gained"], abs=1e-4)
        assert report[f"{name}/bits_per_byte_difference_interval"] == pytest.approx(
            last[f"eval/{name}/bits_per_byte_gained_interval"], abs=1e-3
        )
        figures = (report[side][f"{name}/bits_per_byte"] for side in "ab")
        assert difference == pytest.approx(next(figures) - next(figures))
        assert report[f"{name}/documents"] == 20
    assert report["old/wins_of_a"] > 0.9 > 0.1 > report["new/wins_of_a"]
    assert re.search(rf"old +lost {-report['old/bits_per_byte_difference']:.4f} \(", result.stderr)
    reverse = hfpretrain("compare", str(folder / "run" / "model"), str(folder / "base"), "--block-size", "32")
    # The text is still that of the run of the second model, if it is one with validation text.
    assert reverse.returncode == 0 and str(folder / "base" / "recipe.yaml") in reverse.stderr
    shorter = hfpretrain("compare", str(folder / "base"), str(folder / "run"), "--data.block_size=16")
    assert shorter.returncode == 0 and json.loads(shorter.stdout)["a"]["block_size"] == 16
    neither = hfpretrain("compare", str(folder), str(folder))
    assert neither.returncode == 2
    missing = hfpretrain("compare", "a", "b")
    assert (
        missing.returncode == 2 and "recipe: give a recipe or --data FILE, since neither a nor b is" in missing.stderr
    )


def documents(nll, num_bytes):
    """A table as in `sums.Sums`."""
    nll, num_bytes = np.asarray(nll, float), np.asarray(num_bytes, float)
    return np.stack([nll, np.ones_like(nll), nll, num_bytes], axis=1)


def test_the_base_is_kept_in_a_file_with_any_names_of_sets(tmp_path):
    sets = {"": documents([1, 2], [4, 4]), "file": documents([3], [4]), "allow_pickle": documents([5], [0])}
    base, read = BaseEvaluation("base"), BaseEvaluation("base")
    assert not base.is_known and not read.load(tmp_path / "x.npz")
    base.keep(sets)
    base.save(tmp_path / "x.npz")
    assert read.load(tmp_path / "x.npz")
    now = {name: table * [0.5, 1, 0.5, 1] for name, table in sets.items()}
    found = read.figures(now)
    assert found == base.figures(now)
    assert found["bits_per_byte_gained"] == pytest.approx((6 - 3) / 12 / math.log(2))
    assert found["file/bits_per_byte_gained"] == pytest.approx(1.5 / 4 / math.log(2))
    assert found["file/bits_per_byte_gained_interval"] is None
    assert "allow_pickle/bits_per_byte_gained" not in found  # no document has bytes


def test_memory_is_bounded_and_an_interval_covers_the_true_difference(tmp_path):
    draw = np.random.default_rng(0)
    size = draw.integers(50, 500, 50_000)
    hard = draw.gamma(5, 0.2, 50_000)  # how hard a document is, for both models
    base = BaseEvaluation("base")
    base.keep({"x": documents(hard * size, size)})
    base.save(tmp_path / "x.npz")
    assert (tmp_path / "x.npz").stat().st_size < 330_000
    now = documents((hard - 0.01 + 0.02 * draw.standard_normal(50_000)) * size, size)
    found = base.figures({"x": now})
    low, high = found["x/bits_per_byte_gained_interval"]
    assert low < 0.01 / math.log(2) < high and high - low < 0.002
    # Unpaired, the intervals of both models would be much wider.
    unpaired = sums.figures(now)["bits_per_byte_interval"]
    assert unpaired[1] - unpaired[0] > 5 * (high - low)


@pytest.mark.parametrize(
    ("gained", "interval", "text"),
    [
        (0.1, [0.05, 0.15], "gained 0.1000 (0.0500 to 0.1500)"),
        (-0.1, [-0.15, -0.05], "lost 0.1000 (0.0500 to 0.1500)"),
        (-0.1, [-0.25, 0.05], "lost 0.1000 (-0.0500 to 0.2500), which may be chance"),
        (0.1, None, "gained 0.1000 (one document, so no interval)"),
    ],
)
def test_a_gain_in_words(gained, interval, text):
    assert gain_text(gained, interval) == text
