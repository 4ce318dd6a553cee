"""Disks that are full or read-only, and kills while folders are replaced.

A full disk is a limit of the operating system on the size of a file, or a small file system in memory.
"""

import contextlib
import itertools
import json
import os
import shutil
import stat
import subprocess

import pytest
import small
import torch
from conftest import environment, rows, small_text, write_jsonl, write_recipe
from warm import WarmProcess

from hfpretrain import files
from hfpretrain.checkpoints import export, resume, saver
from hfpretrain.publishing import outbox
from hfpretrain.recipe.schema import CheckpointSection


@pytest.fixture(scope="module")
def warm():
    with WarmProcess(environment()) as process:
        yield process


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(warm, tmp_path_factory):
    """The recipe and the folder of a run of 3 steps with a checkpoint at the last."""
    folder = tmp_path_factory.mktemp("disk")
    write_jsonl(folder / "corpus.jsonl", small_text(200))
    changes = {"scheduler__name": "constant_with_warmup", "checkpoint__every_steps": 3}
    recipe = write_recipe(folder, training__max_steps=3, **changes)
    result = warm.run("hfpretrain.train", recipe)
    assert result.returncode == 0, result.stderr
    return recipe, folder / "run"


@pytest.fixture
def half_done(finished, tmp_path):
    """A copy of that run, and the command that continues it."""
    recipe, run = finished
    shutil.copytree(run, tmp_path / "run")
    return ["hfpretrain.train", recipe, f"--output_dir={tmp_path / 'run'}"], tmp_path / "run"


def test_training_continues_if_a_checkpoint_cannot_be_written(warm, half_done):
    command, run = half_done
    before = (run / "checkpoints" / "step-00000003" / "manifest.json").read_bytes()
    result = warm.run(*command, "--training.max_steps=12", max_file_size=300_000)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for step in (6, 9):
        assert f"the checkpoint of step {step} was not saved: File too large" in result.stderr
    assert "stopped: the checkpoint of step 12 was not saved: File too large" in result.stderr
    assert list(rows(run, "loss")) == list(range(1, 13)) and len(rows(run, "event")) == 3
    assert checkpoints(run) == ["step-00000003"] and files.damage(run / "checkpoints" / "step-00000003") is None
    assert (run / "checkpoints" / "step-00000003" / "manifest.json").read_bytes() == before
    result = warm.run(*command, "--training.max_steps=12")
    assert result.returncode == 0 and "step-00000003" in result.stderr, result.stderr
    assert checkpoints(run) == ["step-00000009", "step-00000012"]


def test_a_run_whose_export_does_not_fit_stops_and_exports_later(warm, half_done):
    command, run = half_done
    weights = (run / "model" / "model.safetensors").stat().st_size
    shutil.rmtree(run / "model")
    result = warm.run(*command, max_file_size=weights - 1000)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "stopped: File too large" in result.stderr
    assert warm.run(*command).returncode == 0 and (run / "model" / "model.safetensors").exists()


def test_lines_wait_in_memory_if_the_disk_is_full(warm, tmp_path):
    code = (
        "import resource, sys, logging; from pathlib import Path\n"
        "from hfpretrain.training.metrics_file import MetricsFile\n"
        "logging.basicConfig(format='%(message)s')\n"
        "file = MetricsFile(Path(sys.argv[1]), None); row = {'step': 1, 'text': 'x' * 100}\n"
        "[file.write(row) for _ in range(5)]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))\n"
        "[file.write(row) for _ in range(5)]\n"
        "assert Path(sys.argv[1]).read_text().count('x\"') == 5\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "file.write(row)\n"
    )
    path = tmp_path / "metrics.jsonl"
    result = warm.run("-c", code, path)
    assert result.returncode == 0, result.stderr
    assert len(path.read_text().splitlines()) == 11
    assert result.stderr.count("File too large") == 1


def test_a_rollback_removes_lines_although_the_disk_is_full(warm, tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from hfpretrain.training.metrics_file import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]), None)\n"
        "[file.write({'step': step, 'text': 'x' * 50}) for step in range(5)]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "file.drop_after(2)\n"
    )
    path = tmp_path / "metrics.jsonl"
    result = warm.run("-c", code, path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert len(path.read_text().splitlines()) == 3 and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_a_hub_that_is_down_stops_only_runs_that_need_it(folder):
    down = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home")}
    result = small.train(write_recipe(folder), **down)
    assert result.returncode == 0, result.stderr
    for changes in ({"data__sources": [{"path": "user/data"}]}, {"tokenizer": {"pretrained": "user/model"}}):
        recipe = write_recipe(folder, output_dir=str(folder / "other"), **changes)
        result = small.train(recipe, **down)
        assert result.returncode == 2 and "user/" in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_preparation_stops_with_a_message_and_can_be_continued(warm, folder):
    write_jsonl(folder / "corpus.jsonl", small_text(4000))
    recipe = write_recipe(folder)
    result = warm.run("hfpretrain.cli", "prepare", recipe, max_file_size=200_000)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "cannot write" in result.stderr and "File too large" in result.stderr
    result = warm.run("hfpretrain.cli", "prepare", recipe)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root and the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow  # the limit on a file's size is its short form
def test_a_full_disk_damages_no_checkpoint(warm, folder, small_disk):
    recipe = write_recipe(folder, training__max_steps=12, checkpoint__every_steps=2, checkpoint__keep_last=100)
    prepared = f"--data.prepared_dir={folder / 'prepared'}"
    result = warm.run("hfpretrain.train", recipe, f"--output_dir={small_disk / 'run'}", prepared)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "was not saved: No space left on device" in result.stderr and "training continues" in result.stderr
    found = checkpoints(small_disk / "run")
    assert found[0] == "step-00000002" and all("incomplete" not in name for name in found)
    assert all(files.damage(small_disk / "run" / "checkpoints" / name) is None for name in found)
    # Keeping fewer checkpoints frees disk space.
    keep_less = "--checkpoint.keep_last=1"
    result = warm.run("hfpretrain.train", recipe, f"--output_dir={small_disk / 'run'}", prepared, keep_less)
    assert result.returncode in (0, 1) and "Traceback" not in result.stderr, result.stderr


@pytest.mark.slow  # the limit on a file's size is its short form
def test_training_continues_if_its_folder_becomes_read_only(warm, half_done):
    command, run = half_done
    mount = ["mount", "--bind", str(run / "checkpoints"), str(run / "checkpoints")]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a read-only mount needs root and the right to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(run / "checkpoints")], check=True)
        result = warm.run(*command, "--training.max_steps=8")
    finally:
        subprocess.run(["umount", str(run / "checkpoints")], check=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the checkpoint of step 6 was not saved: Read-only file system" in result.stderr
    assert "stopped: the checkpoint of step 8 was not saved: Read-only file system" in result.stderr
    assert checkpoints(run) == ["step-00000003"]


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at_call(monkeypatch, number):
    """Count the calls that rename or delete something; the call with this number raises `Killed`."""
    calls = itertools.count()

    def killable(real):
        def call(*arguments, **keywords):
            if next(calls) == number:
                raise Killed
            return real(*arguments, **keywords)

        return call

    for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, killable(getattr(module, name)))
    return calls


def export_folder(path, weights):
    """Write an export as `export.write_model` does, but without a model."""
    work = files.create_work_folder(path)
    (work / "model.safetensors").write_text(weights)
    (work / "config.json").write_text("{}")
    files.add_sums(work, [work / "model.safetensors", work / "config.json"])
    files.replace_folder(work, path)


def content(folder):
    return {
        str(file.relative_to(folder)): file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()
    }


THEIRS = {"mine.gguf": "mine", "lora/adapter.safetensors": "lora", "lora/config.json": "lora", "README.md": "my words"}


def test_a_kill_at_any_point_of_replacing_an_export_loses_nothing(tmp_path, monkeypatch):
    for number in itertools.count():
        run = tmp_path / str(number)
        export_folder(run / "model", "old")
        for name, text in THEIRS.items():
            (run / "model" / name).parent.mkdir(exist_ok=True)
            (run / "model" / name).write_text(text)
        with monkeypatch.context() as patch:
            calls = killed_at_call(patch, number)
            with contextlib.suppress(Killed):
                export_folder(run / "model", "new")
            survived = next(calls) <= number
        export.finish_interrupted_export(run)
        found = content(run / "model")
        assert found.items() >= THEIRS.items() and found["model.safetensors"] in ("old", "new"), number
        assert files.sums_damage(run / "model") is None and [path.name for path in run.iterdir()] == ["model"]
        export_folder(run / "model", "newer")
        found = content(run / "model")
        assert found.items() >= {**THEIRS, "model.safetensors": "newer"}.items() and len(found) == 3 + len(THEIRS)
        if survived:
            break
    assert number > 5


def sealed_checkpoint(folder, step, text="state"):
    path = folder / f"step-{step:08d}"
    work = files.create_work_folder(path)
    (work / "train_state.json").write_text(json.dumps({"run_id": text, "ledger": text}))
    (work / "__0_0.distcp").write_text(text)
    files.seal(work, path, {"step": step, "evaluation_loss": None})
    return path


def test_a_kill_at_any_point_of_saving_a_step_again_loses_nothing(tmp_path, monkeypatch):
    for number in itertools.count():
        folder = tmp_path / str(number)
        (sealed_checkpoint(folder, 3, "old") / "notes.txt").write_text("mine")
        with monkeypatch.context() as patch:
            calls = killed_at_call(patch, number)
            with contextlib.suppress(Killed):
                sealed_checkpoint(folder, 3, "new")
            survived = next(calls) <= number
        path, reasons = resume.find_newest(folder)
        assert path == folder / "step-00000003" and reasons == [], number
        assert (path / "__0_0.distcp").read_text() in ("old", "new") and (path / "notes.txt").read_text() == "mine"
        assert list(folder.iterdir()) == [path]
        if survived:
            break
    assert number > 3


def test_rotation_and_the_outbox_keep_files_of_a_person(tmp_path):
    folder, box = tmp_path / "checkpoints", tmp_path / "outbox"
    for step in (1, 2):
        outbox.add_checkpoint(sealed_checkpoint(folder, step), box)
        (folder / f"step-0000000{step}" / "notes.txt").write_text("mine")
    (box / "step-00000001" / "state" / "notes.txt").write_text("mine")
    sealed_checkpoint(folder, 2, "trained again")
    (box / "step-00000002" / "notes.txt").write_text("mine")
    assert outbox.add_checkpoint(folder / "step-00000002", box) is None
    assert outbox.checkpoint_identity(box / "step-00000002") == "run trained again, ledger trained again"
    outbox.remove_checkpoint(box / "step-00000001")
    rotating = saver.Saver(folder, CheckpointSection(keep_last=2), None)
    rotating.save({"step": 3, "evaluation_loss": None}, {"model": {"w": torch.zeros(1)}}, {}, in_background=False)
    assert {name for name in content(folder) if not name.startswith("step-00000003")} == {
        "kept-step-00000001/notes.txt",
        *(f"step-00000002/{name}" for name in ("__0_0.distcp", "manifest.json", "notes.txt", "train_state.json")),
    }
    kept = {name for name in content(box) if name.endswith("notes.txt")}
    assert kept == {"kept-step-00000001/state/notes.txt", "step-00000002/notes.txt"}
    assert files.step_folders(box) == [box / "step-00000002"]


def test_a_file_of_the_export_that_a_person_changed_is_kept_beside_the_new_one(tmp_path):
    export_folder(tmp_path / "model", "old")
    (tmp_path / "model" / "config.json").write_text('{"mine": 1}')
    export_folder(tmp_path / "model", "new")
    found = content(tmp_path / "model")
    assert found.pop(files.SUMS) and found == {
        "model.safetensors": "new",
        "config.json": "{}",
        "config.json.kept": '{"mine": 1}',
    }
    (tmp_path / "model" / files.SUMS).unlink()  # an export of a version that wrote no checksums
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_text("old weights")
    export_folder(tmp_path / "model", "newer")
    assert content(tmp_path / "model").keys() == {*found, files.SUMS}


def test_an_export_that_is_a_link_stays_a_link(tmp_path):
    export_folder(tmp_path / "disk" / "big", "old")
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "big")
    export_folder(tmp_path / "model", "new")
    assert (tmp_path / "model").is_symlink() and content(tmp_path / "disk" / "big")["model.safetensors"] == "new"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["big"]


def test_a_file_is_written_with_the_permissions_that_the_umask_leaves(tmp_path):
    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    for umask, expected in ((0o077, 0o600), (0o022, 0o644), (0o027, 0o640)):
        before = os.umask(umask)
        try:
            files.write_atomically(tmp_path / str(umask), "text")
        finally:
            os.umask(before)
        assert mode(tmp_path / str(umask)) == expected
    path = tmp_path / str(0o022)
    path.chmod(0o600)  # by its owner
    files.write_atomically(path, "other text")
    assert mode(path) == 0o600 and path.read_text() == "other text" and len(list(tmp_path.iterdir())) == 3
