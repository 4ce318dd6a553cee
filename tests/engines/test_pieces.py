import io
import pickle
import random

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hfpretrain.engines import pieces
from hfpretrain.engines.pieces import Fragments, boxes


def test_any_piece_of_a_flat_tensor_is_a_few_boxes():
    draw = random.Random(0)
    for _ in range(2000):
        shape = [draw.randint(1, 5) for _ in range(draw.randint(1, 4))]
        whole = torch.arange(1, 1 + torch.Size(shape).numel()).float().view(shape)
        start = draw.randint(0, whole.numel())
        end = draw.randint(start, whole.numel())
        made, expected = torch.zeros(shape), torch.zeros(whole.numel())
        expected[start:end] = whole.flatten()[start:end]
        found = list(boxes(shape, start, whole.flatten()[start:end]))
        assert len(found) <= 2 * len(shape) - 1
        for offsets, piece in found:
            place = made[tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))]
            assert not place.any() and piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            place.copy_(piece)
        assert torch.equal(made.flatten(), expected)
    ((offsets, piece),) = boxes([], 0, torch.tensor([7.0]))
    assert offsets == () and piece == 7.0


def test_what_is_saved_in_one_cut_loads_into_another(tmp_path):
    whole = torch.randn(7, 5)
    flat = whole.flatten()
    cut = [*boxes(whole.shape, 0, flat[:18].clone()), *boxes(whole.shape, 18, flat[18:].clone())]
    state = {"model": {"a.weight": Fragments(whole.shape, cut), "b": torch.ones(3)}, "scaler": {"scale": 2.0}}
    pieces.save(pieces.copy_to_host(state), tmp_path / "saved")
    rows = [((0, 0), torch.zeros(4, 5)), ((4, 0), torch.zeros(3, 5))]
    asked = {"model": {"a.weight": Fragments(whole.shape, rows), "b": torch.zeros(3)}, "scaler": {"scale": 0.0}}
    loaded = pieces.load(asked, tmp_path / "saved")
    assert torch.equal(torch.cat([piece for _, piece in rows]), whole)
    assert asked["model"]["b"].tolist() == [1, 1, 1] and loaded["scaler"]["scale"] == 2.0
    # Others' tools read it as well.
    dcp_to_torch_save(tmp_path / "saved", tmp_path / "whole.pt")
    assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=True)["model//a.weight"], whole)


def test_a_copy_shares_no_memory():
    tensor = torch.zeros(4)
    state = {"x": Fragments([4], [((0,), tensor)]), "y": tensor, "z": "text"}
    copy = pieces.copy_to_host(state)
    tensor.fill_(1)
    assert not copy["x"].pieces[0][1].any() and not copy["y"].any() and copy["z"] == "text"


def test_copies_of_a_state_share_the_saving():
    big, cut = torch.ones(300), Fragments([2, 200], [((0, 0), torch.ones(1, 200))])
    state = {"model": {"a": big, "b": cut, "c": torch.ones(100)}, "scaler": {"scale": 2.0}}
    shares = [pieces.share(state, index, 2) for index in range(2)]
    assert shares[0]["model"]["a"] is big and shares[1]["model"]["b"] is cut
    assert shares[1]["model"]["c"] is state["model"]["c"]
    assert [shares[1]["model"]["a"].pieces, shares[0]["model"]["b"].pieces] == [[], []]
    assert all(share["scaler"] == {"scale": 2.0} for share in shares)
    assert pieces.share(state, 0, 1) == state


class Attack:
    def __reduce__(self):
        return print, ("this was run",)


def test_a_state_runs_no_code(tmp_path, capsys):
    """Neither where it has no tensor nor in its index; see `test_hub.py` for one that came from the Hub."""
    state = {"model": {"a": torch.ones(2)}, "scaler": {"scale": Attack()}}
    pieces.save(state, tmp_path)
    with pytest.raises(dcp.CheckpointException, match="Weights only load failed"):
        pieces.load({"scaler": {"scale": None}}, tmp_path)
    assert torch.equal(pieces.load_whole(tmp_path, ["model"])["a"], torch.ones(2))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"its index asks for builtins\.print"):
        pieces.load_whole(tmp_path, ["model"])
    assert "this was run" not in capsys.readouterr().out


class Attribute:
    def __init__(self, *where):
        self.where = where

    def __reduce__(self):
        return getattr, self.where


def test_an_index_written_by_python_3_11_2_is_read(tmp_path):
    """It pickles members of enumerations by `getattr`, which is of no use for anything else."""
    encoding = metadata._MEM_FORMAT_ENCODING
    index = pickle.dumps(Attribute(encoding, "TORCH_CONTIGUOUS_FORMAT"))
    assert pieces._Index(io.BytesIO(index)).load() is encoding.TORCH_CONTIGUOUS_FORMAT
    other = pickle.dumps(Attribute(metadata.Metadata, "__init__"))
    with pytest.raises(ValueError, match=r"an attribute of <class '.*Metadata'>"):
        pieces._Index(io.BytesIO(other)).load()
