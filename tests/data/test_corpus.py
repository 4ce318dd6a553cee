import gzip
import io
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import pandas
import pytest
import zstandard
from conftest import small_text, write_jsonl
from fsspec.implementations.memory import MemoryFileSystem

from hfpretrain import files
from hfpretrain.data import corpus
from hfpretrain.data.identity import pin_to_commits, source_identity
from hfpretrain.recipe.schema import DataSection, RecipeError, SourceSection

TEXTS = ["first document", "zweites\nDokument", "第三", ""]


def read(**keywords):
    return [document.text for document in corpus.Reader(SourceSection(**keywords)).read()]


def test_formats_and_compressions_give_the_same_documents(tmp_path):
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines))
    pandas.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "d.parquet")
    pandas.DataFrame({"text": TEXTS[:3]}).to_csv(tmp_path / "e.csv")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert read(path="json", data_files=str(tmp_path / name)) == TEXTS, name
    assert read(path="parquet", data_files=str(tmp_path / "d.parquet")) == TEXTS
    assert read(path="csv", data_files=str(tmp_path / "e.csv")) == TEXTS[:3]
    assert read(path="json", data_files=str(tmp_path / "a.jsonl"), split="train[:50%]") == TEXTS[:2]


class FlakyFile(io.RawIOBase):
    """A file whose server closes the connection after 60,000 bytes, the first `failures` times."""

    failures = 0

    def __init__(self, content):
        self._file = io.BytesIO(content)

    def readable(self):
        return True

    def readinto(self, buffer):
        size = min(len(buffer), 60_000 - self._file.tell()) if FlakyFile.failures else len(buffer)
        if size == 0:
            FlakyFile.failures -= 1
            raise ConnectionResetError("the server has closed the connection")
        return self._file.readinto(memoryview(buffer)[:size])

    def seekable(self):
        return True

    def seek(self, offset, whence=0):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()


class FlakyFileSystem(MemoryFileSystem):
    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def open(self, path, mode="rb", **keywords):
        if "r" not in mode:
            return super().open(path, mode, **keywords)
        return FlakyFile(self.cat(path))


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setattr(corpus, "_RETRY_SECONDS", (0.01, 0.02))
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    lines = [json.dumps({"text": f"document {number}"}) + "\n" for number in range(10_000)]
    with fsspec.filesystem("flaky").open("/a.jsonl", "wb") as file:
        file.write("".join(lines).encode())
    yield FlakyFile
    FlakyFile.failures = 0


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_file_of_a_server_that_fails_for_a_while_is_read_again(flaky, failures, caplog):
    reader = corpus.Reader(SourceSection(path="json", data_files="flaky://a.jsonl"))
    flaky.failures = failures
    documents, error = [], None
    try:
        documents.extend((document.text, document.row) for document in reader.read())
    except RecipeError as found:
        error = str(found)
    expected = [(f"document {number}", number + 1) for number in range(10_000)]
    if failures < 3:
        assert documents == expected and error is None
        assert caplog.text.count("trying again in") == failures and "ConnectionResetError" in caplog.text
    else:
        assert 100 < len(documents) < 10_000 and documents == expected[: len(documents)]
        assert "a.jsonl: ConnectionResetError: the server has closed the connection" in error


def test_globs_folders_and_lists_select_files(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    expected = ["text a", "text b", "text c"]
    assert read(path="text", data_files=str(tmp_path / "*.txt"), sample_by="document") == expected
    assert read(path="text", data_dir=str(tmp_path), sample_by="document") == expected
    named = [str(tmp_path / "a.txt"), str(tmp_path / "c.txt")]
    assert read(path="text", data_files=named, sample_by="document") == ["text a", "text c"]


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("document", ["one\ntwo\n\nthree\n"]),
        ("line", ["one", "two", "", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
    ],
)
def test_sample_by_divides_a_text_file_into_documents(tmp_path, sample_by, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert read(path="text", data_files=str(tmp_path / "a.txt"), sample_by=sample_by) == expected


def test_builtin_corpus_is_real_text_in_a_fixed_order_without_tests():
    documents = read(path=corpus.PYTHON_STDLIB)
    assert documents == read(path=corpus.PYTHON_STDLIB)
    assert len(documents) > 300 and sum(map(len, documents)) > 5_000_000
    assert any("class ArgumentParser" in text for text in documents)
    assert not any("class TestCaseForTests" in text or "import test.support" in text[:2000] for text in documents)


def split(data):
    splitter = corpus.Splitter(data, corpus.held_out_digests(data))
    parts = {
        "train": [],
        "validation": [text for _, text in corpus.validation_documents(data)],
        "also_in_validation": [],
    }
    for source in data.sources:
        for document in corpus.Reader(source).read():
            for name, text in splitter(document):
                if name != "validation":
                    parts[name].append(text)
    assert parts["train"] == list(corpus.training_documents(data))
    return parts


def section(tmp_path, documents, **keywords):
    path = write_jsonl(tmp_path / "corpus.jsonl", documents)
    return DataSection(sources=({"path": "json", "data_files": str(path)},), block_size=8, **keywords)


def test_documents_keep_their_split_when_others_are_added(tmp_path):
    documents = small_text(600)
    before = split(section(tmp_path, documents[:400], validation_fraction=0.1))
    after = split(section(tmp_path, documents[200:], validation_fraction=0.1))
    kept = set(documents[200:400])
    assert kept & set(before["validation"]) == kept & set(after["validation"]) != set()
    assert 20 <= len(before["validation"]) <= 60
    assert not set(before["validation"]) & set(before["train"])


def test_duplicates_are_in_the_same_split(tmp_path):
    parts = split(section(tmp_path, small_text(200) * 2, validation_fraction=0.2))
    assert parts["validation"] and not set(parts["validation"]) & set(parts["train"])


def test_validation_by_tail_takes_the_end_of_the_text(tmp_path):
    text = "".join(chr(97 + index % 26) for index in range(1115394))
    parts = split(section(tmp_path, [text], validation_fraction=0.1, validation_by="tail"))
    assert parts["train"] == [text[:1003854]] and parts["validation"] == [text[1003854:]]


def test_validation_sources_never_overlap_training(tmp_path):
    documents = small_text(50)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", documents[40:])
    data = section(tmp_path, documents, validation_sources=({"path": "json", "data_files": str(held_out)},))
    parts = split(data)
    assert parts["validation"] == documents[40:] == parts["also_in_validation"]
    assert parts["train"] == documents[:40]


def refusal(**keywords):
    with pytest.raises(RecipeError) as error:
        read(**keywords)
    return str(error.value)


def test_bad_input_is_refused_with_file_and_line(tmp_path):
    assert "none.jsonl" in refusal(path="json", data_files=str(tmp_path / "none.jsonl"))
    (tmp_path / "latin.txt").write_bytes("schöner Text\n".encode("latin-1"))
    message = refusal(path="text", data_files=str(tmp_path / "latin.txt"), sample_by="line")
    assert "latin.txt:1: not valid UTF-8" in message and "0xf6" in message
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    message = refusal(path="json", data_files=str(tmp_path / "a.jsonl"), text_column="body")
    assert "no column 'body'" in message and "text" in message
    (tmp_path / "null.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    assert "null.jsonl:2: expected text" in refusal(path="json", data_files=str(tmp_path / "null.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    assert "broken.jsonl" in refusal(path="json", data_files=str(tmp_path / "broken.jsonl"))
    good = gzip.compress(b'{"text": "x"}\n' * 5000)
    (tmp_path / "cut.jsonl.gz").write_bytes(good[: len(good) // 2])
    assert "cut.jsonl.gz" in refusal(path="json", data_files=str(tmp_path / "cut.jsonl.gz"))


def test_identity_depends_on_the_content_of_files_and_not_on_their_folder(tmp_path):
    (tmp_path / "a").mkdir()
    path = write_jsonl(tmp_path / "a" / "x.jsonl", ["one", "two"])
    source = SourceSection(path="json", data_files=str(path))
    before = source_identity(source)
    os.utime(path)
    assert source_identity(source) == before
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert source_identity(SourceSection(path="json", data_dir=str(tmp_path / "b"))) == before
    stat = path.stat()
    path.write_text(path.read_text().replace("two", "TWO"))  # with the same size and, in the next line, the same time
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source_identity(source) != before
    path.rename(tmp_path / "a" / "x.jsonl.gz")  # the suffix changes how the file is read
    assert source_identity(SourceSection(path="json", data_files=str(tmp_path / "a" / "x.jsonl.gz"))) != before


def test_files_that_have_not_changed_are_not_read_again(tmp_path, monkeypatch):
    paths = [write_jsonl(tmp_path / f"{number}.jsonl", [str(number)]) for number in range(3)]
    read, opened = [], Path.open

    def record(path, *arguments, **keywords):
        read.extend([path.name] if path.suffix == ".jsonl" else [])
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", record)
    files.digests(paths)
    files.digests(paths)
    assert sorted(read) == ["0.jsonl", "1.jsonl", "2.jsonl"]
    paths[1].write_bytes(b"another")
    read.clear()
    files.digests(paths)
    assert read == ["1.jsonl"]


@pytest.mark.parametrize("kind", ["arrow", "folder", "data_dir", "slice"])
def test_a_source_read_by_datasets_has_an_identity(tmp_path, kind):
    import datasets

    def write(word):
        texts = [f"{word} {number}" for number in range(9)]
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / word)
        shutil.copy(tmp_path / word / "data-00000-of-00001.arrow", tmp_path / "x.arrow")
        (tmp_path / "repo" / "sub").mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "repo" / "sub" / "a.jsonl", texts)

    write("before")
    source = {
        "arrow": SourceSection(path="arrow", data_files=str(tmp_path / "x.arrow")),
        "folder": SourceSection(path=str(tmp_path / "repo")),
        "data_dir": SourceSection(path=str(tmp_path / "repo"), data_dir="sub"),
        "slice": SourceSection(path="json", data_files=str(tmp_path / "repo/sub/*"), split="train[:50%]"),
    }[kind]
    before = source_identity(source)
    assert source_identity(source) == before and "before 0" in next(corpus.Reader(source).read()).text
    write("behind")
    assert source_identity(source) != before


def test_a_source_without_an_identity_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # `datasets` looks for the files of `iceberg` in the working directory
    (tmp_path / "empty").mkdir()
    for source in (
        SourceSection(path=str(tmp_path / "empty")),
        SourceSection(path="arrow", data_files=str(tmp_path / "nowhere.arrow")),
        SourceSection(path="iceberg"),
    ):
        with pytest.raises(RecipeError, match=r"data\.sources"):
            source_identity(source)
    memory = fsspec.filesystem("memory")
    memory.pipe("/versions/a.jsonl", b"{}")
    url = SourceSection(path="json", data_files="memory://versions/a.jsonl")
    assert source_identity(url)
    monkeypatch.setattr(type(memory), "info", lambda self, path, **_: {"name": path, "type": "file", "size": 2})
    with pytest.raises(RecipeError, match="sends neither ETag"):
        source_identity(url)


def test_an_error_of_the_hub_is_raised_and_not_taken_for_a_commit(monkeypatch):
    import datasets
    from huggingface_hub import HfApi

    def down(*_, **__):
        raise ConnectionError("the Hub is down")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", down)
    for revision in (None, "main", "0" * 40):
        with pytest.raises(RecipeError, match=r"the Hub is down.*HF_HUB_OFFLINE=1"):
            source_identity(SourceSection(path="user/data", revision=revision))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: SimpleNamespace(hash="1" * 40))
    (found,) = source_identity(SourceSection(path="user/data"))
    assert found["commit"] == "1" * 40
    assert source_identity(SourceSection(path="user/data", revision="1" * 40)) == [found]
    with pytest.raises(RecipeError, match="the local cache has user/data at 1111"):
        source_identity(SourceSection(path="user/data", revision="0" * 40))


def test_data_dir_may_be_a_url_and_its_changes_are_noticed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    for patterns in (None, "*.jsonl"):
        source = SourceSection(path="json", data_dir=f"file://{tmp_path}", data_files=patterns)
        before = source_identity(source)
        assert before and [d.text for d in corpus.Reader(source).read()] == ["x"]
        write_jsonl(tmp_path / "a.jsonl", ["x", "y" * len(before)])
        assert source_identity(source) != before
        write_jsonl(tmp_path / "a.jsonl", ["x"])


def test_brackets_in_names_are_not_patterns_and_a_file_named_twice_is_read_once(tmp_path):
    folder = tmp_path / "a [v2]"
    folder.mkdir()
    (folder / "p1.csv").write_text("text\nfirst\n")
    (folder / "p[1].csv").write_text("text\nsecond\n")
    assert read(path="csv", data_dir=str(folder)) == ["first", "second"]
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    twice = [str(tmp_path / "a.jsonl"), f"{tmp_path}/../{tmp_path.name}/a.jsonl"]
    assert read(path="json", data_files=twice) == ["x"]
    with pytest.raises(ValueError, match="data_files"):
        SourceSection(path="json", data_files=[])


def test_fields_of_csv_are_text_and_files_may_be_empty(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,other\nNA,1\n007,2\n,3\nnull,4\n")
    (tmp_path / "b.csv").write_text("")
    (tmp_path / "c.csv").write_text("text\n")
    assert read(path="csv", data_files=str(tmp_path / "*.csv")) == ["NA", "007", "", "null"]
    pandas.DataFrame({"text": pandas.Series([], dtype=str)}).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame({"text": ["x", None]}).to_parquet(tmp_path / "b.parquet")
    message = refusal(path="parquet", data_files=str(tmp_path / "*.parquet"))
    assert "b.parquet:2: expected text" in message
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"text": "2020-01-01"}, {"text": "x"}]')
    assert read(path="json", data_files=str(tmp_path / "a.json")) == ["2020-01-01", "x"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx\ry\r\nz")
    assert read(path="text", data_files=str(tmp_path / "a.txt"), sample_by="line") == ["x", "y", "z"]


def test_a_csv_row_with_more_fields_than_the_header_is_bad(tmp_path):
    path = tmp_path / "a.csv"
    good = "".join(f'{n},"row {n},\nof two lines"\n' for n in range(2500))
    path.write_bytes(b"id,text\n" + good.encode() + b"1,hello, world\n2,sch\xf6n\n\n3,last\n")
    assert "a.csv:5002: the row has 3 fields" in refusal(path="csv", data_files=str(path))
    found = list(corpus.Reader(SourceSection(path="csv", data_files=str(path)), on_bad_document="skip").read())
    assert [d.problem[0] for d in found if d.problem] == ["broken_csv", "invalid_utf8"]
    assert [d.text for d in found if not d.problem] == [*(f"row {n},\nof two lines" for n in range(2500)), "last"]


@pytest.mark.parametrize(
    ("lines", "broken", "what", "kept"),
    [
        (["a,1", '"open,2', "b,3", "c,4"], [3, 4, 5], "lines 3 to 5 is not closed before the end of the file", ["a"]),
        (["a,1", '"open,2', "b,3", 'c,"4"', "d,5"], [3, 4, 5], "lines 3 to 5 has more text after", ["a", "d"]),
        (['"said "yes" twice",1', "a,2"], [2], "line 2 has more text after", ["a"]),
        (
            ['"said ""yes""",1', '"two\nlines",2', '5" disk,3', "a,4"],
            [],
            "",
            ['said "yes"', "two\nlines", '5" disk', "a"],
        ),
    ],
)
def test_an_open_quotation_mark_joins_no_rows(tmp_path, lines, broken, what, kept):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["text,id", *lines]) + "\n")
    source = SourceSection(path="csv", data_files=str(path))
    found = list(corpus.Reader(source, on_bad_document="skip").read())
    assert [d.row for d in found if d.problem] == broken and [d.text for d in found if not d.problem] == kept
    assert {d.problem[0] for d in found if d.problem} <= {"broken_csv"}
    if broken:
        message = refusal(path="csv", data_files=str(path))
        assert f"a.csv:{broken[0]}: broken CSV" in message and what in message
    path.write_text('text\n"open\nanother document\n')  # with one column, every line is a row
    assert "a.csv:2: broken CSV: a quotation mark in lines 2 to 3" in refusal(path="csv", data_files=str(path))
    path.write_text('"text\na\n')
    assert "a.csv:1: the header is broken CSV" in refusal(path="csv", data_files=str(path))


def test_a_column_of_a_csv_file_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,id,text,id\nleft,1,right,2\n")
    message = refusal(path="csv", data_files=str(path))
    assert f"text_column: {path}: there are 2 columns with the name 'text'; rename them" in message
    assert "with the name 'id'" in refusal(path="csv", data_files=str(path), text_template="{id}")
    path.write_text("text,id,id\nleft,1,2\n")
    assert read(path="csv", data_files=str(path)) == ["left"], "columns that are not read may have any names"


def test_a_folder_with_files_of_other_splits_is_refused(tmp_path, monkeypatch):
    for name in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    assert "belongs to another split" in refusal(path="json", data_dir=str(tmp_path))
    assert read(path="json", data_dir=str(tmp_path), data_files="train*") == ["train"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "README.md").write_text("not a text to learn")
    (tmp_path / "texts" / "a.txt").write_text("x")
    assert read(path="text", data_dir=str(tmp_path / "texts"), sample_by="document") == ["x"]
    # Only names below the folder count, not the name of the folder itself.
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.txt").write_text("y")
    monkeypatch.chdir(tmp_path)
    for folder in ("test", "./test", str(tmp_path / "test"), f"file://{tmp_path}/test"):
        assert read(path="text", data_dir=folder, sample_by="document") == ["y"]
    assert "no file matches" in refusal(path="text", data_dir=str(tmp_path / "nowhere"), sample_by="document")


@pytest.mark.parametrize("error", [PermissionError("expired"), FileNotFoundError("gone"), ConnectionError("reset")])
def test_a_file_that_cannot_be_opened_is_not_skipped_as_a_bad_one(monkeypatch, error):
    memory = fsspec.filesystem("memory")
    memory.pipe("/refused/a.jsonl", b'{"text": "x"}')

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(type(memory), "_open", refuse)
    monkeypatch.setattr(corpus, "_RETRY_SECONDS", (0.01,))
    source = SourceSection(path="json", data_files="memory://refused/a.jsonl")
    with pytest.raises(RecipeError, match="cannot read"):
        list(corpus.Reader(source, on_bad_document="skip").read())


@pytest.mark.parametrize("name", ["a.parquet", "a.json"])
def test_a_broken_file_is_refused_by_name_or_skipped(tmp_path, name):
    kind = name.split(".")[1]
    contents = {"parquet": b"PAR1 and no more", "json": b'[{"text": "x"}, '}
    (tmp_path / name).write_bytes(contents[kind])
    source = SourceSection(path=kind, data_files=str(tmp_path / name))
    with pytest.raises(RecipeError, match=rf"{name}:\d+: cannot be read further"):
        list(corpus.Reader(source).read())
    assert list(corpus.Reader(source, on_bad_document="skip").read())[-1].problem[0] == "truncated_file"


def jsonl(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl(path, documents)


@pytest.mark.parametrize("name", ["part[1].jsonl", "a::b.jsonl", "what?.jsonl", "*.jsonl", "a{b}.jsonl"])
def test_the_name_of_an_existing_file_is_never_a_pattern(tmp_path, name, monkeypatch):
    for other in ("part1.jsonl", "whatx.jsonl", "z.jsonl"):
        jsonl(tmp_path / other, ["another"])
    jsonl(tmp_path / name, ["this one"])
    assert read(path="json", data_files=str(tmp_path / name)) == ["this one"]
    assert read(path="json", data_dir=str(tmp_path), data_files=name) == ["this one"]
    assert read(path=str(tmp_path), data_files=name) == ["this one"]
    assert read(path="json", data_files=str(tmp_path / name), split="train[:100%]") == ["this one"]
    monkeypatch.chdir(tmp_path)
    assert read(path="json", data_files=name) == ["this one"]
    (tmp_path / "[x]").mkdir()
    (tmp_path / "x").mkdir()
    jsonl(tmp_path / "x" / "a.jsonl", ["another"])
    jsonl(tmp_path / "[x]" / "a.jsonl", ["in a folder"])
    assert read(path="json", data_files="[x]/*.jsonl") == ["in a folder"]


def test_a_matching_file_that_cannot_be_read_is_refused_by_name(tmp_path, monkeypatch):
    import os

    jsonl(tmp_path / "d" / "a.jsonl", ["x"])
    link = tmp_path / "d" / "b.jsonl"
    link.symlink_to("/gone/b.jsonl")
    for source in (
        {"path": "json", "data_files": str(tmp_path / "d" / "*.jsonl")},
        {"path": "json", "data_files": str(link)},
        {"path": "json", "data_dir": str(tmp_path / "d")},
        {"path": str(tmp_path / "d")},
    ):
        assert "b.jsonl is a link to /gone/b.jsonl, which is missing" in refusal(**source)
    link.unlink()
    link.symlink_to(link)
    assert "b.jsonl" in refusal(path="json", data_files=str(tmp_path / "d" / "*.jsonl"))
    link.unlink()
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    assert "is a link to a folder above it" in refusal(path="json", data_dir=str(tmp_path / "d"))
    assert read(path="json", data_files=str(tmp_path / "d" / "*.jsonl")) == ["x"]
    (tmp_path / "d" / "loop").unlink()
    os.mkfifo(tmp_path / "d" / "pipe.jsonl")
    assert "pipe.jsonl is a pipe" in refusal(path="json", data_files=str(tmp_path / "d" / "*.jsonl"))
    (tmp_path / "d" / "pipe.jsonl").unlink()
    (tmp_path / "d" / "closed").mkdir()
    listdir = os.listdir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)  # the tests may run as root, who may read every folder
    assert "cannot read the folder" in refusal(path="json", data_dir=str(tmp_path / "d"))
    assert "is a folder" in refusal(path="json", data_files=str(tmp_path / "d"))


def test_a_text_file_gives_the_same_documents_by_every_spelling_of_its_source(tmp_path):
    path = tmp_path / "d" / "a.txt"
    path.parent.mkdir()
    path.write_bytes(("\ufeff" + "One.\r\nTwo.\r\n\r\nThree.\n").encode())
    expected = {
        "document": ["One.\nTwo.\n\nThree.\n"],
        "line": ["One.", "Two.", "", "Three."],
        "paragraph": ["One.\nTwo.", "Three."],
    }
    for sample_by, documents in expected.items():
        for source in (
            {"path": "text", "data_files": str(path)},
            {"path": "text", "data_files": str(path), "split": "train[:100%]"},
            {"path": "text", "data_dir": str(path.parent)},
            {"path": str(path.parent)},
            {"path": str(path.parent), "split": "train[:100%]"},
            {"path": str(tmp_path), "data_dir": "d"},
            {"path": str(tmp_path), "data_dir": "d", "data_files": "*.txt"},
        ):
            assert read(**source, sample_by=sample_by) == documents, source
    assert "sample_by: " in refusal(path=str(path.parent))


def test_a_slice_counts_the_documents_of_all_files_together(tmp_path):
    for number in range(3):
        jsonl(tmp_path / f"{number}.jsonl", [f"{number}{n}" for n in range(4)])
    whole = read(path=str(tmp_path))
    assert len(whole) == 12
    for split, expected in (
        ("train[:50%]", whole[:6]),
        ("train[3:9]", whole[3:9]),
        ("train[-1:]+train[:2]", whole[-1:] + whole[:2]),
        ("train+train[:1]", [*whole, whole[0]]),
    ):
        for source in ({"path": str(tmp_path)}, {"path": "json", "data_files": str(tmp_path / "*.jsonl")}):
            assert read(**source, split=split) == expected, split
    assert "not a valid slice" in refusal(path=str(tmp_path), split="train[a:b]")
    assert "data.sources.split" in refusal(path=str(tmp_path), split="validation")


def test_files_of_a_folder_are_assigned_to_splits_by_name_or_refused(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        jsonl(tmp_path / "d" / f"{name}.jsonl", [name])
    jsonl(tmp_path / "shards" / "data" / "extra-00000-of-00001.jsonl", ["extra"])
    assert read(path=str(tmp_path / "d")) == ["train-0", "train-1"]
    assert read(path=str(tmp_path / "d"), split="test") == ["test-0"]
    assert read(path="json", data_dir=str(tmp_path / "d"), split="test") == ["test-0"]
    assert read(path=str(tmp_path / "shards"), split="extra") == ["extra"]
    assert "the files have: test, train" in refusal(path=str(tmp_path / "d"), split="validation")
    jsonl(tmp_path / "d" / "more.jsonl", ["more"])
    assert "more.jsonl belongs to no split" in refusal(path=str(tmp_path / "d"))


def test_each_file_of_a_folder_is_read_in_the_format_of_its_name(tmp_path):
    jsonl(tmp_path / "a.jsonl", ["json"])
    (tmp_path / "b.csv").write_text("text\ncsv\n")
    pandas.DataFrame({"text": ["parquet"]}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "d.TXT.GZ").write_bytes(gzip.compress(b"text"))
    assert read(path=str(tmp_path), sample_by="document") == ["json", "csv", "parquet", "text"]
    (tmp_path / "e.docx").write_bytes(b"x")
    assert "e.docx has none of the formats" in refusal(path=str(tmp_path), sample_by="document")


def test_files_that_are_not_data_are_left_out_of_a_folder(tmp_path, caplog):
    import logging

    jsonl(tmp_path / "a.jsonl", ["x"])
    for name in ("_SUCCESS", "LICENSE", "README", "README.md", "LICENSE-MIT.txt", ".gitattributes", ".a.jsonl.crc"):
        (tmp_path / name).write_text("no data" if "SUCCESS" not in name else "")
    jsonl(tmp_path / "__old__" / "b.jsonl", ["no data"])
    with caplog.at_level(logging.INFO, "hfpretrain"):
        for source in (
            {"path": str(tmp_path)},
            {"path": "json", "data_dir": str(tmp_path)},
            {"path": "json", "data_files": str(tmp_path / "*")},
        ):
            assert read(**source) == ["x"]
    assert "LICENSE" in caplog.text and "left out" in caplog.text
    assert read(path="text", data_files=str(tmp_path / "LICENSE"), sample_by="document") == ["no data"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", LFS, "Git LFS pointer"),
        ("a.jsonl.gz", LFS, "Git LFS pointer"),
        ("a.parquet", LFS, "Git LFS pointer"),
        ("a.txt", "some text".encode("utf-16"), "UTF-16"),
        ("a.csv", "text\nsome text\n".encode("utf-16-le"), "UTF-16"),
        ("a.jsonl", json.dumps({"text": "x"}).encode("utf-16"), "UTF-16"),
        ("a.txt", b"PK\x03\x04\x14\x00", "zip archive"),
        ("a.jsonl", gzip.compress(b'{"text": "x"}', mtime=0), "compressed with gzip"),
        ("a.txt.gz", b"never compressed", "rename it without .gz"),
        ("a.json", json.dumps({"text": "x", "id": 1}, indent=1).encode(), "spans several lines"),
        ("a.json", b'\n\n{\n"text": "x"\n}', "spans several lines"),
        ("a.json", b'{"text": "x",\n "id": 1}\n{"text": "y",\n "id": 2}', "spans several lines"),
    ],
)
@pytest.mark.parametrize("on_bad_document", ["error", "skip"])
def test_a_file_in_another_format_than_its_name_is_refused_with_that_format(
    tmp_path, name, content, what, on_bad_document
):
    (tmp_path / name).write_bytes(content)
    kind = {"txt": "text", "csv": "csv", "parquet": "parquet"}.get(name.split(".")[1], "json")
    source = SourceSection(path=kind, data_files=str(tmp_path / name), sample_by="document" if kind == "text" else None)
    with pytest.raises(RecipeError, match=rf"{name} .*{what}"):
        list(corpus.Reader(source, on_bad_document=on_bad_document).read())


def test_hub_datasets_are_read_at_the_commits_of_their_identities(monkeypatch):
    data = DataSection(
        sources=[{"path": "user/data"}, {"path": "json", "data_files": "a.jsonl"}],
        validation_sources=[{"path": "user/data", "revision": "main"}],
        block_size=32,
    )
    known = [[{"dataset": "user/data", "commit": "a" * 40}], ["json", ["a.jsonl", 1, "b"]]]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    read = pin_to_commits(data, known, known[:1])
    assert [source.revision for source in (*read.sources, *read.validation_sources)] == ["a" * 40, None, "a" * 40]
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: SimpleNamespace(hash="b" * 40))
    with pytest.raises(RecipeError, match=r"data.sources.0: the local cache has user/data at b+, .* a+"):
        pin_to_commits(data, known, known[:1])


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (json.dumps({"text": "a long, long document " * 200}), "does not look like CSV"),
        ("A letter of many words, and of many more. " * 200, "does not look like CSV"),
        (",".join(f"column {number}" for number in range(500)) + "\n", "column 3, .* more"),
    ],
)
def test_long_column_names_are_shortened_in_messages(tmp_path, content, pattern):
    (tmp_path / "a.csv").write_text(content)
    message = refusal(path="csv", data_files=str(tmp_path / "a.csv"))
    assert re.search(pattern, message) and len(message) < 1200
    (tmp_path / "a.jsonl").write_text(json.dumps({content: 1, "b": 2}))
    assert len(refusal(path="json", data_files=str(tmp_path / "a.jsonl"))) < 300 + len(str(tmp_path))


def test_a_missing_tokenizer_file_is_named(tmp_path):
    from hfpretrain.data.tokenizer import TokenizerSection, load_tokenizer

    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(RecipeError, match=r"tokenizer.json is a Git LFS pointer"):
        load_tokenizer(TokenizerSection(pretrained=str(tmp_path)))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/gone/tokenizer.json")
    with pytest.raises(RecipeError, match=r"is a link to /gone/tokenizer.json, which is missing"):
        load_tokenizer(TokenizerSection(pretrained=str(tmp_path)))


def test_remote_files_are_read_line_by_line(tmp_path):
    import fsspec

    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(3000))
    for name, content in (("a.jsonl", lines.encode()), ("b.jsonl.GZ", gzip.compress(lines.encode()))):
        with fsspec.open(f"memory://by-line/{name}", "wb") as file:
            file.write(content)
        expected = [f"line {n}" for n in range(3000)]
        assert read(path="json", data_files=f"memory://by-line/{name}") == expected
        assert read(path="json", data_files=f"memory://by-line/{name}", split="train[:10]") == expected[:10]
    pandas.DataFrame({"text": TEXTS}).to_parquet("memory://by-line/c[1].parquet")
    assert read(path="parquet", data_files="memory://by-line/c[1].parquet") == TEXTS


def test_upper_case_suffixes_and_broken_first_lines_do_not_change_the_format(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    assert read(path="json", data_files=str(tmp_path / "A.JSONL.GZ")) == ["x"]
    (tmp_path / "b.jsonl").write_text('{"text": "cut\n{"text": "x"}\n{\n')
    source = SourceSection(path="json", data_files=str(tmp_path / "b.jsonl"))
    found = list(corpus.Reader(source, on_bad_document="skip").read())
    assert [document.text for document in found if not document.problem] == ["x"] and len(found) == 3


@pytest.mark.parametrize("name", ["text", "json", "csv", "parquet"])
def test_a_folder_named_like_a_format_does_not_shadow_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("x")
    sources = (
        {"path": "text", "data_files": f"{name}/*.txt"},
        {"path": "text", "data_dir": name},
        {"path": f"./{name}"},
    )
    for source in sources:
        assert read(**source, sample_by="document") == ["x"]
        assert source_identity(SourceSection(**source, sample_by="document"))
    assert "there is no folder ./nowhere" in refusal(path="./nowhere")
    assert "is a file" in refusal(path=f"{name}/a.txt")
