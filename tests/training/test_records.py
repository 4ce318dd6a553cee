"""Records whose trackers fail for a while."""

import resource
from typing import ClassVar

import pytest
from accelerate.tracking import TensorBoardTracker

from hfpretrain.training import records
from hfpretrain.training.metrics_file import read_metrics


class Tracker:
    """Fails while `down`; a new one is made by `start`."""

    down = False
    seen: ClassVar[list] = []
    started = 0

    def __init__(self):
        type(self).started += 1
        if self.down:
            raise ConnectionError("no server")

    def log(self, values, step):
        if self.down:
            raise ConnectionError("no server")
        if values["loss"] == -1:
            raise TypeError("an unsupported value")
        self.seen.append((step, values["loss"]))

    def finish(self):
        pass


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setattr(Tracker, "seen", [])
    monkeypatch.setattr(Tracker, "started", 0)
    return Tracker


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(records.time, "monotonic", lambda: now[0])
    return now


def events(folder):
    return [row["event"] for row in read_metrics(folder / "metrics.jsonl") if "event" in row]


def test_a_tracker_that_works_again_gets_the_missed_rows_in_order(tmp_path, tracker, clock, monkeypatch):
    run_records = records.Records(tmp_path, {"remote": tracker}, True, 100, None)
    for step in range(1, 101):
        monkeypatch.setattr(tracker, "down", 10 <= step < 60)
        clock[0] += 1.0
        run_records.write_row({"step": step, "loss": step / 2})
    assert tracker.seen == [(step, step / 2) for step in range(1, 101)]
    assert tracker.started < 8  # it is not retried at every step
    first, second = events(tmp_path)  # each is reported once
    assert "remote failed" in first and "ConnectionError: no server" in first
    assert "remote works again" in second
    run_records.finish()
    assert len(events(tmp_path)) == 2


def test_a_row_that_a_tracker_never_accepts_does_not_delay_the_others(tmp_path, tracker, clock):
    run_records = records.Records(tmp_path, {"remote": tracker}, True, 100, None)
    for step in range(20):
        clock[0] += 100
        run_records.write_row({"step": step, "loss": -1 if step == 3 else float(step)})
    assert [step for step, _ in tracker.seen] == [step for step in range(20) if step != 3]
    assert "except for 1" in events(tmp_path)[-1]


def test_a_tracker_that_fails_to_start_is_started_later(tmp_path, tracker, clock, monkeypatch):
    monkeypatch.setattr(tracker, "down", True)
    run_records = records.Records(tmp_path, {"remote": tracker}, True, 100, None)
    run_records.write_row({"step": 1, "loss": 1.0})
    monkeypatch.setattr(tracker, "down", False)
    run_records.write_row({"step": 2, "loss": 2.0})
    assert tracker.seen == []
    clock[0] += 1000
    run_records.write_row({"step": 3, "loss": 3.0})
    assert tracker.seen == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_rows_that_could_not_be_sent_are_counted_and_bounded(tmp_path, tracker, clock, monkeypatch):
    monkeypatch.setattr(records._Tracker, "_MOST_ROWS", 20)
    monkeypatch.setattr(tracker, "down", True)
    run_records = records.Records(tmp_path, {"remote": tracker, "other": tracker}, True, 100, None)
    for step in range(30):
        run_records.write_row({"step": step, "loss": 1.0})
    run_records.finish()
    assert sum("30 rows" in text for text in events(tmp_path)) == 2


def test_tensorboard_gets_all_rows_after_a_full_disk(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def start():
        made = TensorBoardTracker("project", tmp_path)
        made.start()
        return made

    messages: list[str] = []
    one = records._Tracker("tensorboard", start, messages.append)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(30):
        one._retry_at = 0.0
        # The operating system's limit on file size stands in for a disk that is full for a while.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 if 10 <= step < 20 else before[0], before[1]))
        try:
            one.log({"loss": float(step)}, step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    one.finish()
    found = set()
    for path in (tmp_path / "project").glob("events*"):
        read = EventAccumulator(str(path))
        read.Reload()
        found |= {event.step for event in (read.Scalars("loss") if "loss" in read.Tags()["scalars"] else ())}
    assert found == set(range(30)), messages
    assert len(messages) == 2 and "File too large" in messages[0] and "again" in messages[1]
