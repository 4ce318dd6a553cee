"""The Slurm script, with replacements for Slurm's commands that run every node's command on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment, rows, train, write_recipe

SCRIPT = ROOT / "recipes" / "launch.slurm"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SCONTROL_LOG"
[[ $2 == hostnames ]] || [[ $1 == requeue ]] || exit 1
if [[ $1 == show ]]; then printf '127.0.0.1\\n%.0s' $(seq $SLURM_JOB_NUM_NODES); fi
"""
# What `accelerate launch -m hfpretrain.train` does with a run that stops early: any code but 0 becomes 1.
STOPPED_EARLY = f"""#!/bin/bash
RANK=$SLURM_NODEID {sys.executable} -c '
import sys
import hfpretrain.train
train = sys.modules["hfpretrain.train"]
train._main = lambda arguments, rank: 75
sys.exit(train.main())' || exit 1
"""


def launch(folder, *overrides, **env):
    """`sbatch --nodes=2 recipes/launch.slurm`, and the calls of scontrol that it made."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    log = folder / "scontrol.log"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(**{**slurm, "PATH": path, "SCONTROL_LOG": str(log), "TMPDIR": str(folder), **env})
    command = ["bash", str(SCRIPT), *overrides]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    return result, log.read_text().splitlines() if log.exists() else []


def test_the_script_is_valid_bash_and_reports_missing_variables(tmp_path):
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    result, _ = launch(tmp_path, ENGINE="ddp")
    assert result.returncode != 0 and "set RECIPE" in result.stderr
    result, _ = launch(tmp_path, RECIPE="x.yaml")
    assert result.returncode != 0 and "set ENGINE" in result.stderr


@pytest.mark.slow
def test_two_nodes_give_the_losses_of_one_process(folder):
    recipe = write_recipe(folder, training__max_steps=4)
    assert train(recipe, f"--output_dir={folder / 'single'}").returncode == 0
    overrides = f"--output_dir={folder / 'nodes'}"
    result, calls = launch(folder, overrides, RECIPE=str(recipe), ENGINE="ddp_multinode")
    assert result.returncode == 0, result.stderr
    assert calls == ["show hostnames node[1-2]"]
    single, nodes = (rows(folder / run, "loss") for run in ("single", "nodes"))
    assert {step: row["loss"] for step, row in nodes.items()} == pytest.approx(
        {step: row["loss"] for step, row in single.items()}, rel=1e-5
    )
    assert not list(folder.glob("tmp.*"))


def test_a_run_that_stopped_early_is_requeued(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "accelerate").write_text(STOPPED_EARLY)
    (programs / "accelerate").chmod(0o755)
    result, calls = launch(tmp_path, RECIPE="x.yaml", ENGINE="ddp", SLURM_JOB_NUM_NODES="1")
    assert result.returncode == 75, result.stderr
    assert calls[1:] == [f"requeue {os.getpid()}"]


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_failed_is_not_requeued(tmp_path, code):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "accelerate").write_text(f'#!/bin/bash\necho {code} > "$HFPRETRAIN_EXIT_CODE_FILE"\nexit 1\n')
    (programs / "accelerate").chmod(0o755)
    result, calls = launch(tmp_path, RECIPE="x.yaml", ENGINE="ddp")
    assert result.returncode == 1 and calls == ["show hostnames node[1-2]"]


def test_the_files_for_several_machines_equal_those_for_one():
    for path in sorted((ROOT / "accelerate_configs").glob("*_multinode.yaml")):
        several = yaml.safe_load(path.read_text())
        single = yaml.safe_load((path.parent / path.name.replace("_multinode", "")).read_text())
        assert several.get("deepspeed_config", {}).pop("deepspeed_multinode_launcher", "standard") == "standard"
        assert list(several) == list(single)
        assert {**several, "num_machines": 1, "num_processes": single["num_processes"]} == single
