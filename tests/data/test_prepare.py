"""Preparation from sources to folder: interrupted, divided into shards, remote, and with bad documents."""

import gzip
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import psutil
import pytest
from conftest import ROOT, environment, hfpretrain, script, small_text, started_module, write_jsonl, write_recipe
from preparation import checksums, recipe

from hfpretrain import files
from hfpretrain.data import encode as encoding
from hfpretrain.data import packing, prepared, tokenizer
from hfpretrain.data.batches import collate, training_data
from hfpretrain.data.inspection import sequences_of_step
from hfpretrain.data.prepare import load_prepared_tokenizer, prepare, prepare_shard, prepared_path, wait_for_prepared
from hfpretrain.data.processes import run_shards
from hfpretrain.data.summary import summary
from hfpretrain.recipe.schema import RecipeError, TokenizerSection

# Small parts and batches, so that a small corpus has as many as a large one.
SMALL = (
    "import hfpretrain.data.packing as p; p.PART_CHARS = 20_000; p.BATCH_CHARS = 4_000; p.prepared.ROWS_PER_BATCH = 8"
)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(packing, "PART_CHARS", 20_000)
    monkeypatch.setattr(packing, "BATCH_CHARS", 4_000)
    monkeypatch.setattr(prepared, "ROWS_PER_BATCH", 8)


@pytest.mark.parametrize(
    ("rows", "packed"),
    [
        ([[5, 6, 7, 8], [5, 6, 7, 0]], False),  # documents that end where the block ends
        ([[5, 6, 7, 8], [5, 0, 0, 0]], False),  # padding is also EOS
        ([[5, 6, 7, 8], [5, 0, 6, 7]], True),
    ],
)
def test_packs_documents_finds_blocks_with_several_documents(rows, packed, tmp_path):
    class Rows(prepared.PreparedData):
        def blocks(self, split):
            return [np.array(rows, dtype=np.uint16)]

    assert Rows(tmp_path, {"splits": {"train-0": {}}, "eos_token_id": 0}).packs_documents() == packed


def test_a_killed_preparation_resumes_and_ends_with_the_same_bytes(folder, small_parts):
    write_jsonl(folder / "corpus.jsonl", small_text(1500))
    straight = prepare(recipe(folder, data__prepared_dir=str(folder / "straight")))
    expected = checksums(straight.path)
    assert sum("train-0/data" in name for name in expected) > 20
    interrupted = recipe(folder)
    # Slow down the end of each part a little, so that kills are likely to hit it.
    program = (
        f"{SMALL}; import sys, time; entries = p.files.checksum_entries\n"
        "def slow(folder, paths):\n    time.sleep(0.03); return entries(folder, paths)\n"
        "p.files.checksum_entries = slow\n"
        "from hfpretrain.data.prepare import prepare; from hfpretrain import load_recipe\n"
        "prepare(load_recipe(sys.argv[1]))"
    )
    path, work = prepared_path(interrupted), prepared_path(interrupted).with_suffix(files.INCOMPLETE)
    (folder / "slow.py").write_text(program)
    with started_module(folder / "slow.py", write_recipe(folder)) as (process, stderr):
        while len(list((work / "parts").glob("*.json"))) < 4:
            assert process.is_alive(), stderr()
            time.sleep(0.002)
    assert not path.exists()
    before = {file.name: file.stat().st_mtime_ns for file in (work / "parts").glob("*.json")}
    assert 4 <= len(before) < 20
    resumed = prepare(interrupted)
    assert checksums(resumed.path) == expected
    after = {name: (resumed.path / "parts" / name).stat().st_mtime_ns for name in before}
    assert after == before, "a finished part was done again"


@pytest.mark.slow
def test_a_preparation_survives_ten_kills_at_random_moments(folder, small_parts):
    """Kills also while the tokenizer is trained, between the files of a part, and while assembling."""
    write_jsonl(folder / "corpus.jsonl", small_text(4000))
    changes = {"data__deduplicate": True, "data__packing": "best_fit", "tokenizer__vocab_size": 2000}
    expected = checksums(prepare(recipe(folder, **changes, data__prepared_dir=str(folder / "straight"))).path)
    program = (
        f"{SMALL}; import sys, time; entries = p.files.checksum_entries\n"
        "def slow(folder, paths):\n    time.sleep(0.2); return entries(folder, paths)\n"
        "p.files.checksum_entries = slow\n"
        "from hfpretrain.data.prepare import prepare; from hfpretrain import load_recipe\n"
        "prepare(load_recipe(sys.argv[1]))"
    )
    path = str(write_recipe(folder, **changes))
    work = prepared_path(recipe(folder, **changes)).with_suffix(files.INCOMPLETE)
    draw = random.Random(1)
    for kill in range(10):
        process = subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT, env=environment())
        # The first kills come early, during imports, the search for duplicates, and tokenizer training.
        time.sleep(draw.uniform(0.5, 2.0) if kill < 3 else draw.uniform(2.5, 4.0))
        assert process.poll() is None, "the preparation ended before the kills did"
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {kill + 1}: {len(list((work / 'parts').glob('*.json')))} parts done")
    resumed = prepare(recipe(folder, **changes))
    assert checksums(resumed.path) == expected
    print(f"{len(expected)} checksums equal")


def test_shards_of_several_machines_give_the_same_bytes(folder, small_parts, capsys):
    expected = checksums(prepare(recipe(folder, data__prepared_dir=str(folder / "straight"))).path)
    shared = recipe(folder)
    prepare_shard(shared, 1, 3)
    parts = prepared_path(shared).with_suffix(files.INCOMPLETE) / "parts"
    second = len(list(parts.glob("*.json")))
    prepare_shard(shared, 0, 3)
    assert 0 < second < len(list(parts.glob("*.json")))
    prepare_shard(shared, 2, 3)
    inodes = {file.name: file.stat().st_ino for file in parts.parent.glob("train-0/*.arrow")}
    joined = prepare(shared)
    assert checksums(joined.path) == expected
    assert inodes.items() <= {f.name: f.stat().st_ino for f in joined.path.glob("train-0/*.arrow")}.items()
    prepared.verify(joined.path)


def test_shards_made_from_other_inputs_are_refused_before_work(folder, monkeypatch, caplog):
    machines = {}
    for name in ("a", "b"):
        (folder / name).mkdir()
        write_jsonl(folder / name / "corpus.jsonl", small_text(60))
        machines[name] = folder / name
    shared = recipe(
        folder,
        data__sources=[{"path": "json", "data_files": "corpus.jsonl"}],
        data__prepared_dir=str(folder / "prepared"),
    )
    monkeypatch.chdir(machines["a"])
    prepare_shard(shared, 0, 2)
    with pytest.raises(RecipeError, match=r"--shard: .*3 shards"):
        prepare_shard(shared, 1, 3)
    monkeypatch.chdir(machines["b"])
    prepare_module = importlib.import_module("hfpretrain.data.prepare")
    version = prepare_module.version
    monkeypatch.setattr(prepare_module, "version", lambda name: "0.1" if name == "tokenizers" else version(name))
    with pytest.raises(RecipeError, match=r"tokenizers: is 0\.1 on this machine"):
        prepare_shard(shared, 1, 2)
    monkeypatch.setattr(prepare_module, "version", version)
    text = (machines["b"] / "corpus.jsonl").read_text()
    (machines["b"] / "corpus.jsonl").write_text(text.replace("river", "RIVER", 1))
    with pytest.raises(RecipeError, match=r"data\.sources\.0: .*'corpus\.jsonl'.* other"):
        prepare_shard(shared, 1, 2)
    prepare(shared)  # only from the text of this machine, with a warning
    assert "shard 1 of 2" in caplog.text and "other data" in caplog.text
    (machines["b"] / "corpus.jsonl").write_text(text)
    path = prepare_shard(shared, 1, 2)
    assert prepare(shared).path == path and len(list(path.parent.glob("shares-*"))) == 0


def test_shards_of_many_files_get_whole_groups(folder, monkeypatch):
    from hfpretrain.data import corpus

    monkeypatch.setattr(corpus, "GROUP_BYTES", 1)
    texts = small_text(60)
    for number in range(6):
        write_jsonl(folder / f"part-{number}.jsonl", texts[10 * number : 10 * number + 10])
    sources = [{"path": "json", "data_files": str(folder / "part-*.jsonl")}]
    several = recipe(folder, data__sources=sources)
    prepare_shard(several, 0, 2)
    parts = prepared_path(several).with_suffix(files.INCOMPLETE) / "parts"
    assert sorted(file.stem for file in parts.iterdir()) == [f"0-0000{n}-00000" for n in (0, 2, 4)]
    whole = prepare(several)
    assert whole.manifest["sources"][0]["documents_read"] == 60
    prepared.verify(whole.path)


def test_the_command_makes_shards_and_joins_them(folder):
    path = str(write_recipe(folder))
    for shard in ("1/2", "2/2"):
        result = hfpretrain("prepare", path, "--shard", shard)
        assert result.returncode == 0 and "without --shard" in result.stdout, result.stderr
    result = hfpretrain("prepare", path, "--num-workers", "1")
    assert result.returncode == 0 and "separators" in result.stdout
    assert hfpretrain("verify", result.stdout.split()[2]).returncode == 0
    assert "--shard: " in hfpretrain("prepare", path, "--shard", "3/2").stderr


def test_processes_of_one_machine_give_the_same_bytes(folder):
    expected = checksums(prepare(recipe(folder, data__prepared_dir=str(folder / "straight"))).path)
    path = str(write_recipe(folder))
    result = hfpretrain("prepare", path, "--num-processes", "2")
    assert result.returncode == 0 and "separators" in result.stdout, result.stderr
    assert "[1/2] tokenizing" in result.stderr and "[2/2] tokenizing" in result.stderr
    assert result.stderr.count("training the tokenizer") == 1
    assert checksums(Path(result.stdout.split()[2])) == expected
    with (folder / "corpus.jsonl").open("a") as file:
        file.write("no JSON\n")
    broken = hfpretrain("prepare", path, "--num-processes", "2")
    assert broken.returncode == 2 and "corpus.jsonl:201: broken JSON" in broken.stderr, broken.stderr
    assert "--num-processes: " in hfpretrain("prepare", path, "--num-processes", "2", "--shard", "1/2").stderr


def test_a_preparation_continues_with_another_number_of_processes(folder):
    expected = checksums(prepare(recipe(folder, data__prepared_dir=str(folder / "straight"))).path)
    shared = recipe(folder)
    prepare_shard(shared, 0, 3)  # the other two were killed
    result = hfpretrain("prepare", str(write_recipe(folder)), "--num-processes", "2")
    assert result.returncode == 0, result.stderr
    assert checksums(prepared_path(shared)) == expected


def test_the_same_error_of_several_processes_is_printed_once(capfd):
    fails = "import sys, time; time.sleep(0.5); sys.exit('starting\\nerror:\\n  data.sources.0: a.bin is truncated')"
    with pytest.raises(RecipeError, match="--num-processes: the process of shard"):
        run_shards([sys.executable, "-c", fails], 2)
    text = capfd.readouterr().err
    assert text.count("error:") == 1 and text.count("a.bin is truncated") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(tmp_path, number):
    script = tmp_path / "shards.py"
    script.write_text(
        "import sys; from hfpretrain.data.processes import run_shards; "
        "run_shards([sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(100)'], 2)"
    )
    process = subprocess.Popen([sys.executable, script], env=environment(PYTHONPATH=str(ROOT)))
    shards = []
    while len(shards) < 2:
        time.sleep(0.1)
        shards = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert process.wait(30) == -number
    assert not psutil.wait_procs(shards, timeout=30)[1]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_part_whose_file_changed_is_made_again(folder, small_parts, damage):
    expected = checksums(prepare(recipe(folder, data__prepared_dir=str(folder / "straight"))).path)
    shared = recipe(folder)
    prepare_shard(shared, 0, 1)
    work = prepared_path(shared).with_suffix(files.INCOMPLETE)
    victim = sorted(work.glob("train-0/*.arrow"))[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content if damage == "flipped" else content[:-300])
    if damage == "gone":
        victim.unlink()
    with pytest.raises(RecipeError, match="changed after it was written"):
        prepare(shared)
    assert checksums(prepare(shared).path) == expected


def test_unfinished_files_of_a_killed_preparation_are_removed(folder):
    work = prepared_path(recipe(folder)).with_suffix(files.INCOMPLETE)
    (work / "tokenizer-123.incomplete").mkdir(parents=True)
    (work / "parts").mkdir()
    (work / "parts" / "x.incomplete").write_text("half")
    data = prepare(recipe(folder))
    assert not list(data.path.rglob("*.incomplete"))
    prepared.verify(data.path)


def test_a_long_document_has_the_tokens_of_the_uncut_text(monkeypatch):
    monkeypatch.setattr(encoding, "LONG_CHARS", 2_000)
    section = TokenizerSection(algorithm="byte_level_bpe", vocab_size=400)
    draw = random.Random(0)
    lines = [text.replace(" ", draw.choice([" ", "  ", "\n", "\n\n", "\t"]), 5) for text in small_text(300)]
    trained = tokenizer.train_tokenizer(section, lines)
    encode = encoding.Encoder(trained, np.dtype(np.uint16))
    for joint in ("\n", " ", "\n\n\n    "):
        text = joint.join(lines)
        whole = trained.backend_tokenizer.encode(text, add_special_tokens=False).ids
        encoded = encode([text, "short", text[:5000]])
        assert encoded[0].tolist() == [*whole, trained.eos_token_id]
        assert len(text) > 10 * encoding.LONG_CHARS
        assert encoded[2].tolist()[:-1] == trained.backend_tokenizer.encode(text[:5000], add_special_tokens=False).ids


@pytest.mark.parametrize("how", ["prefix", "metaspace"])
def test_text_is_not_cut_if_the_tokenizer_adds_a_space_before_every_text(monkeypatch, how):
    from tokenizers import pre_tokenizers

    monkeypatch.setattr(encoding, "LONG_CHARS", 1_000)
    trained = tokenizer.train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=400), small_text(300))
    # Many tokenizers add a space before every text, which would add one to every chunk.
    prefix = {"prefix": pre_tokenizers.ByteLevel(add_prefix_space=True), "metaspace": pre_tokenizers.Metaspace()}[how]
    trained.backend_tokenizer.pre_tokenizer = prefix
    encode = encoding.Encoder(trained, np.dtype(np.uint16))
    encode(["short"])
    for text in ("\n".join(small_text(100)), "\n".join(small_text(20))[:1900]):
        assert encode([text])[0].tolist()[:-1] == trained.backend_tokenizer.encode(text, add_special_tokens=False).ids


def test_text_is_not_cut_at_lines_if_a_token_contains_a_line_break():
    from tokenizers import AddedToken

    trained = tokenizer.train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=400), small_text(300))
    trained.add_tokens([AddedToken("light\nwater")])
    encode = encoding.Encoder(trained, np.dtype(np.uint16))
    text = "light\nwater " * 1000
    assert encode([text])[0].tolist()[:-1] == trained.backend_tokenizer.encode(text, add_special_tokens=False).ids


def rows_of(data, split="train-0"):
    return np.concatenate(data.blocks(split)).astype(int)


def test_best_fit_cuts_only_documents_longer_than_a_block(folder):
    documents = [*small_text(150), " ".join(small_text(40, seed=3))]
    write_jsonl(folder / "corpus.jsonl", documents)
    data = prepare(recipe(folder, data__packing="best_fit", data__block_size=256, data__validation_fraction=0.0))
    prepared.verify(data.path)
    entry = data.manifest["splits"]["train-0"]
    assert entry["remainder"] == 0 < entry["padding"]
    assert entry["tokens"] + entry["separators"] + entry["padding"] == entry["rows"] * 256
    fast = load_prepared_tokenizer(data)
    eos, found = fast.eos_token_id, []
    for row in rows_of(data):
        end = len(row)
        while end > 1 and row[end - 1] == row[end - 2] == eos:
            end -= 1
        found += [fast.decode(piece) for piece in np.split(row[:end], np.flatnonzero(row[:end] == eos)[:-1] + 1)]
    found = [text.removesuffix(fast.eos_token) for text in found]
    short = [text for text in documents if len(fast(text)["input_ids"]) < 256]
    assert len(short) > 100 and not set(short) - set(found)
    (long,) = set(documents) - set(short)
    assert len(found) - len(short) == -(-(len(fast(long)["input_ids"]) + 1) // 256)
    # Best fit leaves little padding where documents are short.
    assert entry["padding"] < 0.15 * entry["rows"] * 256
    assert f"{entry['padding']:,} padding" in summary(data)


def test_best_fit_packs_documents_as_long_as_a_block(folder):
    sizes = [7, 8, 9, 15, 16, 17, 1, 8, 24, 25]
    texts = ["".join(chr(97 + (i + j) % 26) for j in range(size)) for i, size in enumerate(sizes)]
    write_jsonl(folder / "corpus.jsonl", texts)
    changes = {"data__block_size": 8, "data__validation_fraction": 0.0, "tokenizer": {"algorithm": "character"}}
    data = prepare(recipe(folder, data__packing="best_fit", **changes))
    prepared.verify(data.path)
    rows, fast = rows_of(data), load_prepared_tokenizer(data)
    batch = collate(rows.copy(), None, pad_token_id=fast.eos_token_id)
    entry = data.manifest["splits"]["train-0"]
    assert int((batch["labels"] == -100).sum()) == entry["padding"] == rows.size - sum(sizes) - entry["separators"]
    # Documents of 8, 16, 8 and 24 characters fill their blocks, so they have no separator.
    assert entry["separators"] == len(sizes) - 4
    decoded = [fast.decode(row) for row in rows]
    for text in texts:
        whole = [text[start : start + 8] for start in range(0, len(text), 8)]
        assert all(any(piece in row for row in decoded) for piece in whole)


def test_documents_without_any_token_are_dropped_and_counted(folder):
    from tokenizers import normalizers

    made = tokenizer.train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(50))
    made.backend_tokenizer.normalizer = normalizers.Strip()
    made.save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "corpus.jsonl", [*small_text(100), "  ", " \n "])
    data = prepare(recipe(folder, tokenizer={"pretrained": str(folder / "tokenizer")}))
    assert data.manifest["sources"][0]["dropped"] == {"no_tokens": 2}
    prepared.verify(data.path)


@pytest.mark.parametrize("packing_name", ["concat", "best_fit"])
def test_the_documents_of_every_block_are_known(folder, packing_name, small_parts):
    documents = small_text(200)
    data = prepare(recipe(folder, data__packing=packing_name))
    fast = load_prepared_tokenizer(data)
    for row, ids in enumerate(rows_of(data)):
        texts = fast.decode(ids).split(fast.eos_token)
        sources = data.documents("train-0", row)
        assert all(origin.endswith("corpus.jsonl") for origin, _ in sources)
        lines = [documents[number - 1] for _, number in sources]
        # A cut may leave half a character. After the last document there is only padding.
        pieces = [text.strip("\ufffd") for text in texts]
        assert all(piece in line for piece, line in zip(pieces, lines, strict=False))
        assert len(pieces) >= len(lines) and not any(pieces[len(lines) :])


def test_duplicates_are_always_counted_and_dropped_on_request(folder, small_parts):
    write_jsonl(folder / "corpus.jsonl", [*small_text(100), "", "", *small_text(150)])
    counted = prepare(recipe(folder))
    found = counted.manifest["hygiene"]
    assert found["train_duplicates"] + found["validation_duplicates"] == 100
    dropped = prepare(recipe(folder, data__deduplicate=True))
    prepared.verify(dropped.path)
    assert dropped.manifest["sources"][0]["dropped"] == {"duplicate": 100, "empty": 2}
    assert dropped.manifest["hygiene"]["train_duplicates"] == 0
    assert sum(split["documents"] for split in dropped.manifest["splits"].values()) == 150
    assert dropped.manifest["splits"]["train-0"]["documents"] < counted.manifest["splits"]["train-0"]["documents"]


def test_validation_text_inside_training_documents_is_reported(folder):
    texts = small_text(60)
    held_out = write_jsonl(folder / "held_out.jsonl", texts[50:])
    hidden = [f"something before. {text} and after" for text in texts[55:]]
    write_jsonl(folder / "corpus.jsonl", [*texts[:50], *hidden])
    sources = [{"path": "json", "data_files": str(held_out)}]
    changes = {"data__validation_sources": sources, "data__validation_fraction": 0.0}
    overlap = prepare(recipe(folder, **changes)).manifest["hygiene"]["validation_ngrams"]
    assert overlap["n"] == 13 and 0.3 < overlap["share_in_train"] < 0.7
    write_jsonl(folder / "corpus.jsonl", texts[:50])
    assert prepare(recipe(folder, **changes)).manifest["hygiene"]["validation_ngrams"]["share_in_train"] < 0.1


BAD_LINES = {
    "broken_json": (b'{"text": "half', "broken JSON"),
    "missing_text": (b'{"body": "x"}', "no column 'text'; there are: body"),
    "null_text": (b'{"text": null}', "expected text, got None"),
    "not_text": (b'{"text": 3}', "expected text, got 3"),
    "invalid_utf8": (b'{"text": "sch\xf6n"}', "not valid UTF-8"),
    "nul_bytes": (b'{"text": "a\\u0000b"}', "NUL"),
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_bad_document_is_an_error_or_is_skipped_and_counted(folder, reason):
    line, message = BAD_LINES[reason]
    good = (folder / "corpus.jsonl").read_bytes()
    (folder / "corpus.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(RecipeError, match=r"corpus\.jsonl:201: ") as error:
        prepare(recipe(folder))
    assert message in str(error.value)
    data = prepare(recipe(folder, data__on_bad_document="skip"))
    assert data.manifest["sources"][0]["dropped"] == {reason: 1}
    assert data.manifest["sources"][0]["documents_kept"] == 400
    assert f"1 {reason}" in summary(data)
    prepared.verify(data.path)


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_a_truncated_file_is_an_error_or_is_skipped_and_counted(folder, suffix):
    import bz2
    import lzma

    import zstandard

    compress = {".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    # Text that does not compress, so that half of the file is about half of the documents.
    draw = random.Random(0)
    texts = ["".join(map(chr, draw.choices(range(33, 50_000), k=2000))) for _ in range(300)]
    whole = compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (folder / f"corpus.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    changes = {"data__sources": [{"path": "json", "data_files": str(folder / f"corpus.jsonl{suffix}")}]}
    with pytest.raises(RecipeError, match=rf"corpus\.jsonl{suffix}:\d+: (cannot be read further|broken JSON)"):
        prepare(recipe(folder, **changes))
    data = prepare(recipe(folder, data__on_bad_document="skip", **changes))
    dropped = data.manifest["sources"][0]["dropped"]
    assert dropped["truncated_file"] == 1 and data.manifest["sources"][0]["documents_kept"] > 50


@pytest.mark.parametrize("error", [ConnectionError("reset"), OSError(5, "Input/output error"), ValueError("remote")])
def test_a_failing_network_is_an_error_and_skips_no_document(folder, monkeypatch, error):
    class Breaking(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 10_000:
                raise error
            return super().read(min(size, 1000) if size > 0 else 1000)

        readinto = None

    memory = fsspec.filesystem("memory")
    memory.pipe(f"/{folder.name}/corpus.jsonl", (folder / "corpus.jsonl").read_bytes())
    monkeypatch.setattr("hfpretrain.data.corpus._RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(type(memory), "_open", lambda self, path, *_, **__: Breaking(self.cat(path)))
    sources = [{"path": "json", "data_files": f"memory://{folder.name}/corpus.jsonl"}]
    with pytest.raises(RecipeError, match=r"cannot read .*corpus\.jsonl"):
        prepare(recipe(folder, data__sources=sources, data__on_bad_document="skip"))


def test_a_source_that_changes_while_it_is_read_is_noticed(folder, monkeypatch):
    entries = files.checksum_entries

    def grow(*arguments):  # at the end of a part
        write_jsonl(folder / "corpus.jsonl", small_text(201))
        return entries(*arguments)

    monkeypatch.setattr(files, "checksum_entries", grow)
    with pytest.raises(RecipeError, match="changed while it was prepared"):
        prepare(recipe(folder))


def test_a_full_disk_is_an_error_and_finished_parts_are_kept(folder, small_parts):
    limited = recipe(folder)
    program = (
        f"{SMALL}; import sys, resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))\n"
        "from hfpretrain.cli import main; sys.exit(main(['prepare', sys.argv[1], '--num-workers', '1']))"
    )
    prepare_shard(limited, 0, 10)  # makes the tokenizer, which is larger than the limit
    work = prepared_path(limited).with_suffix(files.INCOMPLETE)
    (folder / "limited.py").write_text(program)
    result = script(folder / "limited.py", write_recipe(folder))
    assert result.returncode == 2, result.stderr
    assert "data.prepared_dir: cannot write" in result.stderr and "File too large" in result.stderr
    assert "Traceback" not in result.stderr and not prepared_path(limited).exists()
    expected = checksums(prepare(recipe(folder, data__prepared_dir=str(folder / "straight"))).path)
    assert work.exists() and checksums(prepare(limited).path) == expected


def test_remote_files_are_read_like_local_ones(folder):
    texts = small_text(100)
    memory = fsspec.filesystem("memory")
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    memory.pipe("/corpus/a.jsonl", content[: content.index(b"\n", len(content) // 2) + 1])
    memory.pipe("/corpus/b.jsonl.gz", gzip.compress(content[content.index(b"\n", len(content) // 2) + 1 :]))
    sources = [{"path": "json", "data_files": "memory://corpus/*"}]
    data = prepare(recipe(folder, data__sources=sources))
    assert data.manifest["sources"][0]["documents_kept"] == 100
    assert {origin for row in range(20) for origin, _ in data.documents("train-0", row)} <= {
        "memory:///corpus/a.jsonl",
        "memory:///corpus/b.jsonl.gz",
        "memory://corpus/a.jsonl",
        "memory://corpus/b.jsonl.gz",
    }
    before = prepared_path(recipe(folder, data__sources=sources))
    memory.pipe("/corpus/a.jsonl", content)
    assert prepared_path(recipe(folder, data__sources=sources)) != before
    with pytest.raises(RecipeError, match="no file matches memory://nowhere"):
        prepare(recipe(folder, data__sources=[{"path": "json", "data_files": "memory://nowhere/*"}]))


def test_machines_without_a_common_disk_share_a_url(folder, small_parts, monkeypatch):
    expected = checksums(prepare(recipe(folder, data__prepared_dir=str(folder / "straight"))).path)
    url = f"memory://{folder.name}/prepared"
    machines = [
        recipe(folder, data__prepared_dir=url, output_dir=str(folder / name / "run")) for name in ("a", "b", "c")
    ]
    prepare_shard(machines[0], 0, 2)
    remote = fsspec.filesystem("memory")
    # The next call uploads what was not uploaded before a kill. Half a tokenizer does not count as one.
    lost = [
        n for n in remote.find(f"/{folder.name}") if "/train-0/" in n or "/parts/" in n or n.endswith("_config.json")
    ]
    remote.rm(lost)
    assert len(lost) > 4
    prepare_shard(machines[0], 0, 2)
    assert set(lost) <= set(remote.find(f"/{folder.name}"))
    there = set(remote.find(f"/{folder.name}"))
    assert any("/parts/" in name for name in there) and not any(name.endswith("/manifest.json") for name in there)
    # A new machine uses what is finished, and does the rest.
    joined = prepare(machines[1])
    assert checksums(joined.path) == expected
    assert there < set(remote.find(f"/{folder.name}"))
    # A third machine only copies.
    third = prepare(machines[2])
    assert checksums(third.path) == expected and third.path.is_relative_to(folder / "c")
    assert prepare_shard(machines[2], 1, 2) == third.path
    # So does the first process of a machine whose main process is elsewhere.
    monkeypatch.setenv("LOCAL_RANK", "0")
    fourth = recipe(folder, data__prepared_dir=url, output_dir=str(folder / "e" / "run"))
    assert checksums(wait_for_prepared(prepared_path(fourth), url).path) == expected
    # A half-written file of an earlier attempt does not count as a part.
    fifth = recipe(folder, data__prepared_dir=url, output_dir=str(folder / "f" / "run"))
    half = prepared_path(fifth).with_suffix(files.INCOMPLETE) / "train-0" / "data-0-00000-00000.arrow"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    assert checksums(prepare(fifth).path) == expected
    (victim,) = [name for name in remote.find(f"/{folder.name}") if name.endswith("train-0/data-0-00000-00001.arrow")]
    remote.pipe(victim, b"x" + remote.cat(victim)[1:])
    with pytest.raises(RecipeError, match=r"is damaged: .* has another checksum"):
        prepare(recipe(folder, data__prepared_dir=url, output_dir=str(folder / "d" / "run")))


@pytest.mark.slow
def test_memory_stays_flat(folder):
    """Ten times the text takes no more memory. `benchmarks/memory.py` measures it with gigabytes."""
    # The child reports its own peak: that of wait4 begins with the memory of the process that started it.
    code = (
        "import sys; from hfpretrain.cli import main; code = main(sys.argv[1:]);"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0]); sys.exit(code)"
    )
    peaks = []
    for copies in (1, 10):
        write_jsonl(folder / f"{copies}.jsonl", small_text(1500) * copies)
        path = write_recipe(folder, data__sources=[{"path": "json", "data_files": str(folder / f"{copies}.jsonl")}])
        command = [sys.executable, "-c", code, "prepare", str(path)]
        result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)  # MiB
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < 1024


def test_the_documents_of_shifted_blocks_are_known(folder, small_parts):
    write_jsonl(folder / "corpus.jsonl", small_text(400))
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    with_shift = recipe(folder, data__shift_blocks=True, training__max_steps=400)
    made = prepare(with_shift)
    assert made.path == prepare(recipe(folder)).path  # nothing on disk depends on it
    assert len(made.last_rows("train-0")) > 3
    rows = made.manifest["splits"]["train-0"]["rows"]
    order = with_shift.data, with_shift.training, with_shift.seed
    data = training_data(*order, made, num_processes=1, process_index=0, document_masking=True)
    tokenizer = load_prepared_tokenizer(made)
    for step in range(rows // 8 + 1, 2 * rows // 8):  # the second epoch
        for sequence in sequences_of_step(made, data, tokenizer, step):
            assert 0 < sequence["shift"] < 32
            assert sum(document["tokens"] for document in sequence["documents"]) == 32
            for document in sequence["documents"]:
                line = int(document["origin"].rsplit(":", 1)[1])
                assert document["text"].strip("\ufffd") in texts[line - 1]


def wait(made):
    return wait_for_prepared(prepared_path(made))


def flip(path, offset=-40):
    """Flip a bit, with the file's size and modification time as before."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    [
        "train-0/data-0-00000-00000.arrow",
        "train-0/state.json",
        "train-0/dataset_info.json",
        "tokenizer/tokenizer.json",
        "parts/0-00000-00000.json",
        "manifest.json",
    ],
)
def test_a_flipped_bit_in_prepared_data_is_an_error_that_names_the_file(folder, name):
    path = prepare(recipe(folder)).path
    flip(path / name, offset=20)
    for opens in (prepare, wait) if name != "manifest.json" else (prepare,):
        with pytest.raises(RecipeError, match=rf"(?s)data: the prepared data is damaged: .*{name}.*delete"):
            opens(recipe(folder))
    with pytest.raises(RecipeError, match=name):
        prepared.verify(path)


def test_checksums_of_prepared_data_are_verified_once_and_again_after_a_change(folder, monkeypatch):
    path = prepare(recipe(folder)).path
    read = []
    checksum = files.sha256
    monkeypatch.setattr(files, "sha256", lambda file: read.append(file.name) or checksum(file))
    prepare(recipe(folder))
    assert "state.json" not in read, "new data needs no verification"
    os.utime(path / "train-0" / "state.json")
    prepare(recipe(folder))
    assert {"state.json", "data-0-00000-00000.arrow"} <= set(read)
    read.clear()
    prepare(recipe(folder))
    wait(recipe(folder))
    assert "state.json" not in read


def test_records_of_verified_folders_are_dropped_with_the_folder_or_when_old(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "hfpretrain" / "verified"

    def sealed(name):
        (tmp_path / f"{name}.incomplete").mkdir()
        (tmp_path / f"{name}.incomplete" / "a").write_text("content")
        files.seal(tmp_path / f"{name}.incomplete", tmp_path / name, {})
        files._drop_old_records.cache_clear()
        files.record_as_verified(tmp_path / name)

    for name in ("kept", "gone", "old", "used"):
        sealed(name)
    record = {name: files._record_path(tmp_path / name) for name in ("kept", "gone", "old", "used")}
    foreign = cache / "notes.txt"
    foreign.write_text("a person's")
    shutil.rmtree(tmp_path / "gone")
    for path in (record["old"], record["used"], foreign):
        os.utime(path, (1e9, 1e9))
    assert files.damage_if_changed(tmp_path / "used") is None  # which renews its record
    sealed("last")
    there = {path for path in cache.iterdir() if path.suffix != ".lock"}
    assert there == {record["kept"], record["used"], files._record_path(tmp_path / "last"), foreign}


def test_prepared_data_are_opened_without_writing_beside_them(folder):
    path = prepare(recipe(folder)).path
    for lock in path.parent.glob("*.lock"):
        lock.unlink()
    prepare(recipe(folder))
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_a_damaged_tokenizer_of_an_unfinished_preparation_is_named(folder):
    prepare_shard(recipe(folder), 0, 2)
    (damaged,) = (folder / "prepared").glob("*.incomplete/tokenizer/tokenizer.json")
    damaged.write_text("{")
    with pytest.raises(RecipeError, match=r"data: the tokenizer in .*; delete "):
        prepare(recipe(folder))
