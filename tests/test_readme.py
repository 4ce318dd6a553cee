"""The commands and snippets of README.md, run at small size."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, hfpretrain, run_module, script, train
from finished_rungs import finish
from hub_server import HubServer

from hfpretrain import load_recipe
from hfpretrain.ladder.rungs import Ladder
from hfpretrain.recipe.schema import accumulation_steps

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
TRAINING = [command for command in COMMANDS if command.startswith(("accelerate launch", "hfpretrain train"))]
CONSOLE = [command for command in COMMANDS if command.startswith("hfpretrain ") and command not in TRAINING]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# Model and budget are smaller here; files, engine, sources and every other key are as in README.md.
SMALL = [
    "--training.max_steps=4",
    "--scheduler.num_warmup_steps=1",
    "--model.config.hidden_size=32",
    "--data.block_size=64",
    "--model.config.intermediate_size=64",
    "--training.tokens_per_step=1024",
    "--training.mixed_precision=no",
    "--evaluation.every_steps=null",
    "--tokenizer.vocab_size=512",
    "--data.validation_fraction=0.002",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the project's files and some texts."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("recipes", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my-texts").mkdir()
    for number in range(2500):
        (folder / "my-texts" / f"{number}.txt").write_text(f"text number {number} " * 20)
    result = train(Path("recipes/quickstart.yaml"), *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def run(folder, command, *more, env=None):
    words = [*shlex.split(command), *more]
    if env is None and words[0] == "hfpretrain":
        return hfpretrain(*words[1:], cwd=folder)
    if env is None and words[:2] == ["accelerate", "launch"]:
        return run_module("accelerate.commands.launch", *words[2:], cwd=folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**(env or environment()), "PATH": path}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=400)


def test_every_command_is_covered():
    others = [c for c in COMMANDS if c not in TRAINING + CONSOLE]
    # The first two are what .ci/run and the release trial call, the last two what the Makefile's `install` does.
    assert [" ".join(c.split()[:2]) for c in others] == [
        "make quickstart",
        "make test",
        "pip install",
        "DS_BUILD_OPS=0 pip",
    ]
    assert TRAINING and CONSOLE and PYTHON


@pytest.mark.parametrize("command", TRAINING)
def test_training_commands_of_the_readme_train(folder, command):
    # With `SMALL`, the only checkpoint is that of step 4, and a branch has 4 steps.
    command = command.replace("@250", "@4").replace("num_decay_steps=100", "num_decay_steps=4")
    result = run(folder, command, *SMALL)
    assert result.returncode == 0, result.stderr
    assert "after training" in result.stdout


@pytest.mark.parametrize("command", TRAINING)
def test_the_batch_of_a_training_command_fits_its_processes(command):
    """`SMALL` changes the batch, so the run above does not check this."""
    words = shlex.split(command)
    given = [words[at + 1] for at, word in enumerate(words) if word in ("--num_processes", "--num-processes")]
    processes = int(given[0]) if given else 1
    recipe = load_recipe(ROOT / next(word for word in words if word.startswith("recipes/")))
    training = recipe.training
    assert accumulation_steps(training.tokens_per_step, recipe.data.block_size, training.micro_batch_size, processes)


@pytest.mark.parametrize("command", CONSOLE)
def test_console_commands_of_the_readme_succeed(folder, command, monkeypatch):
    if command.startswith("hfpretrain push"):
        with HubServer() as hub:
            result = run(folder, command, env=hub.environment(folder / "home"))
            assert "models/USER/NAME" in hub.repos
    elif command.startswith("hfpretrain ladder"):
        small = [*SMALL, "--training.max_steps=100", "--evaluation.every_steps=50"]
        sizes = (5_000, 12_000, 20_000, 30_000)
        monkeypatch.chdir(folder)
        recipe = load_recipe(command.split()[2], small)
        for rung in Ladder(recipe, sizes, [1.0], 1, Path("runs/quickstart-ladder")).rungs[1:]:
            finish(rung)  # one rung is trained here; `make proofs` trains all
        result = run(folder, re.sub("--sizes .*", f"--sizes {' '.join(map(str, sizes))}", command), *small)
        assert result.stdout.count("(finished before)") == 3 and "rung 1/4" in result.stdout
    else:
        overrides = SMALL if "recipes/quickstart.yaml" in command else []
        result = run(folder, command.replace("--stride 128", "--stride 16"), *overrides)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_yaml_snippets_are_valid():
    import yaml

    from hfpretrain.recipe.schema import DataSection, EvaluationSection

    mixture, evaluation, replay = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
    section = DataSection.model_validate({**mixture["data"], "block_size": 1024})
    assert section.weights == [(0, [0.8, 0.2]), (9_000_000_000, [0.3, 0.7])]
    assert EvaluationSection.model_validate(evaluation["evaluation"]).lm_eval.limit == 500
    section = DataSection.model_validate({**replay["data"], "block_size": 1024})
    assert section.weights == [(0, [3, 1])] and [one.domain for one in section.validation_sources] == ["new", "old"]


def test_the_slurm_script_prepares_a_shard(folder):
    script = (ROOT / "examples" / "prepare.slurm").read_text()
    assert "--array=1-16" in script
    env = {**environment(), "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "2"}
    command = f"bash {ROOT / 'examples' / 'prepare.slurm'} recipes/quickstart.yaml --output_dir=slurm/run"
    result = run(folder, command, *SMALL, env=env)
    assert result.returncode == 0 and "shard 2 of 2" in result.stdout, result.stderr


def test_python_snippets_of_the_readme_run(folder):
    for code in PYTHON:
        (folder / "snippet.py").write_text(code.replace('("quickstart")', f'("quickstart", {SMALL})'))
        result = script(folder / "snippet.py", cwd=folder)
        assert result.returncode == 0, result.stderr
    assert (folder / "runs" / "fine-tuned" / "model.safetensors").exists()


def test_makefile_and_ci_have_the_targets_of_the_readme():
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in ("quickstart", "test", "proofs", "style", "quality"))
    calls = (ROOT / ".ci" / "run").read_text()
    assert "make quality" in calls and "make test" in calls
