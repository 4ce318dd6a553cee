import json

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from hfpretrain.modeling.flops import flops_per_token
from hfpretrain.training import clock
from hfpretrain.training.clock import Clock
from hfpretrain.training.history import History
from hfpretrain.training.metrics_file import MetricsFile, read_metrics
from hfpretrain.training.peak_memory import PeakMemory
from hfpretrain.training.plot import plot_loss


def test_a_resume_drops_later_lines_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n3\nnull\n{"loss": 1}\n\x00\xff\n{"step": 2}\n{"step": 3}\n{"st')
    MetricsFile(path, resume_step=2).write({"step": 3, "loss": 1.0})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    file = MetricsFile(path, resume_step=None)
    assert read_metrics(path) == []
    path.unlink()  # a user deletes it
    file.write({"step": 4})
    assert read_metrics(path) == [{"step": 4}]


def test_a_resume_reads_only_the_end_of_the_file(tmp_path):
    """Lines before the newest kept line are not read. Events and the saves of old steps are kept."""
    path = tmp_path / "metrics.jsonl"
    start = b"not read\n" * 200_000
    lines = [
        {"step": 9, "loss": 1.0},
        {"step": 10, "loss": 1.0},
        {"step": 10, "event": "stopped"},
        {"step": 11, "loss": 1.0},
        {"step": 10, "save/seconds": 1.0},
        {"step": 12, "event": "a rank was late"},
        {"step": 12, "loss": 1.0},
        {"step": 12, "export/loss_export": 1.0},
    ]
    end = [(json.dumps(line) + "\n").encode() for line in lines]
    path.write_bytes(start + b"".join(end) + b'{"step": 13, "eve')
    MetricsFile(path, resume_step=10)
    assert path.read_bytes() == start + b"".join([*end[:3], end[4], end[5]])
    MetricsFile(path, resume_step=10)
    assert path.read_bytes() == start + b"".join([*end[:3], end[4], end[5]])


@pytest.mark.parametrize("length", [10, 1000, 2**18 - 1, 2**18, 2**19 + 7])
def test_a_resume_drops_any_number_of_lines_of_any_length(tmp_path, length):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "text": "x" * (length * (step % 3))} for step in range(1, 13)]
    for resume_step in (11, 5, 1):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 13, "te')
        MetricsFile(path, resume_step)
        assert read_metrics(path) == rows[:resume_step] and path.read_text().endswith("\n")


def test_the_history_of_a_long_run_is_small_and_keeps_its_extremes():
    def rows():
        for step in range(1, 100_001):
            loss = 99.0 if step == 50_001 else 1 / step
            yield {"step": step, "tokens": step * 10, "loss": loss, "lr": 1e-3, "tokens_per_second": 5.0}
            if step % 100 == 0:
                yield {"step": step, "tokens": step * 10, "eval/loss": 2 / step, "eval/bits_per_byte": 1.0}
            yield {"step": step, "event": "ignored"}

    history = History(rows())
    tokens, losses = history.loss.points()
    assert len(tokens) == len(losses) < 10_000 and sorted(tokens) == tokens and tokens[-1] > 990_000
    assert max(losses) == 99.0 and min(losses) == 1e-5 and abs(tokens[losses.index(99.0)] - 500_000) < 1000
    assert [row["step"] for row in history.evaluations] == [100, 100_000] and history.tokens == 1_000_000
    assert len(history.validation[""].points()[0]) == 1000 and history.figures["eval/loss"] == 2e-5
    assert len(list(history.speeds())) == 100_000


def test_flops_of_gpt2_equal_the_published_count():
    # GPT-2 124M at 1,024 tokens: 6 * 124e6 plus 12 * 12 * 768 * 1024 for attention
    assert flops_per_token(124_000_000, 12, 768, 1024) == pytest.approx(857e6, rel=0.01)


def test_peak_memory_counts_only_what_is_used_after_its_start():
    before = torch.ones(2**24)
    peak = PeakMemory()
    first = torch.ones(2**24)
    second = first * 2
    del first, second
    assert 0.8 * 2**27 < peak.peak() < 1.5 * 2**27 and len(before)
    assert peak.now() <= peak.peak()


def test_the_clock_assigns_all_time_to_parts(monkeypatch):
    now = iter([0.0, 0.0, 1.0, 3.0, 7.0, 7.5, 7.5])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    measured = Clock(torch.device("cpu"))
    for part in ("data", "optimizer", "data"):
        measured.mark(part)
    assert measured.read() == dict.fromkeys(Clock.PARTS, 0.0) | {"data": 5.0, "optimizer": 2.0}
    measured.mark("save")
    assert measured.read()["save"] == 0.5 and measured.total() == 7.5


def test_the_plot_has_a_curve_for_each_domain(tmp_path, monkeypatch):
    rows = [{"step": s, "tokens": s * 100, "loss": 5 / s, "lr": 1e-3} for s in range(1, 20)]
    domain = {"eval/sea/loss": 2.5, "eval/sea/bits_per_byte": 1.0}
    rows += [{"step": 10, "tokens": 1000, "eval/loss": 1.0, "eval/bits_per_byte": 1.0, **domain}]
    labels = []
    monkeypatch.setattr(Axes, "legend", lambda self, **_: labels.extend(self.get_legend_handles_labels()[1]))
    plot_loss(History(rows), tmp_path / "loss.png", "run")
    Image.open(tmp_path / "loss.png").verify()
    assert labels == ["training", "validation, last 1.0000", "validation sea, last 2.5000"]
    plot_loss(History(), tmp_path / "loss.png", "a run without steps")
