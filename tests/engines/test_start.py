"""The engine and the number of processes with which a training is started."""

import pytest

from hfpretrain.engines import start
from hfpretrain.recipe.schema import RecipeError


@pytest.mark.parametrize(
    ("gpus", "engine", "num_processes", "chosen"),
    [
        (0, None, None, ("single", 1)),
        (1, None, None, ("single", 1)),
        (8, None, None, ("ddp", 8)),
        (0, None, 2, ("ddp", 2)),
        (8, None, 1, ("single", 1)),
        (8, "fsdp2", None, ("fsdp2", 8)),
        (8, "fsdp2", 4, ("fsdp2", 4)),
        (0, "fsdp2", None, ("fsdp2", 2)),  # the number in its file
        (8, "single", None, ("single", 1)),
        (8, "hsdp", None, ("hsdp", 4)),  # its file sets the size of a group
    ],
)
def test_engine_and_number_of_processes_default_to_what_fits_the_machine(
    monkeypatch, gpus, engine, num_processes, chosen
):
    monkeypatch.setattr(start, "_num_gpus", lambda: gpus)
    assert start.choose_engine(engine, num_processes) == chosen


def test_a_file_that_is_not_shipped_keeps_its_number_of_processes_and_its_port(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "_num_gpus", lambda: 8)
    path = tmp_path / "mine.yaml"
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    assert start.choose_engine(str(path), None) == (str(path), 3)
    assert "--main_process_port" in start.launch_command(str(path), None)
    path.write_text(path.read_text() + "num_machines: 2\nmachine_rank: 1\nmain_process_ip: 10.0.0.1\n")
    assert start.choose_engine(str(path), None) == (str(path), 3)
    assert "--main_process_port" not in start.launch_command(str(path), None)


def test_a_file_that_is_not_an_accelerate_file_is_refused_with_its_name(tmp_path):
    for text in ("", "- a", "a: ["):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(RecipeError, match=r"mine\.yaml"):
            start.choose_engine(str(tmp_path / "mine.yaml"), None)
