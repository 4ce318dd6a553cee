import json
import threading

import pytest
import torch

from hfpretrain import files
from hfpretrain.checkpoints import resume
from hfpretrain.checkpoints.saver import Saver
from hfpretrain.engines import pieces
from hfpretrain.recipe.schema import CheckpointSection, RecipeError


def save(saver, step, loss=None, in_background=False, writers=None):
    state = {"model": {"w": torch.full((4,), float(step))}, "optimizer": {}, "buffers": {}}
    saver.save({"step": step, "evaluation_loss": loss}, state, writers or {}, in_background)


def steps(folder):
    return [int(path.name[5:]) for path in sorted(folder.glob("step-" + "[0-9]" * 8))]


def test_rotation_keeps_the_last_the_best_and_every_fortieth_step(tmp_path):
    saver = Saver(tmp_path, CheckpointSection(keep_last=2, keep_every=40, keep_best=True), None)
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 4.0, 50: None, 60: 5.0, 70: 6.0}
    for step, loss in losses.items():
        save(saver, step, loss)
    assert all(saved.error is None for saved in saver.take_results())
    assert steps(tmp_path) == [20, 40, 60, 70]
    assert all(files.damage(path) is None for path in tmp_path.iterdir())


def test_a_resume_uses_the_newest_intact_checkpoint_and_names_the_damaged_ones(tmp_path):
    saver = Saver(tmp_path, CheckpointSection(keep_last=5), None)
    for step in (1, 2, 3, 4):
        save(saver, step)
    assert resume.find_newest(tmp_path) == (tmp_path / "step-00000004", [])
    data = next((tmp_path / "step-00000004").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])  # a file cut short
    content = bytearray((tmp_path / "step-00000003" / ".metadata").read_bytes())
    content[len(content) // 2] ^= 1  # a bit flipped
    (tmp_path / "step-00000003" / ".metadata").write_bytes(content)
    (tmp_path / "step-00000009.incomplete").mkdir()
    path, reasons = resume.find_newest(tmp_path)
    assert path == tmp_path / "step-00000002"
    assert f"{data} has" in reasons[0] and ".metadata has another checksum" in reasons[1]
    # Damaged checkpoints are not read again. If none is intact, the run does not start from scratch by itself.
    assert resume.find_newest(tmp_path) == (path, [])
    (path / "manifest.json").unlink()
    (tmp_path / "step-00000001" / "train_state.json").unlink()
    with pytest.raises(RecipeError, match="no checkpoint verifies"):
        resume.find_newest(tmp_path)


def test_a_manifest_that_names_a_file_outside_of_its_folder_is_refused(tmp_path):
    saver = Saver(tmp_path, CheckpointSection(), None)
    save(saver, 1)
    path = tmp_path / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]  # like the manifest of an older version, or a forged one
    (tmp_path / "secret").write_text("x")
    for name in ("../secret", str(tmp_path / "secret")):
        entry = {"size": 1, "sha256": files.sha256(tmp_path / "secret")}
        path.write_text(json.dumps({**manifest, "files": {name: entry}}))
        assert "outside of the folder" in files.damage(path.parent)


def test_a_background_save_writes_a_copy_and_the_next_save_waits_for_it(tmp_path):
    saver = Saver(tmp_path, CheckpointSection(keep_last=5), None)
    release, weights = threading.Event(), torch.zeros(4)
    state = {"model": {"w": weights}}

    def slow(path):
        release.wait(10)
        path.write_text("x")

    saver.save({"step": 1, "evaluation_loss": None}, state, {"slow": slow}, True)
    assert saver.take_results() == [] and steps(tmp_path) == []
    weights.fill_(7)  # training continues
    threading.Timer(0.3, release.set).start()
    saver.save({"step": 2, "evaluation_loss": None}, state, {}, True)
    saver.wait()
    first, second = saver.take_results()
    assert first.waited_seconds < 0.1 and first.seconds >= 0.3 and second.waited_seconds > 0.1
    for step, value in ((1, 0.0), (2, 7.0)):
        loaded = {"model": {"w": torch.ones(4)}}
        pieces.load(loaded, tmp_path / f"step-{step:08d}")
        assert loaded["model"]["w"].tolist() == [value] * 4


def test_a_failed_save_leaves_older_checkpoints_unchanged(tmp_path):
    saver = Saver(tmp_path, CheckpointSection(keep_last=1), None)

    def broken(path):
        raise OSError(28, "No space left on device", str(path))

    save(saver, 1)
    save(saver, 2, writers={"x": broken})
    first, second = saver.take_results()
    assert first.error is None and second.error.startswith("No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "nowhere" / "at-all")
    saver = Saver(tmp_path / "checkpoints", CheckpointSection(), None)
    save(saver, 1)
    (saved,) = saver.take_results()
    assert "FileExistsError" in saved.error or "No such file" in saved.error


def test_a_checkpoint_with_the_name_of_another_step_is_not_used(tmp_path):
    saver = Saver(tmp_path, CheckpointSection(), None)
    for step in (1, 2):
        save(saver, step)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    path, (reason,) = resume.find_newest(tmp_path)
    assert path.name == "step-00000002" and "another step" in reason


def test_a_checkpoint_whose_manifest_lists_no_files_is_not_used(tmp_path):
    saver = Saver(tmp_path, CheckpointSection(), None)
    for step in (1, 2):
        save(saver, step)
    (tmp_path / "step-00000007.incomplete").mkdir()
    (tmp_path / "step-00000002" / "manifest.json").write_text('{"step": 2, "files": {}}')
    path, (reason,) = resume.find_newest(tmp_path)
    assert path.name == "step-00000001" and "manifest.json is missing or can't be read" in reason
    (path / "manifest.json").write_text('{"step": 1, "files": {"train_state.json": 3}}')
    assert "manifest.json is missing or can't be read" in files.damage(path)
    assert not list(tmp_path.glob("*.incomplete"))
