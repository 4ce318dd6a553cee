"""Streaming on many processes: each text is read once, shuffled if asked for, and no source blocks a stop."""

import contextlib
import io
import itertools
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import psutil
import pytest
import small
import torch
from conftest import ROOT, environment, rows, small_text, write_jsonl, write_recipe
from fsspec.implementations.memory import MemoryFileSystem
from preparation import recipe as make_recipe
from preparation import stream, tokens

from hfpretrain.data import batches, corpus
from hfpretrain.data.batches import Prefetcher, ReadingEndedError
from hfpretrain.data.encode import Encoder
from hfpretrain.data.identity import fingerprint
from hfpretrain.data.read_ahead import ReadAhead
from hfpretrain.data.streaming import LaneState, load_lane_states, save_lane_states
from hfpretrain.data.threads import DaemonPool
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.engines.distributed import RowExchange
from hfpretrain.recipe.schema import DataSection, RecipeError, TokenizerSection
from hfpretrain.recipe.yaml import CHANGEABLE_ON_RESUME

TEXTS = small_text(2000, seed=3)


@pytest.fixture(scope="module")
def encode():
    tokenizer = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), TEXTS[:200])
    return Encoder(tokenizer, np.dtype(np.uint16))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten files, of which 0 to 7 have the same size."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        write_jsonl(folder / f"{number}.jsonl", TEXTS[100 * number : 100 * number + 100])
    write_jsonl(folder / "8.jsonl", TEXTS[800:1700])
    write_jsonl(folder / "9.jsonl", [*TEXTS[1700:], "", ""])
    return folder


def section(folder, kind="mixture", **keywords):
    def source(*numbers, **more):
        return {"path": "json", "data_files": [str(folder / f"{n}.jsonl") for n in numbers], **more}

    sources = {
        "mixture": [
            source(0, 1, weight=0.2),
            source(2, 3, 4, weight=0.5),
            source(8, weight=0.2),
            source(9, weight=0.1),
        ],
        "files of several sizes": [source(*range(10))],
        "fewer files than processes": [source(0, 1)],
        "files of one size": [source(*range(8))],
    }
    return DataSection(sources=sources[kind], block_size=32, streaming=True, **keywords)


KINDS = ("mixture", "files of several sizes", "fewer files than processes", "files of one size")


class Meeting:
    """Makes an `Exchange` for each rank, if the ranks are threads of this process."""

    def __init__(self, size):
        self._barrier, self._left = threading.Barrier(size, timeout=60), False
        self._sent = [None] * size

    def of(self, index):
        meeting = self

        class Exchange:
            def begin(self, step):
                meeting._barrier.wait()
                if meeting._left:
                    raise ReadingEndedError

            def __call__(self, outgoing, sizes):
                meeting._sent[index] = outgoing
                meeting._barrier.wait()
                received = [sent[index] for sent in meeting._sent]
                assert list(map(len, received)) == list(sizes)
                meeting._barrier.wait()
                return received

            def leave(self):
                meeting._left = True
                meeting._barrier.wait()

        return Exchange()


def on_threads(works):
    """Call functions at the same time, each in a thread, and return their results."""
    results = [None] * len(works)

    def call(number):
        results[number] = works[number]()

    running = [threading.Thread(target=call, args=(number,)) for number in range(len(works))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return results


def sharing(make, num_processes):
    """A stream for each process. Together they read each lane once. `make`: called with (processes, index)."""
    meeting = Meeting(num_processes)
    ranks = [make(num_processes, index) for index in range(num_processes)]
    for index, rank in enumerate(ranks):
        rank.join(meeting.of(index), swaps=rank.shares_lanes)
    return ranks


def steps_of(ranks, steps):
    """For each step, the data of all ranks."""
    found = on_threads([lambda rank=rank: [rank.step(step) for step in steps] for rank in ranks])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_processes", [2, 8])
def test_processes_that_share_the_reading_train_on_what_one_process_does(files, encode, kind, num_processes):
    data = section(files, kind)
    alone = stream(data, encode)
    expected = [alone.step(step) for step in range(30)]
    ranks = sharing(lambda *numbers: stream(data, encode, *numbers), num_processes)
    for step, parts in enumerate(steps_of(ranks, range(30))):
        one = expected[step]
        assert torch.equal(torch.cat(list(map(tokens, parts))), tokens(one))
        assert sum(part.checksum for part in parts) % 2**64 == one.checksum
        assert sum(part.documents_dropped for part in parts) == one.documents_dropped
        assert np.array_equal(sum(part.tokens for part in parts), one.tokens)
        states = [key for part in parts for key in part.state]
        assert sorted(states) == sorted(one.state), "each lane has one state"


class CountingFile(io.FileIO):
    """A file that counts the bytes read from files in the same folder."""

    counts: ClassVar[dict[str, int]] = {}

    def readinto(self, buffer):
        size = super().readinto(buffer)
        folder = Path(self.name).parent.name
        CountingFile.counts[folder] = CountingFile.counts.get(folder, 0) + size
        return size


@pytest.fixture
def bytes_read(monkeypatch):
    """Number of bytes read from files, by the name of their folder."""
    monkeypatch.setattr(corpus, "_open_file", lambda origin: io.BufferedReader(CountingFile(origin)))
    monkeypatch.setattr(CountingFile, "counts", {})
    return CountingFile.counts


@pytest.mark.parametrize("kind", KINDS)
def test_no_process_reads_what_others_train_on(files, encode, bytes_read, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("hfpretrain.data.streaming._BATCH_CHARS", 2000)  # so that less is read ahead
    folders = [tmp_path / f"rank{index}" for index in range(8)]  # the same files, to see which process reads them
    for folder in (*folders, tmp_path / "alone"):
        folder.symlink_to(files)
    alone = stream(section(tmp_path / "alone", kind), encode)
    bytes_read.clear()
    for step in range(60):
        alone.step(step)
    expected = bytes_read["alone"]

    def make(number, index):
        return stream(section(folders[index], kind), encode, number, index)

    def count(ranks):
        bytes_read.clear()
        steps_of(ranks, range(60))
        # Threads of streams that were read before may still read ahead.
        return {name: number for name, number in bytes_read.items() if name.startswith("rank")}

    once = count(sharing(make, 8))
    assert sum(once.values()) < 1.3 * expected, once  # some is read ahead of the last step
    assert len(once) == {"mixture": 4, "files of several sizes": 1}.get(kind, 2 if "fewer" in kind else 8)
    if kind == "mixture":  # without an exchange, each process reads everything
        again = count([make(8, index) for index in range(8)])
        assert sum(again.values()) > 6 * expected


def test_shared_reading_resumes_on_another_number_of_processes(files, encode, tmp_path):
    data = section(files, shuffle_buffer=30)
    alone = stream(data, encode, seed=5)
    expected = [tokens(alone.step(step)) for step in range(30)]
    for before, now, stopped in ((2, 8, 3), (8, 1, 17), (1, 4, 11)):
        make = lambda *numbers, data=data: stream(data, encode, *numbers, seed=5)  # noqa: E731
        last = steps_of(sharing(make, before), range(stopped))[-1]
        for index, part in enumerate(last):
            save_lane_states(part.state, stopped, tmp_path / f"data-{index}.pt")
        states, next_step = load_lane_states(tmp_path)
        resumed = sharing(
            lambda *numbers, states=states, first=next_step: stream(data, encode, *numbers, first, states, seed=5), now
        )
        for step, parts in zip(range(stopped, 30), steps_of(resumed, range(stopped, 30)), strict=True):
            assert torch.equal(torch.cat(list(map(tokens, parts))), expected[step])
        for path in tmp_path.glob("data-*.pt"):
            path.unlink()


def documents(data, encode, steps, **keywords):
    """The texts of the documents in these steps of a stream with one lane."""
    one = stream(data, encode, **keywords)
    flat = np.concatenate([tokens(one.step(step)).reshape(-1).numpy() for step in steps])
    return [encode._tokenizer.decode(ids) for ids in np.split(flat, np.flatnonzero(flat == encode.eos_token_id) + 1)]


def numbers(texts):
    """The numbers of the documents of `small_text`."""
    return [int(text.partition("№")[2].split()[0]) for text in texts if "№" in text]


def one_file(files, **keywords):
    source = {"path": "json", "data_files": str(files / "9.jsonl")}
    return DataSection(sources=[source], block_size=32, streaming=True, **keywords)


def test_a_shuffle_buffer_permutes_the_documents_within_it(files, encode):
    plain = numbers(documents(one_file(files), encode, range(150)))
    mixed = numbers(documents(one_file(files, shuffle_buffer=40), encode, range(150), seed=1))
    assert plain[:300] == list(range(1700, 2000)) and plain[300:310] == list(range(1700, 1710))
    assert mixed[:300] != plain[:300] and len(mixed) > 350
    for start in range(0, 300, 40):  # 7 whole buffers, and the last one of the epoch with 20 documents
        assert sorted(mixed[start : start + 40][: 300 - start]) == plain[start : min(start + 40, 300)]
        assert mixed[start : start + 20] != plain[start : start + 20]
    assert sorted(mixed[300:340]) == plain[:40] and mixed[300:340] != mixed[:40], "another order in the next epoch"
    other = numbers(documents(one_file(files, shuffle_buffer=40), encode, range(10), seed=2))
    assert other != mixed[: len(other)], "another order for another seed"
    again = numbers(documents(one_file(files, shuffle_buffer=40), encode, range(10), seed=1, num_threads=5))
    assert again == mixed[: len(again)]


@pytest.mark.parametrize("buffer", [0, 1, 7, 1000])
def test_a_stream_resumes_exactly_after_any_step(files, encode, buffer, monkeypatch):
    monkeypatch.setattr("hfpretrain.data.streaming._BATCH_CHARS", 1500)  # several batches in a buffer
    held_out = frozenset(
        document.digest for document in corpus.Reader(one_file(files).sources[0]).read() if "7" in document.text
    )
    data = one_file(files, shuffle_buffer=buffer)
    alone = stream(data, encode, seed=1, held_out=held_out)
    expected = [alone.step(step) for step in range(120)]
    assert expected[-1].state[0, 0].epoch > 1
    assert sum(one.documents_dropped for one in expected) > len(held_out)
    for stopped in range(1, 118, 9):
        resumed = stream(data, encode, 1, 0, stopped, expected[stopped - 1].state, seed=1, held_out=held_out)
        for step in range(stopped, stopped + 3):
            found, one = resumed.step(step), expected[step]
            assert torch.equal(tokens(found), tokens(one))
            assert found.documents_dropped == one.documents_dropped


def test_a_shuffled_source_ends_after_its_last_document(files, encode):
    source = {"path": "json", "data_files": str(files / "9.jsonl"), "max_epochs": 2}
    short = stream(DataSection(sources=[source], block_size=32, streaming=True, shuffle_buffer=64), encode)
    seen = []
    with pytest.raises(RecipeError, match=r"max_epochs: the source has run out: .* 2 time"):
        seen.extend(tokens(short.step(step)) for step in itertools.count())
    count = int((torch.cat(seen) == encode.eos_token_id).sum())
    assert 600 - 16 < count <= 600, "all but what does not fill the last step"


def test_shuffling_changes_no_prepared_folder_and_needs_a_stream(folder):
    recipe = make_recipe(folder)
    with pytest.raises(ValueError, match="`shuffle_buffer` is only for `streaming`"):
        make_recipe(folder, data__shuffle_buffer=10)
    streaming = {"data__streaming": True, "data__validation_fraction": 0.0, "tokenizer": {"pretrained": "gpt2"}}
    names = {
        fingerprint(made.data, made.tokenizer, [])
        for made in (make_recipe(folder, **streaming), make_recipe(folder, **streaming, data__shuffle_buffer=10))
    }
    assert len(names) == 1 and fingerprint(recipe.data, recipe.tokenizer, []) not in names
    assert not any("data.shuffle_buffer".startswith(key) for key in CHANGEABLE_ON_RESUME)


def test_a_checkpoint_without_a_shuffle_buffer_is_read(tmp_path):
    content = {"step": 5, (0, 0): {"epoch": 1, "piece": 2, "document": 3, "pending": torch.arange(4)}}
    torch.save(content, tmp_path / "data-0.pt")
    states, next_step = load_lane_states(tmp_path)
    assert next_step == 5 and states[0, 0] == LaneState(1, 2, 3, 0, states[0, 0].pending)


def test_reading_ahead_keeps_the_order_and_its_limit():
    pools = {"readers": DaemonPool(1, "read"), "workers": DaemonPool(4, "work")}
    begun, release = [], threading.Event()

    def items():
        for number in range(100):
            begun.append(number)
            yield number
        raise ValueError("broken")

    def work(number):
        release.wait(10)
        time.sleep(0.001 * (number % 5))
        return number * 2

    ahead = ReadAhead(items(), work, size=lambda _: 10, limit=60, **pools)
    ahead.start()
    deadline = time.monotonic() + 10
    while len(begun) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert begun == list(range(6)), "reading pauses at the limit"
    release.set()
    assert [next(ahead) for _ in range(100)] == [2 * number for number in range(100)]
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            next(ahead)


class StalledFile(io.RawIOBase):
    """A read after `reads_until` bytes does not return, as if a disk or a server no longer answered."""

    answers = threading.Event()

    def __init__(self, content, reads_until):
        self._file, self._end = io.BytesIO(content), reads_until

    def readable(self):
        return True

    def readinto(self, buffer):
        size = min(len(buffer), self._end - self._file.tell())
        if size == 0:
            self.answers.wait()  # at the end of the test
        return self._file.readinto(memoryview(buffer)[:size])

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()


class StallingFileSystem(MemoryFileSystem):
    """Files of which only the first half can be read."""

    protocol = "stalling"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("stalling://", "memory://"))

    def open(self, path, mode="rb", **keywords):
        if "r" not in mode:
            return super().open(path, mode, **keywords)
        content = self.cat(path)
        return StalledFile(content, len(content) // 2)


@pytest.fixture
def stalling(files):
    fsspec.register_implementation("stalling", StallingFileSystem, clobber=True)
    filesystem = fsspec.filesystem("stalling")
    with filesystem.open("/0.jsonl", "wb") as file:
        file.write((files / "0.jsonl").read_bytes())
    source = {"path": "json", "data_files": "stalling://0.jsonl"}
    yield DataSection(sources=[source], block_size=32, streaming=True)
    StalledFile.answers.set()


def test_a_stalled_source_gives_what_it_has_and_never_blocks_a_stop(stalling, encode, monkeypatch):
    monkeypatch.setattr(batches, "STOP_WAIT_SECONDS", 0.3)
    monkeypatch.setattr("hfpretrain.data.streaming._BATCH_CHARS", 1500)
    data = stream(stalling, encode)
    prefetcher = Prefetcher(data.step, range(10_000), pin_memory=False)
    start, stopped, count = time.monotonic(), threading.Event(), 0
    threading.Timer(2, stopped.set).start()
    while prefetcher.next(stopped.is_set) is not None:
        count += 1
    prefetcher.close()
    assert time.monotonic() - start < 20 and 3 < count < 50


def run_ranks(target, *arguments, number=3):
    """Call `target(rank, number, *arguments)` in each process of a gloo group, and return the results by rank."""
    context = multiprocessing.get_context("fork")
    results, store = context.Queue(), Path(arguments[0]) / "store"

    def run(rank):
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=number)
        results.put((rank, target(rank, number, *arguments)))
        results.close()
        results.join_thread()
        os._exit(0)

    ranks = [context.Process(target=run, args=(rank,)) for rank in range(number)]
    for rank in ranks:
        rank.start()
    try:
        return [found for _, found in sorted(results.get(timeout=120) for _ in ranks)]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def exchange_rows(rank, number, folder):
    exchange = RowExchange(torch.distributed.new_group(backend="gloo"), processes_per_sequence=2)
    part, found = rank // 2, []
    for step in range(3):
        # Part 0 sends two numbers to part 1 and one to itself; part 1 sends one to each.
        outgoing = [np.full(1 + (part == 0) * to, 100 * step + 10 * part + to, np.int32) for to in range(2)]
        sizes = [1 + part, 1]
        if rank % 2:
            outgoing = [np.zeros(0, np.int32)] * 2
        exchange.begin(step)
        found.append([one.tolist() for one in exchange(outgoing, sizes)])
    if rank == 3:
        exchange.leave()
        return found
    with pytest.raises(ReadingEndedError):
        exchange.begin(3)
    return found


def test_rows_are_exchanged_between_processes(tmp_path):
    found = run_ranks(exchange_rows, tmp_path, number=4)
    for rank, steps in enumerate(found):
        part = rank // 2
        assert steps == [[[100 * step + part] * (1 + part), [100 * step + 10 + part]] for step in range(3)]


def close_in_the_middle(rank, number, folder, data, encode):
    one = stream(data, encode, number, rank)
    one.join(RowExchange(torch.distributed.new_group(backend="gloo"), 1), swaps=True)
    prefetcher = Prefetcher(one.step, range(1000), pin_memory=False, leave=one.leave)
    found = [prefetcher.next().checksum for _ in range(5)]
    time.sleep(0.2 * rank)  # all ranks stop after the same step, but not at the same time
    start = time.monotonic()
    prefetcher.close()
    return found, time.monotonic() - start, prefetcher._thread.is_alive()


def test_all_processes_stop_reading_although_some_are_ahead(files, encode, tmp_path):
    alone = stream(section(files), encode)
    expected = [alone.step(step).checksum for step in range(5)]
    found = run_ranks(close_in_the_middle, tmp_path, section(files), encode, number=4)
    assert [sum(checksums) % 2**64 for checksums in zip(*(one[0] for one in found), strict=True)] == expected
    assert not any(is_alive for *_, is_alive in found)


class StallingHandler(BaseHTTPRequestHandler):
    """Sends the first half of `content`, and then nothing any more."""

    content = b""

    def do_HEAD(self):
        self.send_response(200)
        for name, value in (("Content-Length", len(self.content)), ("ETag", '"1"'), ("Accept-Ranges", "none")):
            self.send_header(name, str(value))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        with contextlib.suppress(OSError):
            self.wfile.write(self.content[: len(self.content) // 2])
            self.wfile.flush()
            time.sleep(600)

    def log_message(self, *_):
        pass


@pytest.fixture
def stalling_server(files):
    handler = type("Handler", (StallingHandler,), {"content": (files / "8.jsonl").read_bytes()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/8.jsonl"
    server.shutdown()


def end_after(rank, number, folder, data, encode):
    exchange = RowExchange(torch.distributed.new_group(backend="gloo"), 1)
    one = stream(data, encode, number, rank)
    one.join(exchange, swaps=True)
    prefetcher = Prefetcher(one.step, range(1000), pin_memory=False, leave=one.leave)
    found = [prefetcher.next().checksum for _ in range(3)]
    last = exchange.end() if rank == 0 else None
    while (data := prefetcher.next(lambda: not prefetcher._thread.is_alive(), at_once=True)) is not None:
        found.append(data.checksum)
    return len(found), last


def test_all_processes_get_the_same_last_step_when_rank_0_ends_the_reading(files, encode, tmp_path):
    (count, last), *others = run_ranks(end_after, tmp_path, section(files), encode, number=4)
    assert last is not None and count == last + 1 >= 3 and {found for found, _ in others} == {count}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "rank", "number"),
    [
        ("single", None, signal.SIGTERM),
        ("ddp", None, signal.SIGTERM),  # the launcher sends it to all ranks
        ("ddp", 0, signal.SIGUSR1),
        ("fsdp2", 1, signal.SIGUSR1),
    ],
)
def test_a_run_whose_source_stalls_saves_and_stops_at_a_signal(
    tmp_path, files, encode, stalling_server, engine, rank, number
):
    encode._tokenizer.save_pretrained(tmp_path / "tokenizer")
    sources = [{"path": "json", "data_files": stalling_server}]
    if rank is not None:  # each rank reads a source, and only that of one rank stalls
        sources.append({"path": "json", "data_files": str(files / "8.jsonl")})
    if rank == 0:  # in a mixture, both ranks train on both sources
        sources = [{**source, "weight": 0.5} for source in sources]
    recipe = write_recipe(
        tmp_path,
        tokenizer={"pretrained": str(tmp_path / "tokenizer")},
        data__sources=sources,
        data__validation_fraction=0.0,
        data__streaming=True,
        training__max_steps=100_000,
        checkpoint__every_steps=100_000,
    )
    code = tmp_path / "code"
    process = subprocess.Popen(
        small.command(recipe, engine=engine),
        env=environment(HFPRETRAIN_EXIT_CODE_FILE=str(code)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    steps = -1
    while not (tmp_path / "run" / "metrics.jsonl").exists() or steps != len(rows(tmp_path / "run", "loss")):
        assert process.poll() is None, process.stderr.read()
        steps = len(rows(tmp_path / "run", "loss")) if (tmp_path / "run" / "metrics.jsonl").exists() else -1
        time.sleep(3)  # until no step comes any more
    ranks = {one.environ().get("RANK"): one for one in psutil.Process(process.pid).children()}
    (process if rank is None else ranks[str(rank)]).send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert code.read_text() == "75\n", stderr
    assert steps > 1 and f"stopped by {number.name if rank != 1 else 'another rank'} at step" in stderr, stderr
    if rank is not None:
        assert ("on 2 of 2 processes" in stderr) and ("reads 2 groups of files side by side" in stderr), stderr
    assert stderr.count("Traceback") == (engine != "single"), stderr  # of torch's launcher
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    saved = int(path.name.removeprefix("step-"))
    assert saved >= steps  # on a busy machine, steps may still have come
    assert saved == max(rows(tmp_path / "run", "loss"))
