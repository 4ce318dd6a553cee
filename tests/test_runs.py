import gzip
import json

import pytest
from conftest import hfpretrain, train, write_recipe
from filelock import FileLock
from PIL import Image


def test_runs_lists_each_run_and_plots_all(folder):
    for name, steps in (("one", 4), ("two", 6)):
        recipe = write_recipe(folder, output_dir=str(folder / "runs" / name), training__max_steps=steps)
        assert train(recipe).returncode == 0
    assert train(recipe, "--training.max_steps=4", f"--output_dir={folder / 'runs' / 'three'}").returncode == 0
    # As if the run was killed at step 2, and as if it were running.
    metrics = folder / "runs" / "three" / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= 2]
    metrics.write_text("\n".join(lines) + "\n")
    with FileLock(folder / "runs" / "three" / ".lock"):
        result = hfpretrain("runs", str(folder / "runs"), "--plot", str(folder / "all.png"))
    assert result.returncode == 0, result.stderr
    header, one, three, two = result.stdout.splitlines()
    assert header.split()[:4] == ["run", "model", "engine", "parameters"]
    assert one.split()[:6] == ["one", "llama", "single", "x1", "39,072", "1,024"] and one.endswith("finished")
    assert three.endswith("running at 2/4") and two.split()[5] == "1,536"
    assert "stopped at 2/4" in hfpretrain("runs", str(folder / "runs" / "three")).stdout
    Image.open(folder / "all.png").verify()


def test_runs_fails_in_a_folder_without_runs(tmp_path):
    result = hfpretrain("runs", str(tmp_path))
    assert result.returncode == 2 and "contains no run" in result.stderr


@pytest.mark.parametrize("engine", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp2", "zero3"))])
def test_prompts_are_continued_at_evaluations_under_every_engine(folder, engine):
    recipe = write_recipe(
        folder,
        evaluation={"prompts": ["the river", ""], "sample_tokens": 8, "every_steps": 2},
        training__max_steps=4,
        logging__trackers=["tensorboard"],
        logging__profile_steps=[2, 3],
    )
    result = train(recipe, engine=engine)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [(s, p) for s in (0, 2, 4) for p in ("the river", "")]
    assert all(isinstance(line[kind], str) for line in lines for kind in ("greedy", "drawn"))
    assert "greedy 'the river' -> " in result.stderr and "drawn  'the river' -> " in result.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (folder / "run").glob("hfpretrain/events*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert any("samples/0/greedy" in tag for tag in read.Tags()["tensors"])
    ranks = 1 if engine is None else 2
    assert len(list((folder / "run" / "profile").glob("rank-*.json.gz"))) == ranks
    with gzip.open(folder / "run" / "profile" / "rank-0.json.gz") as file:
        assert any(event["name"].startswith("aten::") for event in json.load(file)["traceEvents"])
    table = (folder / "run" / "profile" / "operators.txt").read_text().splitlines()
    assert "Self CPU" in table[1] and len(table) in range(14, 18)


def test_greedy_continuations_equal_those_of_transformers(folder):
    recipe = write_recipe(
        folder, evaluation={"prompts": ["the river"], "sample_tokens": 12}, training__max_steps=30, optimizer__lr=1e-2
    )
    assert train(recipe).returncode == 0
    last = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()][-1]
    model = str(folder / "run" / "model")
    result = hfpretrain("generate", model, "the river", "--max-new-tokens", "12", "--temperature", "0")
    assert result.returncode == 0 and result.stdout.strip() == ("the river" + last["greedy"]).strip()
    drawn = [hfpretrain("generate", model, "the river", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0].startswith("the river")
