import threading
import time

import numpy as np
import pytest
import torch

from hfpretrain.data import batches
from hfpretrain.data.batches import (
    Blocks,
    Prefetcher,
    TrainingData,
    collate,
    document_positions,
    run_in_thread,
)
from hfpretrain.data.ledger import Ledger
from hfpretrain.data.order import Permutation, TrainingOrder, epoch_shifts
from hfpretrain.recipe.labels import IGNORE_INDEX

EOS = 0


def numbered(rows, block_size=4):
    """Blocks whose first token is ten times the row number, counted from 1."""
    return np.arange(1, rows + 1)[:, None] * 10 + np.arange(block_size)


def data(num_processes=1, process_index=0, accumulation=8, micro_batch_size=1, rows=23, weights=None, change=0):
    streams = [Blocks([numbered(rows)[:7], numbered(rows)[7:]])]
    if weights:
        second = numbered(rows) + 100_000
        second[5, 2] += change
        streams.append(Blocks([second]))
    return TrainingData(
        streams,
        [(0, weights)] if weights else [],
        seed=5,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation,
        process_index=process_index,
        num_processes=num_processes,
        eos_token_id=EOS,
        document_masking=False,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000, 4097])
def test_permutation_is_a_bijection_that_depends_on_its_key(size):
    images = Permutation(size, 1, 2)(np.arange(size))
    assert sorted(images) == list(range(size))
    if size > 60:
        assert not np.array_equal(images, Permutation(size, 1, 3)(np.arange(size)))


def test_permutation_is_uniform_and_needs_no_memory():
    counts = np.zeros((50, 50))
    for key in range(4000):
        counts[np.arange(50), Permutation(50, key)(np.arange(50))] += 1
    chi_square = ((counts - 80) ** 2 / 80).sum()
    # 2,401 degrees of freedom: mean 2,401, standard deviation 69.
    assert abs(chi_square - 2401) < 5 * 69
    assert Permutation(10**12, 0)(np.array([0, 10**12 - 1])).max() < 10**12


def test_an_epoch_has_every_row_once_and_the_next_has_another_order():
    order = TrainingOrder([23], [], seed=0)
    epochs = [order(np.arange(23) + 23 * epoch)[1].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert TrainingOrder([23], [], seed=1)(np.arange(23))[1].tolist() != epochs[0]


def test_a_step_has_the_same_sequences_on_any_number_of_processes():
    for step in (0, 3, 1000):
        alone = torch.cat([batch["input_ids"] for batch in data().step(step).batches])
        for num_processes, accumulation, micro_batch_size in [(2, 4, 1), (4, 1, 2), (8, 1, 1), (1, 2, 4)]:
            parts = [
                torch.cat(
                    [
                        batch["input_ids"]
                        for batch in data(num_processes, index, accumulation, micro_batch_size).step(step).batches
                    ]
                )
                for index in range(num_processes)
            ]
            assert torch.equal(torch.cat(parts), alone)


def test_mixture_has_its_weights_at_any_moment_and_shuffles_each_stream():
    order = TrainingOrder([1000, 77], [(0, [0.7, 0.3])], seed=0)
    streams, rows, _ = order(np.arange(30_000))
    for count in (100, 1000, 12_345, 30_000):
        assert abs((streams[:count] == 0).mean() - 0.7) <= 1 / count + 1e-4
    second = rows[streams == 1]
    assert sorted(second[:77]) == list(range(77)) == sorted(second[77:154])
    assert order(np.array([29_999]))[1][0] == rows[-1]


def test_positions_restart_at_eos():
    rows = np.array([[5, 6, EOS, 7, 8, EOS, EOS, 9]])
    assert document_positions(rows, EOS).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]
    batch = collate(rows, EOS)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 0, 1]]
    assert torch.equal(batch["labels"], batch["input_ids"]) and batch["labels"] is not batch["input_ids"]
    assert "position_ids" not in collate(rows, None)


def test_stages_change_the_weights_and_continue_each_stream():
    order = TrainingOrder([1000, 77, 500], [(0, [0.7, 0.3, 0]), (20_000, [0.2, 0.2, 0.6])], seed=0)
    streams, rows, _ = order(np.arange(50_000))
    assert np.allclose(np.bincount(streams[:20_000], minlength=3) / 20_000, [0.7, 0.3, 0], atol=1e-4)
    assert np.allclose(np.bincount(streams[20_000:]) / 30_000, [0.2, 0.2, 0.6], atol=1e-4)
    for position in (0, 1, 19_999, 20_000, 20_001, 43_210):
        assert order.counts(position).tolist() == np.bincount(streams[:position], minlength=3).tolist()
    # No row of a stream is seen again before all were seen once, also across the change of stages.
    second = rows[streams == 1]
    for epoch in range(len(second) // 77):
        assert sorted(second[epoch * 77 : (epoch + 1) * 77]) == list(range(77))


def test_realized_tokens_agree_with_the_weights():
    mixed = data(weights=[0.137, 0.863], accumulation=64)
    tokens = sum(mixed.step(step).tokens for step in range(320))
    assert tokens.sum() == 320 * 64 * 4
    assert abs(tokens / tokens.sum() - [0.137, 0.863]).max() < 1e-3


def test_padding_is_not_predicted_and_not_counted():
    rows = np.array([[5, 6, EOS, EOS, EOS], [5, EOS, 7, 8, EOS], [1, 2, 3, 4, 5]])
    batch = collate(rows, EOS, pad_token_id=EOS)
    assert (batch["labels"] == IGNORE_INDEX).int().tolist() == [[0, 0, 0, 1, 1], [0] * 5, [0] * 5]
    blocks = Blocks([np.array([[5, 6, EOS, EOS]] * 8)])
    padded = TrainingData(
        [blocks],
        [],
        seed=0,
        micro_batch_size=2,
        accumulation_steps=2,
        process_index=0,
        num_processes=1,
        eos_token_id=EOS,
        document_masking=True,
        pad_token_id=EOS,
    )
    assert padded.step(0).tokens.tolist() == [12]
    assert padded.step(0).documents.tolist() == [4]


def test_the_ledger_is_equal_on_any_number_of_processes_and_notices_a_changed_token():
    alone = data(weights=[0.5, 0.5])
    expected = Ledger(alone.step(step).checksum for step in range(20))
    for num_processes, accumulation, micro_batch_size in [(2, 4, 1), (4, 1, 2), (1, 2, 4)]:
        ranks = [
            data(num_processes, index, accumulation, micro_batch_size, weights=[0.5, 0.5])
            for index in range(num_processes)
        ]
        ledger = Ledger(sum(rank.step(step).checksum for rank in ranks) % 2**64 for step in range(20))
        assert ledger.digest == expected.digest
        assert ranks[0].checksum(7) == expected.checksums[7]
    assert Ledger(expected.checksums).digest == expected.digest
    assert expected.first_mismatch(alone.checksum, 32) is None
    changed = data(weights=[0.5, 0.5], change=1)
    assert expected.first_mismatch(changed.checksum, 32) is not None
    other = Ledger([*expected.checksums[:3], 1, *expected.checksums[4:]])
    assert other.digest != expected.digest and other.first_mismatch(alone.checksum, 32) == 3
    # In a long run not every step is compared, but the newest ones always are.
    recent = Ledger([*expected.checksums[:-1], 1])
    assert recent.first_mismatch(alone.checksum, 32, max_tokens=1) == 19


def test_prefetched_data_equal_the_steps_and_errors_are_raised():
    prefetcher = Prefetcher(data().step, range(3, 9), pin_memory=False)
    for step in range(3, 9):
        expected = data().step(step).batches
        for one, other in zip(prefetcher.next().batches, expected, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
    prefetcher.close()

    def broken(step):
        raise ValueError(f"step {step}")

    with pytest.raises(ValueError, match="step 5"):
        Prefetcher(broken, range(5, 9), pin_memory=False).next()


def test_a_blocked_reader_does_not_delay_stopping(monkeypatch):
    monkeypatch.setattr(batches, "STOP_WAIT_SECONDS", 0.2)
    answer = threading.Event()
    start = time.monotonic()
    prefetcher = Prefetcher(lambda step: answer.wait(60), range(9), pin_memory=False)
    assert prefetcher.next(lambda: True) is None
    prefetcher.close()
    assert run_in_thread(lambda: answer.wait(60), lambda: True) is None
    assert time.monotonic() - start < 10
    answer.set()
    assert run_in_thread(lambda: 5, lambda: True) == 5
    with pytest.raises(ZeroDivisionError):
        run_in_thread(lambda: 1 / 0, lambda: False)


def shifting(num_processes=1, process_index=0):
    """Training data with three blocks of one text and two of another: [10 11 12 13] [20 ..."""
    return TrainingData(
        [Blocks([numbered(3), numbered(2) + 100], last_rows=np.array([2, 4]))],
        [],
        seed=5,
        micro_batch_size=1,
        accumulation_steps=10 // num_processes,
        process_index=process_index,
        num_processes=num_processes,
        eos_token_id=EOS,
        document_masking=True,
        shift_blocks=True,
    )


def test_shifted_blocks_have_every_token_once_per_epoch_at_other_positions():
    shifted, plain = shifting(), Blocks([numbered(3), numbered(2) + 100])
    first, second = np.split(shifted.rows(0), 2)
    assert np.array_equal(first[np.argsort(first[:, 0])], plain[np.arange(5)])  # as without a shift
    assert np.array_equal(np.sort(second, axis=None), np.sort(first, axis=None))
    assert [shift for *_, shift in shifted.locate_sequences(0)] == [0] * 5 + [2] * 5
    shifts = epoch_shifts(np.arange(20), 256)
    apart = [abs(a - b) % 256 for a in shifts for b in shifts if a != b]
    assert len(set(shifts)) == 20 and min(min(gap, 256 - gap) for gap in apart) >= 256 // 20 // 2
    for (_, row, shift), ids in zip(shifted.locate_sequences(1), shifted.rows(1), strict=True):
        here, there = plain[np.array([row, (row + 1) % 5])]
        assert ids.tolist() == [*here[shift:], *there[:shift]]


def test_shifted_blocks_are_the_same_on_two_processes():
    alone = torch.cat([batch["labels"] for batch in shifting().step(3).batches])
    parts = [batch["labels"] for index in range(2) for batch in shifting(2, index).step(3).batches]
    assert torch.equal(torch.cat(parts), alone)


def test_a_shifted_block_of_two_texts_has_no_loss_between_them():
    seams = 0
    for step in range(4):
        for (_, row, shift), batch in zip(
            shifting().locate_sequences(step), shifting().step(step).batches, strict=True
        ):
            positions, labels = batch["position_ids"][0].tolist(), batch["labels"][0, 1:]
            if shift and row in (2, 4):
                seams += 1
                assert positions == [*range(4 - shift), *range(shift)]
                assert (labels == IGNORE_INDEX).tolist() == [at == 4 - shift for at in range(1, 4)]
            else:
                assert positions == [0, 1, 2, 3] and not (labels == IGNORE_INDEX).any()
    assert seams > 4
