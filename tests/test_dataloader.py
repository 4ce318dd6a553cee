import numpy as np
import pytest
import torch

from hfpretrain.dataloader import (
    IGNORE_INDEX,
    Blocks,
    Permutation,
    TrainingData,
    TrainingOrder,
    collate,
    document_positions,
    validation_batches,
)

EOS = 0


def numbered(rows, block_size=4):
    """Blocks whose first token tells the row."""
    return np.arange(1, rows + 1)[:, None] * 10 + np.arange(block_size)


def data(num_processes=1, process_index=0, accumulation=8, micro_batch_size=1, rows=23, weights=None, seed=5):
    streams = [Blocks([numbered(rows)[:7], numbered(rows)[7:]])]
    if weights:
        streams.append(Blocks([numbered(rows) + 100_000]))
    return TrainingData(
        streams,
        weights,
        seed=seed,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation,
        process_index=process_index,
        num_processes=num_processes,
        eos_token_id=None,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection_that_depends_on_its_key(size):
    images = Permutation(size, 1, 2)(np.arange(size))
    assert sorted(images) == list(range(size))
    if size > 60:
        assert not np.array_equal(images, Permutation(size, 1, 3)(np.arange(size)))


def test_permutation_is_uniform_and_needs_no_memory():
    places = np.zeros((50, 50))
    for key in range(4000):
        places[np.arange(50), Permutation(50, key)(np.arange(50))] += 1
    chi_square = ((places - 80) ** 2 / 80).sum()
    # 2,401 degrees of freedom: mean 2,401, standard deviation 69.
    assert abs(chi_square - 2401) < 5 * 69
    assert Permutation(10**12, 0)(np.array([0, 10**12 - 1])).max() < 10**12


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    order = TrainingOrder([23], None, seed=0)
    epochs = [order(np.arange(23) + 23 * epoch)[1].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert TrainingOrder([23], None, seed=1)(np.arange(23))[1].tolist() != epochs[0]


def test_a_step_has_the_same_sequences_on_any_number_of_processes():
    for step in (0, 3, 1000):
        alone = torch.cat([batch["input_ids"] for batch in data().step(step)])
        for num_processes, accumulation, micro_batch_size in [(2, 4, 1), (4, 1, 2), (8, 1, 1), (1, 2, 4)]:
            parts = [
                torch.cat(
                    [
                        batch["input_ids"]
                        for batch in data(num_processes, index, accumulation, micro_batch_size).step(step)
                    ]
                )
                for index in range(num_processes)
            ]
            assert torch.equal(torch.cat(parts), alone)


def test_mixture_has_its_weights_at_any_moment_and_shuffles_each_stream():
    order = TrainingOrder([1000, 77], [0.7, 0.3], seed=0)
    streams, rows = order(np.arange(30_000))
    for count in (100, 1000, 12_345, 30_000):
        assert abs((streams[:count] == 0).mean() - 0.7) <= 1 / count + 1e-4
    second = rows[streams == 1]
    assert sorted(second[:77]) == list(range(77)) == sorted(second[77:154])
    assert order(np.array([29_999]))[1][0] == rows[-1]


def test_positions_restart_at_the_separator_which_opens_the_next_document():
    rows = np.array([[5, 6, EOS, 7, 8, EOS, EOS, 9]])
    assert document_positions(rows, EOS).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]
    batch = collate(rows, EOS)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]
    assert torch.equal(batch["labels"], batch["input_ids"]) and batch["labels"] is not batch["input_ids"]
    assert "position_ids" not in collate(rows, None)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_validation_covers_every_token_once_with_equal_batches_on_all_processes(rows, num_processes):
    blocks = Blocks([numbered(rows)] if rows else [])
    remainder = [991, 992, 993]
    parts = [
        list(
            validation_batches(
                blocks,
                remainder,
                4,
                batch_size=2,
                process_index=index,
                num_processes=num_processes,
                eos_token_id=EOS,
                document_masking=True,
            )
        )
        for index in range(num_processes)
    ]
    assert len({len(part) for part in parts}) == 1
    scored = [batch["input_ids"][batch["labels"] != IGNORE_INDEX] for part in parts for batch in part]
    expected = [*numbered(rows).reshape(-1).tolist(), *remainder]
    assert sorted(torch.cat(scored).tolist()) == sorted(expected)
