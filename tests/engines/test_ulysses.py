import torch

from hfpretrain.engines import ulysses
from hfpretrain.recipe.labels import IGNORE_INDEX

EOS = 0


def test_the_parts_of_a_sequence_have_each_label_once_and_keep_their_positions():
    input_ids = torch.arange(1, 17).view(2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, -1)
    batch = {"input_ids": input_ids, "labels": input_ids, "position_ids": positions}
    parts = [ulysses.split(batch, index, 4) for index in range(4)]
    together = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    assert torch.equal(together["input_ids"], input_ids) and torch.equal(together["position_ids"], positions)
    assert torch.equal(together["shift_labels"][:, :-1], input_ids[:, 1:])
    assert (together["shift_labels"][:, -1] == IGNORE_INDEX).all()
    del batch["position_ids"]
    assert ulysses.split(batch, 1, 4)["position_ids"].tolist() == [[2, 3], [2, 3]]


def test_a_token_sees_only_its_document_up_to_itself():
    mask = ulysses.document_mask(torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]))
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert torch.equal(mask[1, 0], torch.ones(5, 5).tril().bool())
