"""Read an iterator ahead in one thread, work on its items in other threads, and return the results in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from hfpretrain.data.threads import DaemonPool

Item = TypeVar("Item")
Result = TypeVar("Result")


class ReadAhead(Generic[Item, Result]):
    """An iterator over `work(item)` for each of `items`, in order.

    One thread of `readers` at a time reads the items, and threads of `workers` work on several at once. `size` returns
    the size of an item. Reading starts with the first call of `start` or `next`, and pauses while the items that were
    read, but whose results were not yet taken, have a total size of `limit` or more. An error that `items` or `work`
    raises is raised by `next` in place of that item's result.
    """

    def __init__(
        self,
        items: Iterator[Item],
        work: Callable[[Item], Result],
        *,
        size: Callable[[Item], int],
        limit: int,
        readers: DaemonPool,
        workers: DaemonPool,
    ):
        self._items, self._work, self._size, self._limit = items, work, size, limit
        self._readers, self._workers = readers, workers
        self._changed = threading.Condition()
        self._slots: deque[_Slot[Result]] = deque()
        self._ahead, self._is_reading, self._has_ended = 0, False, False

    def start(self) -> None:
        """Start to read ahead, unless the items that were read have a size of `limit`."""
        with self._changed:
            if self._is_reading or self._has_ended or self._ahead >= self._limit:
                return
            self._is_reading = True
        self._readers.submit(self._read)

    def _read(self) -> None:
        slot: _Slot[Result] = _Slot()
        try:
            item = next(self._items)
        except BaseException as error:  # StopIteration too; raised by `__next__`
            slot.error = error
            with self._changed:
                self._slots.append(slot)
                self._is_reading, self._has_ended = False, True
                self._changed.notify_all()
            return
        slot.size = self._size(item)
        with self._changed:
            self._slots.append(slot)
            self._ahead += slot.size
            self._is_reading = False
        self._workers.submit(lambda: self._fill(slot, item))
        self.start()

    def _fill(self, slot: _Slot[Result], item: Item) -> None:
        try:
            slot.result = [self._work(item)]
        except BaseException as error:  # raised by `__next__`
            slot.error = error
        with self._changed:
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        self.start()
        with self._changed:
            self._changed.wait_for(lambda: bool(self._slots) and self._slots[0].is_filled)
            slot = self._slots[0]
            if slot.error is not None:
                raise slot.error
            self._slots.popleft()
            self._ahead -= slot.size
        self.start()
        return slot.result[0]


class _Slot(Generic[Result]):
    """The place of one item's result, which may not be there yet."""

    def __init__(self) -> None:
        self.size = 0
        self.result: list[Result] = []
        self.error: BaseException | None = None

    @property
    def is_filled(self) -> bool:
        """Whether the result or an error is there."""
        return bool(self.result) or self.error is not None
