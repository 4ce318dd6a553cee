import time

import pytest
import torch
from PIL import Image

from hfpretrain import metrics


def test_resuming_forgets_later_lines_and_a_half_written_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n3\nnull\n{"loss": 1}\n\x00\xff\n{"step": 2}\n{"step": 3}\n{"st')
    metrics.MetricsFile(path, resume_step=2).write({"step": 3, "loss": 1.0})
    assert metrics.read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    file = metrics.MetricsFile(path, resume_step=None)
    assert metrics.read_metrics(path) == []
    path.unlink()  # by whoever cleans up
    file.write({"step": 4})
    assert metrics.read_metrics(path) == [{"step": 4}]


def test_flops():
    # GPT-2 124M at 1,024 tokens: 6 * 124e6 plus the attention's share
    assert metrics.flops_per_token(124_000_000, 12, 768, 1024) == pytest.approx(857e6, rel=0.01)


def test_peak_memory_counts_what_is_used_after_its_start():
    before = torch.ones(2**24)
    peak = metrics.PeakMemory()
    first = torch.ones(2**24)
    second = first * 2
    time.sleep(0.05)
    del first, second
    used, _ = peak.close()
    assert 0.8 * 2**27 < used < 1.5 * 2**27 and len(before)


def test_the_clock_gives_all_time_to_some_part(monkeypatch):
    now = iter([0.0, 0.0, 1.0, 3.0, 7.0, 7.5, 7.5])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    clock = metrics.Clock(torch.device("cpu"))
    for part in ("data", "optimizer", "data"):
        clock.mark(part)
    assert clock.read() == dict.fromkeys(metrics.Clock.PARTS, 0.0) | {"data": 5.0, "optimizer": 2.0}
    clock.mark("save")
    assert clock.read()["save"] == 0.5 and clock.running() == 7.5


def test_the_plot_is_a_picture(tmp_path):
    rows = [{"step": s, "tokens": s * 100, "loss": 5 / s, "lr": 1e-3} for s in range(1, 20)]
    rows += [{"step": 10, "tokens": 1000, "eval/loss": 1.0}]
    metrics.plot_loss(rows, tmp_path / "loss.png", "run")
    assert Image.open(tmp_path / "loss.png").size == (880, 594)
