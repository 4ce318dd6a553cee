import math

import evaluate
import numpy as np
import pytest
import torch
from tiny_models import LLAMA, build

import hfpretrain.evaluation.token_perplexity
from hfpretrain.evaluation import sums as sums_module
from hfpretrain.evaluation.score import sliding_windows
from hfpretrain.evaluation.sums import DOCUMENTS, figures, loss_by_context, loss_sums

TABLE = torch.arange(64) % 5
TABLE[0] = 0


def test_sums_by_document_and_context_equal_a_plain_computation():
    model = build(LLAMA)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (3, 16)))
    documents = torch.arange(48).reshape(3, 16) // 10
    labels = ids.clone()
    labels[2, 9:] = -100
    sums = loss_sums(model, [{"input_ids": ids, "labels": labels, DOCUMENTS: documents}], TABLE, 5)
    expected, contexts = np.zeros((5, 4)), np.zeros((64, 2))
    with torch.no_grad():
        losses = -torch.log_softmax(model(input_ids=ids).logits.double(), -1)
    for row in range(3):
        for position in range(1, 16):
            label = int(labels[row, position])
            if label != -100:
                nll = float(losses[row, position - 1, label])
                text = int(TABLE[label])
                expected[documents[row, position]] += [nll, 1, nll * (text > 0), text]
                contexts[int(math.log2(position))] += [nll, 1]
    np.testing.assert_allclose(sums.documents.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(sums.contexts.numpy(), contexts, rtol=1e-6)
    by_context = loss_by_context(sums.contexts.numpy())
    assert list(by_context) == ["1", "2-3", "4-7", "8-15"]
    result = figures(sums.documents.numpy())
    nll, tokens, content, num_bytes = expected.sum(axis=0)
    assert result["tokens"] == tokens and result["documents"] == 5
    assert result["loss"] == pytest.approx(nll / tokens, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(content / num_bytes / math.log(2), rel=1e-6)


def corpus(count, seed):
    """Sums of documents with a mean loss of 3 per token, which differs between documents."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(50, 200, count).astype(float)
    nll = tokens * generator.normal(3.0, 0.5, count)
    return np.stack([nll, tokens, nll, 4 * tokens], axis=1)


def test_the_interval_contains_the_truth_as_often_as_stated():
    num_contained = 0
    for seed in range(200):
        low, high = figures(corpus(80, seed))["loss_interval"]
        num_contained += low <= 3.0 <= high
    assert 0.90 <= num_contained / 200 <= 0.98
    result = figures(corpus(80, 0))
    low, high = result["loss_interval"]
    assert low < result["loss"] < high
    assert result["perplexity_interval"] == pytest.approx([math.exp(low), math.exp(high)])
    assert result["bits_per_byte_interval"] == pytest.approx([low / 4 / math.log(2), high / 4 / math.log(2)])
    assert figures(corpus(80, 0)) == result
    assert figures(corpus(1, 0))["loss_interval"] is None


def test_drawing_groups_of_documents_keeps_the_interval(monkeypatch):
    documents = corpus(5000, 0)
    width = np.ptp(figures(documents)["loss_interval"])
    monkeypatch.setattr(sums_module, "MAX_GROUPS", 1000)
    assert np.ptp(figures(documents)["loss_interval"]) == pytest.approx(width, rel=0.15)


@pytest.mark.parametrize(("length", "stride"), [(100, 16), (100, 5), (96, 16), (10, 4), (16, 16), (17, 1), (33, 15)])
def test_sliding_windows_score_every_token_once(length, stride):
    windows = list(sliding_windows(length, 16, stride))
    scored = [position for start, first in windows for position in range(first, min(start + 16, length))]
    assert scored == list(range(length)) and [start for start, _ in windows] == [
        stride * n for n in range(len(windows))
    ]


def test_the_metric_loads_by_path_and_weights_by_tokens():
    metric = evaluate.load(hfpretrain.evaluation.token_perplexity.__file__)
    result = metric.compute(nll=[10.0, 1.0], tokens=[10, 90], content_nll=[8.0, 1.0], bytes=[20, 180])
    assert result["loss"] == pytest.approx(0.11) and result["perplexity"] == pytest.approx(math.exp(0.11))
    assert result["bits_per_byte"] == pytest.approx(9 / 200 / math.log(2))
