"""Checks that all ranks run the same, and ends the run on all ranks when one of them fails or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import psutil
import torch.distributed as dist

from hfpretrain.engines import launch
from hfpretrain.recipe.schema import Problem, RecipeError

SILENCE_SECONDS = 30  # a rank that writes no new status for this long counts as lost
_BROKEN_SILENCE_SECONDS = 4  # this many once a connection to a rank has broken, since some rank has just died
_REPORT_SECONDS = 30  # after this long, a rank that waits for rank 0 prints what it waits for
_KNOWN = "recipe_error/known"  # counts the ranks that end with the same `RecipeError`
_GRACE_SECONDS = 3  # a failed rank's launcher has this long to end its other ranks: its report says more than ours


@dataclass(frozen=True)
class Status:
    """What a rank writes about itself once a second."""

    host: str
    pid: int = 0
    tick: int = 0
    """Number of statuses before this one."""
    count: int = 0
    """Number of calls of `beat`. All ranks make the same calls, so those with the lowest count are behind."""
    phase: str = "prepare"
    step: int = 0
    units: int = 0
    """Number of calls of `unit_done`. It shows that the rank works, and is not compared between ranks."""
    task: str = ""
    """What rank 0 is doing for all ranks in `run_on_main`; empty if nothing."""
    waits: bool = False
    """Whether this rank is waiting for rank 0 to do `task`."""
    end: str | None = None
    """None while the rank runs, empty after it ended well, else its error."""
    disconnected: bool = False
    """Whether a connection to another rank broke."""
    recipe_error: dict[str, Any] | None = None
    """The `RecipeError` that ends this rank: `problems`, and the rank and the host that found it. Otherwise None."""


class FailureDetector:
    """Finds the rank that blocks the run, from statuses that are read once a second.

    It measures time by counting its own checks. So the time for which its own process was suspended does not count as
    silence of the other ranks.
    """

    def __init__(self, timeout_seconds: int):
        self._stall, self._silence = timeout_seconds, min(SILENCE_SECONDS, timeout_seconds)
        self._last: dict[int, Status] = {}
        self._silent: dict[int, int] = {}
        self._failed: dict[int, int] = {}
        self._idle = 0

    def find_failure(self, statuses: Mapping[int, Status], disconnected: bool = False) -> tuple[str, list[int]] | None:
        """Return why the run must end and which ranks are lost; None if it can continue.

        `statuses`: those of all ranks, or of rank 0 alone, in which case stalls are not detected.
        `disconnected`: whether a connection of this rank broke.
        """
        live = {rank: status for rank, status in statuses.items() if status.end is None}
        for rank, status in live.items():
            heard = rank not in self._last or self._last[rank].tick != status.tick
            self._silent[rank] = 0 if heard else self._silent[rank] + 1
        for rank, status in statuses.items():
            if status.end:
                self._failed[rank] = self._failed.get(rank, 0) + 1
        moved = any(
            rank not in self._last or (self._last[rank].count, self._last[rank].units) != (status.count, status.units)
            for rank, status in live.items()
        )
        # Until its first `beat`, rank 0 prepares the data, and the others wait. That has no time limit.
        prepares = 0 in live and not live[0].count
        self._idle = 0 if moved or prepares else self._idle + 1
        self._last = dict(statuses)
        if (found := self._find_lost(live, disconnected)) is not None:
            return found
        text = self._find_failed(statuses) or (self._find_stalled(live) if len(statuses) > 1 else None)
        return None if text is None else (text, [])

    def _find_lost(self, live: Mapping[int, Status], disconnected: bool) -> tuple[str, list[int]] | None:
        disconnected = disconnected or any(status.disconnected for status in live.values())
        limit = min(_BROKEN_SILENCE_SECONDS, self._silence) if disconnected else self._silence
        lost = [rank for rank in live if self._silent[rank] >= limit - 1]
        if not any(self._silent[rank] >= limit for rank in lost):
            return None
        return (
            f"no status for {limit} s from {_describe_ranks(lost, live)}: killed or suspended, or its host is down",
            lost,
        )

    def _find_failed(self, statuses: Mapping[int, Status]) -> str | None:
        rank = next((rank for rank, looks in self._failed.items() if looks >= _GRACE_SECONDS), None)
        return None if rank is None else f"{_describe_ranks([rank], statuses)} failed: {statuses[rank].end}"

    def _find_stalled(self, live: Mapping[int, Status]) -> str | None:
        if not live or self._idle < self._stall:
            return None
        least = min(status.count for status in live.values())
        behind = [rank for rank, status in live.items() if status.count == least]
        if not all(live[rank].waits for rank in behind):
            behind = [rank for rank in behind if not live[rank].waits]
        if len(behind) == len(live):
            text = f"all ranks are at the same point as {_describe_ranks(behind[:1], live)}"
        else:
            text = f"the other ranks wait for {_describe_ranks(behind, live)}"
        return f"no progress for {self._stall} s (training.timeout_seconds); {text}"


def _describe_ranks(ranks: Sequence[int], statuses: Mapping[int, Status], most: int = 8) -> str:
    shown = [(rank, statuses[rank]) for rank in ranks[:most]]
    tasks = {rank: f": {'waits for rank 0 to ' if s.waits else ''}{s.task}" if s.task else "" for rank, s in shown}
    texts = [f"rank {rank} on {s.host}, pid {s.pid} (step {s.step}, phase {s.phase}{tasks[rank]})" for rank, s in shown]
    return "; ".join(texts) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


class Watch:
    """Watches the other ranks while the context is open. For a single process it does nothing.

    Every rank writes its status into the process group's store once a second. Rank 0 reads the statuses of all ranks;
    the others read only the status of rank 0 and the failure that it found. So the store's load grows only linearly
    with the number of ranks. A rank that finds a failure prints it, and all ranks end with exit code 1. If a rank ends
    with a `RecipeError`, for example because a file that only this rank reads is broken, all ranks end with its message
    and exit code 2.
    """

    def __init__(self) -> None:
        self._rank, self._progress = 0, (0, "prepare", 0)
        self._disconnected, self._host = False, socket.gethostname()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._contacts, self._first = 0, Status("?")
        self._ending = threading.Lock()
        self._units, self._task, self._waits = 0, "", False
        self._num_tasks = 0
        self._paused = 0.0
        self._ticks: dict[int, int] | None = None
        self._recipe_error: dict[str, Any] | None = None
        self._looks_at_error = 0

    def beat(self, phase: str, step: int) -> None:
        """Record that the main thread is in `phase` of `step`. All ranks must make the same calls. It is cheap."""
        self._progress = (self._progress[0] + 1, phase, step)

    def unit_done(self) -> None:
        """Record progress in a long task. Call it after each part of the task, such as one of many files."""
        self._units += 1

    def run_on_main(self, task: str, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone, and return its result, a JSON value, on all ranks.

        If it raises a `RecipeError`, all ranks raise that. The others wait as long as it takes, even beyond the timeout
        of the process group. `task` describes the work in messages. All ranks must call this in the same order.
        """
        if not self._threads:
            return work()
        key, self._task, self._waits = f"task/{self._num_tasks}", task, self._rank > 0
        self._num_tasks += 1
        if self._rank == 0:
            try:
                answer = {"value": work()}
            except RecipeError as error:
                self._answer_all(key, {"problems": [asdict(problem) for problem in error.problems]})
                raise
            self._answers.set(key, json.dumps(answer))
        else:
            answer = self._wait_for_answer(key)
        self._task, self._waits = "", False
        if "problems" in answer:
            raise RecipeError([Problem(**problem) for problem in answer["problems"]])
        return answer["value"]

    def publish(self, key: str, value: Any) -> None:
        """Let all ranks read a JSON value with `published`, in the main thread. Needs several ranks."""
        self._answers.set(f"published/{key}", json.dumps(value))

    def published(self, key: str) -> Any:
        """The value that a rank has given to `publish`; None if none has. Does not wait."""
        key = f"published/{key}"
        return json.loads(self._answers.get(key)) if self._answers.check([key]) else None

    def _answer_all(self, key: str, answer: dict[str, Any]) -> None:
        """Send all ranks the last answer of rank 0, and let them read it: the store may end with rank 0."""
        self._answers.set(key, json.dumps(answer))
        deadline = time.monotonic() + 2 * _GRACE_SECONDS
        while time.monotonic() < deadline and int(self._answers.add(f"{key}/heard", 0)) < len(self._ranks) - 1:
            time.sleep(0.1)

    def _wait_for_answer(self, key: str) -> Any:
        start, reported = time.monotonic(), not self._reports_for_host()
        while not self._answers.check([key]):
            time.sleep(0.1)
            if not reported and time.monotonic() - start > _REPORT_SECONDS:
                reported = True
                print(
                    f"rank {self._rank} on {self._host} waits for {_describe_ranks([0], {0: self._first})}",
                    file=sys.stderr,
                )
        answer = json.loads(self._answers.get(key))
        self._answers.add(f"{key}/heard", 1)
        return answer

    def start(self, rank: int, num_ranks: int, timeout_seconds: int, facts: Mapping[str, Any]) -> None:
        """Compare `facts`, JSON values by key, with those of the other ranks, and begin to watch them.

        Raises `RecipeError` on all ranks if the facts differ. The process group must exist.
        """
        if num_ranks == 1:
            return
        from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

        # Each thread has its own connection to the store, so that they never wait for each other.
        store: Any = _get_default_store()
        self._store: Store = PrefixStore("hfpretrain/", store.clone())
        self._answers: Store = PrefixStore("hfpretrain/", store.clone())  # for the main thread
        self._store.set_timeout(timedelta(seconds=timeout_seconds))
        self._rank, self._ranks = rank, range(num_ranks)
        self._silence = min(SILENCE_SECONDS, timeout_seconds)
        self._write(0)
        if rank == 0:
            self._store.set("verdict", "")
        _require_agreement(self._store, rank, num_ranks, self._host, facts, timeout_seconds)
        self._detector = FailureDetector(timeout_seconds)
        for work in (self._watch, self._watch_store):
            self._threads.append(threading.Thread(target=work, daemon=True, name=f"ranks{work.__name__}"))
            self._threads[-1].start()

    def stop_watching(self) -> None:
        """Stop watching and being watched. Call it when the remaining work of this rank concerns no other rank."""
        self.__exit__(None, None, None)
        self._threads = []

    def _write(self, tick: int, end: str | None = None) -> None:
        count, phase, step = self._progress
        own = (self._units, self._task, self._waits)
        status = Status(
            self._host, os.getpid(), tick, count, phase, step, *own, end, self._disconnected, self._recipe_error
        )
        self._store.set(f"status/{self._rank}", json.dumps(asdict(status)))

    def _watch(self) -> None:
        tick, others = 0, self._ranks if self._rank == 0 else range(1)
        keys = [*(f"status/{rank}" for rank in others), "verdict"]
        while not self._closed.wait(1):
            tick += 1
            try:
                self._write(tick)
                *values, verdict = self._store.multi_get(keys)
            except dist.DistError as error:
                # The store has ended. If this is the end of the run, `_closed` is set soon.
                if not self._closed.wait(_GRACE_SECONDS):
                    self._end(f"{self._store_text()} can't be reached ({error})", reports=self._reports_for_host())
                return
            self._contacts += 1
            if verdict:
                self._end(verdict.decode(), reports=False)
            statuses = {rank: Status(**json.loads(value)) for rank, value in zip(others, values, strict=True)}
            self._first = statuses[0]
            self._note_new_statuses(statuses)
            if (recipe_error := self._find_recipe_error(statuses)) is not None and not self._closed.is_set():
                self._end_with(recipe_error)
            found = self._detector.find_failure(statuses, self._disconnected)
            if found is not None and not self._closed.is_set():
                text, lost = found
                if self._rank == 0:
                    self._store.set("verdict", text)
                self._end(
                    text, reports=self._rank == 0 or self._reports_for_host(), lost=[statuses[rank] for rank in lost]
                )

    def _find_recipe_error(self, statuses: Mapping[int, Status]) -> dict[str, Any] | None:
        """The `RecipeError` that ends another rank, once it is there for two looks.

        This rank may have the same error, because it read the same file. It then ends by itself.
        """
        found = next((status.recipe_error for status in statuses.values() if status.recipe_error is not None), None)
        self._looks_at_error += found is not None
        return found if self._looks_at_error >= 2 else None

    def _note_new_statuses(self, statuses: Mapping[int, Status]) -> None:
        """Forget that this process was suspended, once all other ranks have written a new status."""
        if self._paused:
            ticks = {rank: status.tick for rank, status in statuses.items() if status.end is None}
            if self._ticks is None:
                self._ticks = ticks
            elif all(tick != self._ticks.get(rank) for rank, tick in ticks.items()):
                self._paused = 0.0

    def _watch_store(self) -> None:
        """End this rank if the store does not answer: `_watch` would wait forever if the store's host is down."""
        last, looks, before = 0, 0, time.monotonic()
        while not self._closed.wait(1):
            paused, before = time.monotonic() - before - 1, time.monotonic()
            if paused > min(_BROKEN_SILENCE_SECONDS, self._silence) - 1:
                self._paused, self._ticks = paused, None
            last, looks = self._contacts, looks + 1 if last == self._contacts else 0
            if looks > self._silence:
                self._end(
                    f"no answer for {self._silence} s from {self._store_text()}", reports=self._reports_for_host()
                )

    def _store_text(self) -> str:
        return f"the launcher of {_describe_ranks([0], {0: self._first})}"

    def _reports_for_host(self) -> bool:
        """Whether this rank prints messages for its host when rank 0 can't.

        This is local rank 1 on the host of rank 0, and local rank 0 on all other hosts.
        """
        return os.environ.get("LOCAL_RANK", "0") == (
            "1" if self._rank < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else "0"
        )

    def _end(self, text: str, reports: bool, lost: Sequence[Status] = ()) -> None:
        if not self._ending.acquire(blocking=False):
            return
        if self._paused:
            # Some rank has written no status since this one was suspended, so the other ranks have ended.
            count, phase, step = self._progress
            own = _describe_ranks([self._rank], {self._rank: Status(self._host, os.getpid(), 0, count, phase, step)})
            text = f"{own} was suspended for {self._paused:.0f} s, and the other ranks ended meanwhile"
            reports, lost = True, ()
        if reports:
            print(f"\nerror: the run ends on all ranks: {text}", file=sys.stderr, flush=True)
            for status in lost:
                _kill_local_rank(status, self._host)
        # When a rank ends, its launcher ends its other ranks. Wait, so that they can print or write first.
        time.sleep(_GRACE_SECONDS - 1 if reports else _GRACE_SECONDS)
        os._exit(1)

    def _end_with(self, recipe_error: dict[str, Any]) -> None:
        """End this rank with the `RecipeError` of another one."""
        if not self._ending.acquire(blocking=False):
            return
        self._recipe_error = recipe_error
        problems = [str(Problem(**problem)) for problem in recipe_error["problems"]]
        text = "\n  ".join([f"error on rank {recipe_error['rank']} ({recipe_error['host']}):", *problems])
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank of each host
            launch.leave_message(text)
            print(text, file=sys.stderr, flush=True)
        if self._rank == 0:
            launch.record_exit_code(2)
        self._tell_recipe_error(" ".join(text.split()))
        if self._rank:
            time.sleep(_GRACE_SECONDS)  # until rank 0 has left its message: its launcher ends it with this rank
        os._exit(2)

    def _tell_recipe_error(self, end: str) -> None:
        """Write the last status of this rank, and wait until all ranks know its `RecipeError`.

        The store may end with this rank.
        """
        with contextlib.suppress(dist.DistError):  # the store has ended
            self._write(-1, end[:500])
            self._store.add(_KNOWN, 1)
            deadline = time.monotonic() + 2 * _GRACE_SECONDS
            while time.monotonic() < deadline and int(self._store.add(_KNOWN, 0)) < len(self._ranks):
                time.sleep(0.1)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write the last status: that this rank ended well, or its error."""
        if not self._threads:
            return
        if error is not None and _is_disconnection(error):
            # Another rank has ended, which broke the connection. The watch thread will soon find out which.
            self._disconnected = True
            time.sleep(_BROKEN_SILENCE_SECONDS + 2 * _GRACE_SECONDS)
        self._closed.set()
        self._threads[0].join(_GRACE_SECONDS)
        if self._threads[0].is_alive():
            return
        end = "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if isinstance(error, RecipeError):
            problems = [asdict(problem) for problem in error.problems]
            self._recipe_error = {"rank": self._rank, "host": self._host, "problems": problems}
            self._tell_recipe_error(end)
            return
        try:
            self._write(-1, end)
        except dist.DistError:
            return
        if error is not None and len(self._ranks) > int(os.environ.get("LOCAL_WORLD_SIZE", len(self._ranks))):
            # This process's launcher ends with it, and the store may be in that launcher. Other hosts must read this
            # status first.
            time.sleep(_GRACE_SECONDS)


def _kill_local_rank(status: Status, host: str) -> None:
    # A launcher would wait 30 seconds for a suspended process to end. This kills only ranks of the same launcher.
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if status.host == host and psutil.Process(status.pid).ppid() == os.getppid():
            os.kill(status.pid, signal.SIGKILL)


def _is_disconnection(error: BaseException) -> bool:
    """Whether an error comes from a broken connection to another rank. gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "ncclComm"))
    )


def _missing_ranks(store: Any, num_ranks: int, timeout_seconds: int) -> list[int]:
    """Ranks that have not written their first status in time."""
    deadline = time.monotonic() + timeout_seconds
    while missing := [rank for rank in range(num_ranks) if not store.check([f"status/{rank}"])]:
        if time.monotonic() > deadline:
            return missing
        time.sleep(0.1)
    return []


def _require_agreement(
    store: Any, rank: int, num_ranks: int, host: str, facts: Mapping[str, Any], timeout_seconds: int
) -> None:
    missing = _missing_ranks(store, num_ranks, timeout_seconds)
    if missing:
        raise RuntimeError(f"rank(s) {', '.join(map(str, missing))} did not start within {timeout_seconds} s")
    if rank == 0:
        store.set("facts", json.dumps([host, dict(facts)]))
    first_host, first = json.loads(store.get("facts"))
    ours = json.loads(json.dumps(dict(facts)))
    problems = [
        (key, f"is {ours.get(key)!r} on rank {rank} ({host}), {first.get(key)!r} on rank 0 ({first_host})")
        for key in sorted(ours.keys() | first.keys())
        if ours.get(key) != first.get(key)
    ]
    store.set(f"problems/{rank}", json.dumps(problems))
    found = [
        pair for value in store.multi_get([f"problems/{n}" for n in range(num_ranks)]) for pair in json.loads(value)
    ]
    if found:
        # The store may end with rank 0, so that one goes last.
        store.set(f"read/{rank}", "")
        if rank == 0:
            store.wait([f"read/{n}" for n in range(num_ranks)])
        advice = Problem("ranks", "start all ranks with the same recipe, overrides, engine file and library versions")
        raise RecipeError([advice, *(Problem(key, text) for key, text in found[:20])])
