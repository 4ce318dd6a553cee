"""Streaming from the sources gives the same text on any number of processes, and exactly resumes."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import environment, rows, small_text, train, write_jsonl, write_recipe
from hub_server import HubServer, Repo
from preparation import stream, tokens
from warm import WarmProcess

from hfpretrain.data import corpus
from hfpretrain.data.encode import Encoder
from hfpretrain.data.streaming import LaneState
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.files import damage, seal
from hfpretrain.recipe.schema import DataSection, RecipeError, TokenizerSection

TEXTS = small_text(400)


@pytest.fixture(scope="module")
def encode():
    tokenizer = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), TEXTS)
    return Encoder(tokenizer, np.dtype(np.uint16))


@pytest.fixture
def files(tmp_path):
    for number in range(8):
        write_jsonl(tmp_path / f"{number}.jsonl", TEXTS[50 * number : 50 * number + 50])
    return tmp_path


def section(folder, **keywords):
    keywords.setdefault("sources", [{"path": "json", "data_files": str(folder / "*.jsonl")}])
    return DataSection(**keywords, block_size=32, streaming=True)


def mixture(folder):
    return [
        {"path": "json", "data_files": [str(folder / f"{n}.jsonl") for n in (0, 1)], "weight": 0.25},
        {"path": "json", "data_files": [str(folder / f"{n}.jsonl") for n in range(2, 8)], "weight": 0.75},
    ]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_has_the_same_sequences_on_any_number_of_processes(files, encode, mixed):
    data = section(files, **({"sources": mixture(files)} if mixed else {}))
    alone = stream(data, encode)
    expected = [alone.step(step) for step in range(40)]
    for num_processes in (2, 4, 8):
        ranks = [stream(data, encode, num_processes, index) for index in range(num_processes)]
        for step in range(40):
            parts = [rank.step(step) for rank in ranks]
            assert torch.equal(torch.cat([tokens(part) for part in parts]), tokens(expected[step]))
            assert sum(part.checksum for part in parts) % 2**64 == expected[step].checksum
    if mixed:
        share = sum(step.tokens for step in expected)
        assert abs(share[0] / share.sum() - 0.25) < 0.01


@pytest.fixture
def files_read(monkeypatch, tmp_path):
    """Names of this test's files that were read. Threads of an earlier test may still read that test's files."""
    names, read = set(), corpus.Reader.read

    def record(self, pieces=None):
        pieces = list(range(len(self.pieces)) if pieces is None else pieces)
        origins = (self.pieces[index].origin for index in pieces)
        names.update(origin for origin in origins if origin.startswith(str(tmp_path)))
        return read(self, pieces)

    monkeypatch.setattr(corpus.Reader, "read", record)
    return names


def test_processes_read_only_the_files_of_their_sequences(files, encode, files_read):
    folders = [files / f"rank{index}" for index in range(4)]  # the same files, to see which process reads them
    for folder in folders:
        folder.symlink_to(files)
    ranks = [stream(section(folder), encode, 4, index) for index, folder in enumerate(folders)]
    files_read.clear()  # before, each rank reads a little of all files to assign lanes
    for rank in ranks:
        rank.step(0)
    read = [{Path(name).name for name in list(files_read) if Path(name).parent == folder} for folder in folders]
    assert all(len(names) == 2 for names in read) and len(set.union(*read)) == 8


def test_files_of_different_sizes_make_one_lane_and_an_empty_file_is_no_error(files, encode):
    write_jsonl(files / "0.jsonl", ["one word"])
    (files / "1.jsonl").write_text("")
    alone = stream(section(files), encode)
    assert len(alone.step(0).state) == 1
    alone = stream(section(files), encode)
    flat = torch.cat([tokens(alone.step(step)) for step in range(20)]).reshape(-1).numpy()
    whole = np.concatenate(encode(["one word", *TEXTS[100:]]))
    assert np.array_equal(flat[: len(whole)], whole[: len(flat)])


def test_one_epoch_has_every_document_once(files, encode):
    data = section(files)
    alone, seen = stream(data, encode), []
    while not seen or all(lane.epoch == 0 for lane in seen[-1].state.values()):
        seen.append(alone.step(len(seen)))
    count = sum(int((tokens(step) == encode.eos_token_id).sum()) for step in seen[:-1])
    assert 0.8 * len(TEXTS) < count <= len(TEXTS)
    flat = torch.cat([tokens(step) for step in seen[:-1]]).reshape(-1, 8, 2, 32)
    # The sequences of a lane, in the order of the steps, are the text of its file.
    whole = encode(TEXTS[:50])
    first = flat[:, 0].reshape(-1).numpy()
    assert np.array_equal(first[: len(np.concatenate(whole))][: len(first)], np.concatenate(whole)[: len(first)])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_stream_resumes_with_another_number_of_processes(files, encode, mixed):
    data = section(files, **({"sources": mixture(files)} if mixed else {}))
    alone = stream(data, encode)
    expected = [tokens(alone.step(step)) for step in range(60)]
    for stopped in (1, 17, 40):  # in the first file, in a later one, in another epoch
        ranks = [stream(data, encode, 2, index) for index in range(2)]
        states = {}
        for step in range(stopped):
            states = {key: state for rank in ranks for key, state in rank.step(step).state.items()}
        resumed = [stream(data, encode, 4, index, stopped, states) for index in range(4)]
        for step in range(stopped, stopped + 10):
            assert torch.equal(torch.cat([tokens(rank.step(step)) for rank in resumed]), expected[step])


def test_validation_documents_and_bad_ones_are_left_out_and_counted(files, encode):
    held_out = write_jsonl(files / "held_out.json", TEXTS[:10])
    with (files / "0.jsonl").open("a") as file:
        file.write("not json\n")
    sources = [{"path": "json", "data_files": str(files / "0.jsonl")}]
    data = section(
        files,
        sources=sources,
        validation_sources=[{"path": "json", "data_files": str(held_out)}],
        on_bad_document="skip",
    )
    only = stream(data, encode, held_out=corpus.held_out_digests(data))
    found = tokens(first := only.step(0)).reshape(-1).tolist()
    expected = np.concatenate(encode(TEXTS[10:50]))[: len(found)].tolist()
    assert found == expected and first.documents_dropped == 11


def test_a_stream_that_runs_out_or_is_empty_is_an_error(files, encode):
    sources = [{"path": "json", "data_files": str(files / "0.jsonl"), "max_epochs": 2}]
    short = stream(section(files, sources=sources), encode)
    with pytest.raises(RecipeError, match=r"data.sources.0.max_epochs: the source has run out: .* 2 time"):
        for step in range(1000):
            short.step(step)
    (files / "0.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(RecipeError, match="the corpus is empty"):
        stream(section(files, sources=sources), encode).step(0)


def flat(data, steps):
    return torch.cat([tokens(data.step(step)) for step in range(steps)]).reshape(-1)


def test_files_without_a_document_to_train_on_are_left_out(files, encode, caplog, files_read):
    held_out = write_jsonl(files / "held_out.json", TEXTS[350:])  # all of 7.jsonl
    data = section(files, validation_sources=[{"path": "json", "data_files": str(held_out)}])
    digests = corpus.held_out_digests(data)
    with caplog.at_level("INFO", "hfpretrain"):
        alone = stream(data, encode, held_out=digests)
    assert "7.jsonl" in caplog.text and "0.jsonl" not in caplog.text
    files_read.clear()
    expected = [alone.step(step) for step in range(80)]  # more than an epoch
    assert sorted(files_read) == [str(files / f"{n}.jsonl") for n in range(7)]
    ranks = [stream(data, encode, 2, index, held_out=digests) for index in range(2)]
    for step in range(20):
        parts = [tokens(rank.step(step)) for rank in ranks]
        assert torch.equal(torch.cat(parts), tokens(expected[step]))
    states = {key: state for rank in ranks for key, state in rank.step(20).state.items()}
    resumed = stream(data, encode, first_step=21, states=states, held_out=digests)
    assert torch.equal(tokens(resumed.step(21)), torch.cat([tokens(rank.step(21)) for rank in ranks]))


def compressed(path, text, size):
    """A file of about `size` bytes on the disk, whose text is much longer if `text` compresses well."""
    lines = b""
    while len(gzip.compress(lines)) < size:
        lines += b"".join(json.dumps({"text": next(text)}).encode() + b"\n" for _ in range(20))
    path.write_bytes(gzip.compress(lines))
    return len(lines)


def test_sizes_of_files_are_compared_uncompressed(tmp_path, encode):
    draw = np.random.default_rng(0)
    noise = ("".join(map(chr, draw.integers(97, 123, 400))) for _ in itertools.count())
    same = (f"{number} " + "the same words again and again " * 40 for number in itertools.count())
    sizes = [compressed(tmp_path / f"{n}.jsonl.gz", text, 6000) for n, text in enumerate((noise, same))]
    assert sizes[1] > 5 * sizes[0]
    source = {"path": "json", "data_files": str(tmp_path / "*.jsonl.gz")}
    data = section(tmp_path, sources=[source])
    alone = stream(data, encode)
    whole = np.concatenate(encode(list(corpus.training_documents(data))))
    found = flat(alone, -(-len(whole) // (16 * 32))).numpy()
    assert np.array_equal(found[: len(whole)], whole), "every document comes once before any comes again"
    # A run that began with a version that compared compressed sizes continues with the same lanes.
    begun = stream(data, encode, states={(0, 0): LaneState(), (0, 1): LaneState()})
    assert len(begun.step(0).state) == 2
    reader = corpus.Reader(data.sources[0])
    assert [reader.text_size(index) for index in range(2)] == sizes
    pandas.DataFrame({"text": TEXTS, "id": range(len(TEXTS))}).to_parquet(tmp_path / "a.parquet")
    column = corpus.Reader(corpus.SourceSection(path="parquet", data_files=str(tmp_path / "a.parquet"))).text_size(0)
    assert 0.5 < column / sum(map(len, TEXTS)) < 1.5


def test_a_source_with_max_epochs_ends_when_all_is_read(files, encode):
    write_jsonl(files / "0.jsonl", TEXTS[:35])
    source = {"path": "json", "data_files": str(files / "*.jsonl"), "max_epochs": 1}
    short = stream(section(files, sources=[source]), encode)
    seen = []
    with pytest.raises(RecipeError, match=r"max_epochs: the source has run out: .* 1 time"):
        seen += (int((tokens(short.step(step)) == encode.eos_token_id).sum()) for step in itertools.count())
    assert 0.9 * (len(TEXTS) - 15) < sum(seen) <= len(TEXTS) - 15


@pytest.fixture(scope="module")
def hub_run(tmp_path_factory):
    """A recipe that streams from a Hub on localhost, and the environment to reach it."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), TEXTS)
    tokenizer.save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "held_out.jsonl", small_text(20, seed=9))
    data = Repo("user/data", private=False)
    paths = [write_jsonl(folder / f"train-{n}.jsonl", TEXTS[100 * n : 100 * n + 100]) for n in range(4)]
    data.commit("main", "data", {f"data/{path.name}": path.read_bytes() for path in paths})
    with HubServer() as hub:
        hub.repos["datasets/user/data"] = data
        env = {**environment(), **hub.environment(folder / "home")}
        recipe = write_recipe(
            folder,
            tokenizer={"pretrained": str(folder / "tokenizer")},
            data__sources=[{"path": "user/data"}],
            data__validation_sources=[{"path": "json", "data_files": str(folder / "held_out.jsonl")}],
            data__validation_fraction=0.0,
            data__streaming=True,
            checkpoint__every_steps=4,
        )
        yield (
            folder,
            recipe,
            {name: value for name, value in env.items() if name not in environment()} | {"HF_HUB_OFFLINE": "0"},
        )


def test_a_hub_dataset_is_streamed(hub_run):
    folder, recipe, env = hub_run
    with WarmProcess(environment(**env)) as warm:
        result = warm.run("hfpretrain.train", recipe, "--training.max_steps=3", f"--output_dir={folder / 'short'}")
    assert result.returncode == 0, result.stderr
    assert rows(folder / "short", "ledger")[3]["source_tokens"] == [3 * 256]


@pytest.mark.slow
def test_a_hub_dataset_is_streamed_by_two_processes_and_resumed(hub_run):
    folder, recipe, env = hub_run
    result = train(recipe, **env)
    assert result.returncode == 0, result.stderr
    straight = rows(folder / "run", "ledger")
    assert list(rows(folder / "run", "eval/loss")) == [0, 8]
    assert straight[8]["source_tokens"] == [8 * 256] and straight[8]["documents_dropped"] == 0
    manifests = list((folder / "prepared").glob("*/manifest.json"))
    assert [list(json.loads(m.read_text())["splits"]) for m in manifests] == [["validation"]]
    two = folder / "two"
    result = train(recipe, f"--output_dir={two}", engine="ddp", **env)
    assert result.returncode == 0, result.stderr
    for step, row in rows(two, "ledger").items():
        assert row["ledger"] == straight[step]["ledger"]
        assert row["loss"] == pytest.approx(straight[step]["loss"], rel=1e-5)
    # One process continues the run of two.
    last = two / "checkpoints" / "step-00000008"
    last.rename(folder / "aside")
    result = train(recipe, f"--output_dir={two}", **env)
    assert result.returncode == 0 and "resumed from" in result.stderr, result.stderr
    assert rows(two, "ledger")[8]["ledger"] == straight[8]["ledger"]
    assert rows(two, "loss")[8]["loss"] == pytest.approx(straight[8]["loss"], rel=1e-5)


@pytest.fixture
def local(files, encode, tmp_path):
    """A recipe that streams eight files, without validation."""
    train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), TEXTS).save_pretrained(
        files / "tokenizer"
    )
    return lambda **changes: write_recipe(
        files,
        tokenizer={"pretrained": str(files / "tokenizer")},
        data__sources=changes.pop("data__sources", None)
        or [{"path": "json", "data_files": str(files / "[0-9].jsonl"), **changes.pop("source", {})}],
        data__validation_fraction=0.0,
        data__streaming=True,
        **changes,
    )


def test_a_stream_without_validation_is_trained_to_its_very_end(files, local, encode):
    count = sum(len(ids) for ids in encode(TEXTS[:50])) // 32
    recipe = local(source={"data_files": str(files / "0.jsonl"), "max_epochs": 1})
    arguments = ["--training.tokens_per_step=32", "--training.micro_batch_size=1", f"--training.max_steps={count}"]
    result = train(recipe, *arguments)
    assert result.returncode == 0, result.stderr
    assert (files / "run" / "model" / "README.md").exists() and "streamed from" in (
        files / "run" / "model" / "README.md"
    ).read_text()
    result = train(recipe, *arguments[:2], f"--training.max_steps={count + 1}", f"--output_dir={files / 'more'}")
    assert result.returncode == 2 and "max_epochs: the source has run out" in result.stderr


def test_a_checkpoint_of_the_first_version_is_refused_with_that_version(files, local):
    recipe = local()
    assert train(recipe, "--training.max_steps=3").returncode == 0
    path = max((files / "run" / "checkpoints").iterdir())
    work = path.rename(path.with_name("work"))
    state = json.loads((work / "train_state.json").read_text())
    del state["segments"]
    (work / "train_state.json").write_text(json.dumps(state | {"data": "another"}))
    (work / "manifest.json").unlink()
    seal(work, path, {"step": 3})
    result = train(recipe, "--training.max_steps=4")
    assert result.returncode == 2 and "checkpoint of hfpretrain 0.1.0" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("engine", "number", "is_mixture"),
    [
        ("ddp", 7, False),
        ("single", 7, True),
        *(pytest.param("ddp", *case, marks=pytest.mark.slow) for case in ((0, False), (0, True), (7, True))),
        pytest.param("single", 7, False, marks=pytest.mark.slow),
    ],
)
def test_an_error_in_the_text_of_one_process_ends_all_with_its_message_and_saves(
    files, local, engine, number, is_mixture
):
    for n in range(8):  # so long that steps are trained before the error, which is near the end of a file
        write_jsonl(files / f"{n}.jsonl", small_text(200, seed=n))
    with (files / f"{number}.jsonl").open("a") as file:
        file.write("{bad\n")
    sources = [{"path": "json", "data_files": str(files / f"{n}.jsonl"), "weight": 0.5} for n in (0, 7)]
    recipe = local(**({"data__sources": sources} if is_mixture else {}))
    arguments = [recipe, "--training.tokens_per_step=2048", "--training.micro_batch_size=32"]
    arguments += ["--training.max_steps=200", "--checkpoint.every_steps=1000"]
    result = train(*arguments, engine=engine)
    assert result.returncode == 2 and f"{number}.jsonl:201: broken JSON" in result.stderr, result.stderr
    (path,) = (files / "run" / "checkpoints").glob("step-*")
    saved = int(path.name.removeprefix("step-"))
    assert damage(path) is None and 1 < saved == max(rows(files / "run", "loss")), result.stderr
    again = train(*arguments, engine=engine)
    assert again.returncode == 2 and f"{number}.jsonl:201: broken JSON" in again.stderr, again.stderr
    assert max(rows(files / "run", "loss")) == saved
    assert "the run ends on all ranks" not in result.stderr, "the message of a program's error, not of a user's"
