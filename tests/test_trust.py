"""What is loaded is not run, and what is secret is not written."""

import ast
import json
import subprocess
import sys

from conftest import ROOT, environment, rows, train, write_recipe

TOKEN = "hf_plantedTokenThatNobodyMayEverSee"


def test_no_token_or_environment_variable_reaches_the_run_folder(folder):
    recipe = write_recipe(folder, checkpoint__every_steps=4, logging__trackers=["tensorboard"])
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": TOKEN, "MY_VARIABLE": TOKEN, "AWS_SECRET_ACCESS_KEY": TOKEN}
    result = train(recipe, engine="ddp", **secrets)
    assert result.returncode == 0, result.stderr
    assert TOKEN not in result.stdout + result.stderr
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert len(found) > 20
    assert [path for path in found if TOKEN.encode() in path.read_bytes()] == []


def test_pickles_are_loaded_with_weights_only_and_code_from_outside_only_where_the_recipe_says_so():
    for path in sorted((ROOT / "hfpretrain").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert not name.startswith(("pickle.", "marshal.")) and name not in ("eval", "exec"), (path, name)
            if name == "torch.load":
                assert keywords["weights_only"] == "True", path
            assert keywords.get("trust_remote_code", "False") in ("False", "section.trust_remote_code"), path


def test_a_tracker_that_throws_is_left_out_and_training_goes_on(folder):
    recipe = write_recipe(folder, logging__trackers=["tensorboard"])
    code = (
        "import sys; from accelerate.tracking import TensorBoardTracker\n"
        "log = TensorBoardTracker.log\n"
        "def throwing(self, values, step=None, **keywords):\n"
        "    if step == 3: raise ConnectionError('its server is down')\n"
        "    log(self, values, step=step, **keywords)\n"
        "TensorBoardTracker.log = throwing\n"
        "from hfpretrain.train import main; sys.exit(main())\n"
    )
    (folder / "throwing.py").write_text(code)
    command = [sys.executable, str(folder / "throwing.py"), str(recipe)]
    env = environment(PYTHONPATH=str(ROOT))
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "tensorboard is not logged to any more: ConnectionError: its server is down" in result.stderr
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "event" in line] == [3]
    assert list(rows(folder / "run", "loss")) == list(range(1, 9))
