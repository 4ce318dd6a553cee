"""`import hfpretrain` in a user's own script."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, launcher_environments, rows, run_module, script, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfpretrain
from hfpretrain import evaluate_perplexity, load_recipe, prepare, training_batches
from hfpretrain.data.ledger import Ledger, sequence_checksum
from hfpretrain.recipe.schema import RecipeError

SCRIPT = """
import sys
from hfpretrain import load_recipe, train

path, *overrides = sys.argv[1:]
model = train(load_recipe(path, overrides))
print("first", model)
recipe = load_recipe(path, [*overrides, "--training.mixed_precision=bf16", "--output_dir=" + str(model.parent) + "-2"])
print("second", train(recipe))
"""


def test_nothing_heavy_is_imported_until_it_is_used():
    code = (
        "import sys, hfpretrain\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert set(hfpretrain.__all__) <= set(dir(hfpretrain))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        hfpretrain.trian  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "from hfpretrain import train\nfrom hfpretrain.train import main\nassert callable(train) and callable(main)",
        "import hfpretrain\nassert callable(hfpretrain.train)\nimport hfpretrain.train\n"
        "assert callable(hfpretrain.train)",
        "import hfpretrain.train\nassert callable(hfpretrain.train.main) and callable(hfpretrain.train.train)",
        "from hfpretrain.train import main, train\nassert callable(main) and callable(train)",
    ],
)
def test_the_first_import_decides_whether_train_is_the_function_or_the_module(code):
    """The first import in a process decides: Python has one attribute for both."""
    result = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_package_exports_its_error_and_recipe_classes(folder):
    code = (
        "import sys\nfrom hfpretrain import Recipe, RecipeError, load_recipe\n"
        "assert 'torch' not in sys.modules\n"
        "try: Recipe.model_validate({}) and load_recipe('nowhere.yaml')\nexcept ValueError as error: print(type(error))"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "ValidationError" in result.stdout, result.stderr
    assert hfpretrain.RecipeError is RecipeError
    prepared = prepare(load_recipe(write_recipe(folder)))
    assert len(repr(prepared)) < 300 and str(prepared.path) in repr(prepared)


def test_a_script_trains_alone_and_under_a_launcher(folder):
    (folder / "mine.py").write_text(SCRIPT)
    arguments = [write_recipe(folder), "--training.max_steps=3"]
    result = script(folder / "mine.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert f"first {folder / 'run' / 'model'}" in result.stdout
    assert f"second {folder / 'run-2' / 'model'}" in result.stdout
    launched = {"ranks": launcher_environments("ddp")}
    result = run_module(folder / "mine.py", *arguments, f"--output_dir={folder / 'ddp'}", **launched)
    assert f"first {folder / 'ddp' / 'model'}" in result.stdout
    assert result.returncode == 1 and "launch each run separately" in result.stderr
    alone, launched = (rows(folder / run, "loss") for run in ("run", "ddp"))
    assert [alone[n]["ledger"] for n in (1, 2, 3)] == [launched[n]["ledger"] for n in (1, 2, 3)]
    # A user's own loop gets the batches of the runs, on any number of processes.
    recipe = load_recipe(*arguments[:1], arguments[1:])
    prepared, ledger = prepare(recipe), Ledger()
    per_rank = [training_batches(recipe, prepared, process_index=rank, num_processes=2) for rank in (0, 1)]
    for step, batches in enumerate(training_batches(recipe, prepared)):
        both = [batch for stream in per_rank for batch in next(stream)]
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(torch.cat([b[name] for b in batches]), torch.cat([b[name] for b in both]))
        ids = np.concatenate([batch["input_ids"].numpy() for batch in batches])
        ledger.append(sequence_checksum(ids, np.arange(step * len(ids), (step + 1) * len(ids))))
        assert ledger.digest == alone[step + 1]["ledger"]
    assert step == 2 and len(list(training_batches(recipe, prepared, start_step=1))) == 2
    with pytest.raises(RecipeError, match=r"micro_batch_size: .* 3 process"):
        training_batches(recipe, prepared, num_processes=3)
    # `evaluate_perplexity` takes a folder or a model in memory, which it leaves unchanged.
    path = folder / "run" / "model"
    report = evaluate_perplexity(path, recipe)
    assert report["tokens"] > 500 and report["block_size"] == 32
    texts = {"a": ["The river runs."], "b": ["under the stone", "over it"]}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).train(), AutoTokenizer.from_pretrained(path)
    in_memory = evaluate_perplexity(model, texts, tokenizer=tokenizer)
    assert model.training and "forward" not in vars(model.get_output_embeddings())
    stored = evaluate_perplexity(str(path), texts)
    assert in_memory.keys() == stored.keys() and in_memory["b/documents"] == 2
    assert in_memory["b/loss"] == pytest.approx(stored["b/loss"])
    with pytest.raises(RecipeError, match="give a list"):
        evaluate_perplexity(path, "one string")


def test_the_example_of_an_own_loop_trains(folder):
    result = script(ROOT / "examples" / "own_loop.py", write_recipe(folder), "--training.max_steps=20")
    assert result.returncode == 0, result.stderr
    losses = [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    assert AutoModelForCausalLM.from_pretrained(folder / "run")
