"""What all ranks of a run must have in common, and the watch that ends it on all when one dies, hangs or is lost."""

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

from hfpretrain.recipe.schema import Problem, RecipeError

SILENCE_SECONDS = 30  # without a sign of life a rank counts as lost
_HURRY = 4  # the same when a connection broke: somebody died just now
_TELL_SECONDS = 30  # after so long a rank that waits for the main process says what for
_GRACE = 3  # a rank that failed is left so long to its own launcher, which ends its neighbours and says more


@dataclass(frozen=True)
class Status:
    """What a rank says of itself once a second."""

    host: str
    pid: int = 0
    tick: int = 0
    """Counts the seconds."""
    count: int = 0
    """Counts what its main thread has done; comparable between ranks, since all take the same branches."""
    phase: str = "prepare"
    step: int = 0
    units: int = 0
    """Counts what it has done alone, such as files read. This shows progress and is not compared between ranks."""
    task: str = ""
    """What it is doing alone."""
    waits: bool = False
    """Whether it is waiting for rank 0 to do `task`."""
    end: str | None = None
    """None while it runs, empty when it ended well, else its error."""
    hurt: bool = False
    """Whether a connection to another rank broke."""


class Judge:
    """Finds the rank that holds up the run, from the ranks' statuses looked at once a second.

    Seconds are counted in looks: a process that was stopped for a while has not waited for anybody.
    """

    def __init__(self, timeout_seconds: int):
        self._stall, self._silence = timeout_seconds, min(SILENCE_SECONDS, timeout_seconds)
        self._last: dict[int, Status] = {}
        self._silent: dict[int, int] = {}
        self._failed: dict[int, int] = {}
        self._idle = 0

    def look(self, statuses: Mapping[int, Status], hurt: bool = False) -> tuple[str, list[int]] | None:
        """What ends the run and which ranks are lost, None if nothing does.

        `statuses`: those of all ranks or of rank 0 alone, of which nobody can say whether others wait for it; `hurt`:
        that of this rank.
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
        # Until the main process has prepared the data, which takes as long as it takes, the others wait for it.
        prepares = 0 in live and not live[0].count
        self._idle = 0 if moved or prepares else self._idle + 1
        self._last = dict(statuses)
        if (found := self._lost(live, hurt)) is not None:
            return found
        text = self._broken(statuses) or (self._stalled(live) if len(statuses) > 1 else None)
        return None if text is None else (text, [])

    def _lost(self, live: Mapping[int, Status], hurt: bool) -> tuple[str, list[int]] | None:
        hurt = hurt or any(status.hurt for status in live.values())
        limit = min(_HURRY, self._silence) if hurt else self._silence
        lost = [rank for rank in live if self._silent[rank] >= limit - 1]
        if not any(self._silent[rank] >= limit for rank in lost):
            return None
        return f"no sign of life for {limit} s from {_places(lost, live)}: killed, stopped, or the host is gone", lost

    def _broken(self, statuses: Mapping[int, Status]) -> str | None:
        rank = next((rank for rank, looks in self._failed.items() if looks >= _GRACE), None)
        return None if rank is None else f"{_places([rank], statuses)} failed: {statuses[rank].end}"

    def _stalled(self, live: Mapping[int, Status]) -> str | None:
        if not live or self._idle < self._stall:
            return None
        least = min(status.count for status in live.values())
        behind = [rank for rank, status in live.items() if status.count == least]
        if not all(live[rank].waits for rank in behind):
            behind = [rank for rank in behind if not live[rank].waits]
        if len(behind) == len(live):
            place = _places(behind[:1], live)
            return f"no rank has made progress for {self._stall} s (training.timeout_seconds); all are where {place} is"
        return (
            f"no progress for {self._stall} s (training.timeout_seconds), the others wait for {_places(behind, live)}"
        )


def _places(ranks: Sequence[int], statuses: Mapping[int, Status], most: int = 8) -> str:
    shown = [(rank, statuses[rank]) for rank in ranks[:most]]
    tasks = {rank: f": {'waits for rank 0 to ' if s.waits else ''}{s.task}" if s.task else "" for rank, s in shown}
    places = [
        f"rank {rank} on {s.host}, pid {s.pid} (step {s.step}, phase {s.phase}{tasks[rank]})" for rank, s in shown
    ]
    return "; ".join(places) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")


class Watch:
    """Watches over the other ranks, as a context around the whole work of this one; nothing to do for a rank alone.

    Every rank writes its status into the process group's store once a second. Rank 0 reads all of them, the others
    rank 0's and its verdict, so that the store serves a number of requests linear in that of the ranks. Whoever finds
    the run held up says so on stderr, and all ranks end with exit code 1.
    """

    def __init__(self) -> None:
        self._rank, self._progress = 0, (0, "prepare", 0)
        self._hurt, self._host = False, socket.gethostname()
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._contacts, self._first = 0, Status("?")
        self._ending = threading.Lock()
        self._units, self._task, self._waits = 0, "", False
        self._num_tasks = 0
        self._paused = 0.0
        self._ticks: dict[int, int] | None = None

    def beat(self, phase: str, step: int) -> None:
        """The main thread got on. All ranks must call it alike; costs less than a microsecond."""
        self._progress = (self._progress[0] + 1, phase, step)

    def unit_done(self) -> None:
        """Note progress in what this rank does alone, such as reading one of many files."""
        self._units += 1

    def from_main(self, task: str, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 alone, and return its result, a JSON value, on all ranks; all raise its `RecipeError`.

        The others wait as long as it takes, even beyond the timeout of the process group. `task` describes the work in
        messages. All ranks must call this in the same order.
        """
        if not self._threads:
            return work()
        key, self._task, self._waits = f"task/{self._num_tasks}", task, self._rank > 0
        self._num_tasks += 1
        if self._rank == 0:
            try:
                answer = {"value": work()}
            except RecipeError as error:
                self._tell_all(key, {"problems": [asdict(problem) for problem in error.problems]})
                raise
            self._words.set(key, json.dumps(answer))
        else:
            answer = self._hear(key)
        self._task, self._waits = "", False
        if "problems" in answer:
            raise RecipeError([Problem(**problem) for problem in answer["problems"]])
        return answer["value"]

    def _tell_all(self, key: str, answer: dict[str, Any]) -> None:
        """Rank 0's last words, which the others must have read before the store ends with its launcher."""
        self._words.set(key, json.dumps(answer))
        deadline = time.monotonic() + 2 * _GRACE
        while time.monotonic() < deadline and int(self._words.add(f"{key}/heard", 0)) < len(self._ranks) - 1:
            time.sleep(0.1)

    def _hear(self, key: str) -> Any:
        start, told = time.monotonic(), not self._speaks()
        while not self._words.check([key]):
            time.sleep(0.1)
            if not told and time.monotonic() - start > _TELL_SECONDS:
                told = True
                print(f"rank {self._rank} on {self._host} waits for {_places([0], {0: self._first})}", file=sys.stderr)
        answer = json.loads(self._words.get(key))
        self._words.add(f"{key}/heard", 1)
        return answer

    def start(self, rank: int, num_ranks: int, timeout_seconds: int, facts: Mapping[str, Any]) -> None:
        """Compare `facts`, key to JSON value, with the other ranks' and begin to watch.

        Raises `RecipeError` on all ranks if they differ between any. The process group must exist.
        """
        if num_ranks == 1:
            return
        from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

        # A connection of its own, so that the main thread never waits for this one's.
        store: Any = _get_default_store()
        self._store: Store = PrefixStore("hfpretrain/", store.clone())
        self._words: Store = PrefixStore("hfpretrain/", store.clone())  # the main thread's
        self._store.set_timeout(timedelta(seconds=timeout_seconds))
        self._rank, self._ranks = rank, range(num_ranks)
        self._silence = min(SILENCE_SECONDS, timeout_seconds)
        self._write(0)
        if rank == 0:
            self._store.set("verdict", "")
        _require_agreement(self._store, rank, num_ranks, self._host, facts, timeout_seconds)
        self._judge = Judge(timeout_seconds)
        for work in (self._watch, self._guard):
            self._threads.append(threading.Thread(target=work, daemon=True, name=f"ranks{work.__name__}"))
            self._threads[-1].start()

    def leave(self) -> None:
        """This rank has done its part; what it still does concerns no other."""
        self.__exit__(None, None, None)
        self._threads = []

    def _write(self, tick: int, end: str | None = None) -> None:
        count, phase, step = self._progress
        own = (self._units, self._task, self._waits)
        status = Status(self._host, os.getpid(), tick, count, phase, step, *own, end, self._hurt)
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
                # The store ended, with the run or before it.
                if not self._closed.wait(_GRACE):
                    self._end(f"{self._store_place()} is gone ({error})", speaks=self._speaks())
                return
            self._contacts += 1
            if verdict:
                self._end(verdict.decode(), speaks=False)
            statuses = {rank: Status(**json.loads(value)) for rank, value in zip(others, values, strict=True)}
            self._first = statuses[0]
            self._note_life(statuses)
            found = self._judge.look(statuses, self._hurt)
            if found is not None and not self._closed.is_set():
                text, lost = found
                if self._rank == 0:
                    self._store.set("verdict", text)
                self._end(text, speaks=self._rank == 0 or self._speaks(), lost=[statuses[rank] for rank in lost])

    def _note_life(self, statuses: Mapping[int, Status]) -> None:
        """Forget that this process did not run for a while once all others are heard of again."""
        if self._paused:
            ticks = {rank: status.tick for rank, status in statuses.items() if status.end is None}
            if self._ticks is None:
                self._ticks = ticks
            elif all(tick != self._ticks.get(rank) for rank, tick in ticks.items()):
                self._paused = 0.0

    def _guard(self) -> None:
        """The store's host may be gone without a word, and then the other thread waits for an answer."""
        last, looks, before = 0, 0, time.monotonic()
        while not self._closed.wait(1):
            paused, before = time.monotonic() - before - 1, time.monotonic()
            if paused > min(_HURRY, self._silence) - 1:
                self._paused, self._ticks = paused, None
            last, looks = self._contacts, looks + 1 if last == self._contacts else 0
            if looks > self._silence:
                self._end(f"no answer for {self._silence} s from {self._store_place()}", speaks=self._speaks())

    def _store_place(self) -> str:
        return f"the launcher of {_places([0], {0: self._first})}"

    def _speaks(self) -> bool:
        """Whether this rank speaks for its host where rank 0 does not."""
        return os.environ.get("LOCAL_RANK", "0") == (
            "1" if self._rank < int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else "0"
        )

    def _end(self, text: str, speaks: bool, lost: Sequence[Status] = ()) -> None:
        if not self._ending.acquire(blocking=False):
            return
        if self._paused:
            # Nothing was heard since: the others have not waited for this rank.
            count, phase, step = self._progress
            place = _places([self._rank], {self._rank: Status(self._host, os.getpid(), 0, count, phase, step)})
            text = f"{place} was suspended for {self._paused:.0f} s, and the others have ended without it"
            speaks, lost = True, ()
        if speaks:
            print(f"\nerror: the run ends on all ranks: {text}", file=sys.stderr, flush=True)
            for status in lost:
                _kill_neighbour(status, self._host)
        # Launchers end the neighbours of a rank that ends, and one of those may have to speak or to write first.
        time.sleep(_GRACE - 1 if speaks else _GRACE)
        os._exit(1)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say goodbye, or what went wrong."""
        if not self._threads:
            return
        if error is not None and _follows(error):
            # Somebody else's end is the cause; the watch is about to find out whose.
            self._hurt = True
            time.sleep(_HURRY + 2 * _GRACE)
        self._closed.set()
        self._threads[0].join(_GRACE)
        if self._threads[0].is_alive():
            return
        try:
            self._write(-1, "" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:500])
        except dist.DistError:
            return
        if error is not None and len(self._ranks) > int(os.environ.get("LOCAL_WORLD_SIZE", len(self._ranks))):
            # With this process ends its launcher, and with that maybe the store, before other hosts have read it.
            time.sleep(_GRACE)


def _kill_neighbour(status: Status, host: str) -> None:
    # The launcher waits 30 seconds for a stopped process to obey. Only a child of the same launcher is touched.
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        if status.host == host and psutil.Process(status.pid).ppid() == os.getppid():
            os.kill(status.pid, signal.SIGKILL)


def _follows(error: BaseException) -> bool:
    """Whether an error is one of a connection to another rank; gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "ncclComm"))
    )


def _missing(store: Any, num_ranks: int, timeout_seconds: int) -> list[int]:
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
    missing = _missing(store, num_ranks, timeout_seconds)
    if missing:
        raise RuntimeError(f"rank(s) {', '.join(map(str, missing))} did not begin within {timeout_seconds} s")
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
        store.wait([f"read/{n}" for n in (range(num_ranks) if rank == 0 else [rank])])
        advice = Problem("ranks", "start all with the same recipe, overrides, engine file and library versions")
        raise RecipeError([advice, *(Problem(key, text) for key, text in found[:20])])
