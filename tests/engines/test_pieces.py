import io
import pickle
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hfpretrain.engines import pieces
from hfpretrain.engines.pieces import Fragments, cut_into_boxes


def test_any_part_of_a_flat_tensor_is_cut_into_a_few_boxes():
    draw = random.Random(0)
    for _ in range(2000):
        shape = [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
        whole = torch.arange(1, 1 + torch.Size(shape).numel()).float().view(shape)
        start = draw.randint(0, whole.numel())
        end = draw.randint(start, whole.numel())
        made, expected = torch.zeros(shape), torch.zeros(whole.numel())
        expected[start:end] = whole.flatten()[start:end]
        found = list(cut_into_boxes(shape, start, whole.flatten()[start:end]))
        assert len(found) <= 2 * len(shape) - 1
        for offsets, piece in found:
            place = made[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))]
            assert not place.any() and piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            place.copy_(piece)
        assert torch.equal(made.flatten(), expected)
    ((offsets, piece),) = cut_into_boxes([], 0, torch.tensor([7.0]))
    assert offsets == () and piece == 7.0


def test_a_tensor_saved_in_some_pieces_loads_into_others(tmp_path):
    whole = torch.randn(7, 5)
    flat = whole.flatten()
    cut = [*cut_into_boxes(whole.shape, 0, flat[:18].clone()), *cut_into_boxes(whole.shape, 18, flat[18:].clone())]
    state = {"model": {"a.weight": Fragments(whole.shape, cut), "b": torch.ones(3)}, "scaler": {"scale": 2.0}}
    pieces.save(pieces.copy_to_host(state), tmp_path / "saved")
    rows = [((0, 0), torch.zeros(4, 5)), ((4, 0), torch.zeros(3, 5))]
    asked = {"model": {"a.weight": Fragments(whole.shape, rows), "b": torch.zeros(3)}, "scaler": {"scale": 0.0}}
    loaded = pieces.load(asked, tmp_path / "saved")
    assert torch.equal(torch.cat([piece for _, piece in rows]), whole)
    assert asked["model"]["b"].tolist() == [1, 1, 1] and loaded["scaler"]["scale"] == 2.0
    # torch's own tools can read it too.
    dcp_to_torch_save(tmp_path / "saved", tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=True)["model//a.weight"], whole)


def test_a_copy_of_a_state_shares_no_memory_with_it():
    tensor = torch.zeros(4)
    state = {"x": Fragments([4], [((0,), tensor)]), "y": tensor, "z": "text"}
    copy = pieces.copy_to_host(state)
    tensor.fill_(1)
    assert not copy["x"].pieces[0][1].any() and not copy["y"].any() and copy["z"] == "text"


def test_processes_with_the_same_state_divide_the_saving():
    big, cut = torch.ones(300), Fragments([2, 200], [((0, 0), torch.ones(1, 200))])
    state = {"model": {"a": big, "b": cut, "c": torch.ones(100)}, "scaler": {"scale": 2.0}}
    first, second = (pieces.divide_saving(state, index, 2) for index in range(2))
    assert first["model"]["a"] is big and second["model"]["b"] is cut
    assert second["model"]["c"] is state["model"]["c"]
    assert [second["model"]["a"].pieces, first["model"]["b"].pieces] == [[], []]
    assert first["scaler"] == second["scaler"] == {"scale": 2.0}
    assert pieces.divide_saving(state, 0, 1) == state


class Attack:
    def __reduce__(self):
        return print, ("this was run",)


def test_loading_a_state_runs_no_code_from_it(tmp_path, capsys):
    """Neither from a value that is not a tensor nor from its index; `test_hub.py` tests a state from the Hub."""
    state = {"model": {"a": torch.ones(2)}, "scaler": {"scale": Attack()}}
    pieces.save(state, tmp_path)
    with pytest.raises(dcp.CheckpointException, match="Weights only load failed"):
        pieces.load({"scaler": {"scale": None}}, tmp_path)
    assert torch.equal(pieces.load_whole_tensors(tmp_path, ["model"])["a"], torch.ones(2))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"builtins\.print"):
        pieces.load_whole_tensors(tmp_path, ["model"])
    assert "this was run" not in capsys.readouterr().out


class Attribute:
    def __init__(self, *where):
        self.where = where

    def __reduce__(self):
        return getattr, self.where


def test_an_index_written_by_python_3_11_2_is_read(tmp_path):
    """It pickles members of enumerations as calls of `getattr`. Other calls of `getattr` are refused."""
    encoding = metadata._MEM_FORMAT_ENCODING
    index = pickle.dumps(Attribute(encoding, "TORCH_CONTIGUOUS_FORMAT"))
    assert pieces._Index(io.BytesIO(index)).load() is encoding.TORCH_CONTIGUOUS_FORMAT
    other = pickle.dumps(Attribute(metadata.Metadata, "__init__"))
    with pytest.raises(ValueError, match=r"attribute of <class '.*Metadata'>"):
        pieces._Index(io.BytesIO(other)).load()
