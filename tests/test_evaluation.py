import math

import evaluate
import numpy as np
import pytest
import torch
from test_model import LLAMA, build

import hfpretrain.token_perplexity
from hfpretrain.dataloader import Blocks, validation_batches
from hfpretrain.evaluation import figures, loss_sums, sliding_windows

TABLE = torch.arange(64) % 5
TABLE[0] = 0


def stream(length=1000):
    return np.random.default_rng(0).integers(0, 64, length)


def sums(num_processes, batch_size=4, masking=True):
    tokens, model = stream(), build(LLAMA)
    rows = len(tokens) // 16
    return sum(
        loss_sums(
            model,
            validation_batches(
                Blocks([tokens[: rows * 16].reshape(rows, 16)]),
                tokens[rows * 16 :].tolist(),
                16,
                batch_size=batch_size,
                process_index=index,
                num_processes=num_processes,
                eos_token_id=0,
                document_masking=masking,
            ),
            TABLE,
        )
        for index in range(num_processes)
    )


def test_the_figures_are_those_of_a_hand_computation():
    model, tokens = build(LLAMA), stream()
    nll, count, content, num_bytes = 0.0, 0, 0.0, 0
    for start in range(0, len(tokens), 16):
        block = torch.from_numpy(tokens[start : start + 16])[None]
        starts = torch.tensor([i if block[0, i] == 0 else 0 for i in range(block.shape[1])]).cummax(0).values
        positions = torch.arange(block.shape[1]) - starts
        with torch.no_grad():
            logits = model(input_ids=block, position_ids=positions[None], use_cache=False).logits[0, :-1]
        losses = -torch.log_softmax(logits.double(), -1).gather(1, block[0, 1:, None])[:, 0]
        nll, count = nll + losses.sum().item(), count + len(losses)
        is_text = TABLE[block[0, 1:]] > 0
        content, num_bytes = content + losses[is_text].sum().item(), num_bytes + TABLE[block[0, 1:]].sum().item()
    result = figures(sums(1))
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(nll / count, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(content / num_bytes / math.log(2), rel=1e-6)


@pytest.mark.parametrize(("num_processes", "batch_size"), [(2, 4), (3, 4), (3, 7), (1, 63)])
def test_the_figures_do_not_depend_on_processes_or_batches(num_processes, batch_size):
    torch.testing.assert_close(sums(num_processes, batch_size), sums(1), rtol=1e-6, atol=0)
    assert sums(num_processes, batch_size)[1] == sums(1)[1]


def test_documents_apart_give_other_figures_than_documents_together():
    assert sums(1, masking=True)[0] != sums(1, masking=False)[0]


@pytest.mark.parametrize(("length", "stride"), [(100, 16), (100, 5), (96, 16), (10, 4), (16, 16), (17, 1), (33, 15)])
def test_sliding_windows_score_every_token_once(length, stride):
    tokens = np.arange(length)
    scored = [row[mask] for row, mask in sliding_windows(tokens, 16, stride, pad_id=-1)]
    assert np.concatenate(scored).tolist() == tokens.tolist()
    for index, (row, _) in enumerate(sliding_windows(tokens, 16, stride, pad_id=-1)):
        part = tokens[index * stride :][:16]
        assert row[: len(part)].tolist() == part.tolist() and (row[len(part) :] == -1).all()


def test_the_metric_loads_by_path_and_weighs_by_tokens():
    metric = evaluate.load(hfpretrain.token_perplexity.__file__)
    result = metric.compute(nll=[10.0, 1.0], tokens=[10, 90], content_nll=[8.0, 1.0], bytes=[20, 180])
    assert result["loss"] == pytest.approx(0.11) and result["perplexity"] == pytest.approx(math.exp(0.11))
    assert result["bits_per_byte"] == pytest.approx(9 / 200 / math.log(2))
