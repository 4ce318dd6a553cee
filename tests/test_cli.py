import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, hfpretrain, write_recipe

from hfpretrain.recipe.schema import Recipe


def test_check_prints_the_resolved_recipe_with_its_steps_and_parameters(folder):
    import yaml

    result = hfpretrain("check", str(write_recipe(folder)), "--training.max_steps=10")
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["training"]["max_steps"] == 10
    assert "10 of 256 tokens = 2,560 tokens" in result.stdout
    assert "8 sequences of 32; accumulation x processes 4" in result.stdout
    assert "# parameters       at most 39,072 (18,592 without embeddings)" in result.stdout


def test_check_lists_every_problem_at_once(folder):
    result = hfpretrain("check", str(write_recipe(folder)), "--seed=-1", "--model.config.hiden=3", "--data.x=1")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(path in result.stderr for path in ("seed:", "model.config.hiden:", "data.x:"))


def test_check_needs_neither_torch_nor_a_hugging_face_library(folder):
    code = (
        "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\n"
        "from hfpretrain.cli import main\nsys.exit(main(['check', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(write_recipe(folder))]
    result = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "transformers is not installed" in result.stderr and "# steps" in result.stdout


def test_prepare_prints_the_account_again_without_tokenizing_again(folder):
    recipe = str(write_recipe(folder))
    first, second = hfpretrain("prepare", recipe), hfpretrain("prepare", recipe)
    assert first.returncode == 0 and first.stdout == second.stdout
    assert "separators" in first.stdout and "remainder" in first.stdout
    assert "tokenizing" in first.stderr and "tokenizing" not in second.stderr
    path = first.stdout.split()[2]
    assert hfpretrain("verify", path).returncode == 0
    shard = Path(path) / "train-0" / "data-0-00000-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-3])
    broken = hfpretrain("verify", path)
    assert broken.returncode == 2 and "data-0-00000-00000.arrow has" in broken.stderr


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["verify", "nowhere"], "nowhere: is not a finished run"),
        (["evaluate", "nowhere", "--data", "constraints.txt"], "there is no folder 'nowhere'"),
        (["generate", "recipes/nowhere", "x"], "model: there is no file or folder 'recipes/nowhere'"),
        (["check", "recipes"], "'recipes' is a folder; give one of its files"),
        (["evaluate", "nowhere"], "give either a recipe or --data"),
        (["check", "nowhere.yaml"], "no such recipe file"),
        (["evaluate", "x", "--data", "y.txt", "--strid=8"], "unknown arguments: --strid=8"),
        (["plan", "quickstart", "--num_processes", "2"], "did you mean --num-processes?"),
        (["generate", "x", "--max_new_tokens=3"], "did you mean --max-new-tokens?"),
        (["plan", "quickstart", "--engine", "single", "--num-processes", "2"], "single runs one process"),
        (["generate", "tests@main", "x"], "tests is a local folder, which has no revisions"),
        (["verify", "x", "--oops"], "unknown arguments: --oops"),
    ],
)
def test_wrong_arguments_give_one_message_and_exit_code_2(arguments, fragment):
    result = hfpretrain(*arguments)
    assert result.returncode == 2 and fragment in result.stderr and "Traceback" not in result.stderr


def test_schema_is_printed():
    assert json.loads(hfpretrain("schema").stdout) == Recipe.model_json_schema()


def test_help_imports_no_heavy_library():
    code = (
        "import sys\nfrom hfpretrain.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stdout
    assert "train a recipe" in result.stdout and result.stdout.count("--section.key=value") == 1


def test_data_prints_the_documents_that_a_step_consumed(folder):
    recipe = str(write_recipe(folder))
    assert "run `hfpretrain prepare`" in hfpretrain("data", recipe, "--step", "3").stderr
    assert hfpretrain("prepare", recipe).returncode == 0
    result = hfpretrain("data", recipe, "--step", "3")
    assert result.returncode == 0 and result.stdout.startswith("step 3: 8 sequences of 32 tokens"), result.stderr
    corpus = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    found = re.findall(r"corpus.jsonl:(\d+), \d+ tokens\n    \| (.*)", result.stdout)
    assert len(found) >= 8 and all(text.strip("\ufffd") in corpus[int(line) - 1] for line, text in found)
    assert "1 to 8" in hfpretrain("data", recipe, "--step", "9").stderr
