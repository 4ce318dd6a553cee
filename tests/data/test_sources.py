"""Forms in which users have their text: saved datasets, nested columns, templates, compressed files; and limits."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import zlib

import datasets
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import zstandard
from conftest import small_text, write_jsonl
from preparation import checksums, recipe, token_stream

from hfpretrain import load_recipe
from hfpretrain.data import corpus, packing
from hfpretrain.data.corpus import load_builder
from hfpretrain.data.identity import fingerprint, source_identity
from hfpretrain.data.prepare import prepare, prepare_shard, prepared_path
from hfpretrain.data.summary import summary
from hfpretrain.evaluation.texts import file_texts
from hfpretrain.recipe.schema import RecipeError, SourceSection, TokenizerSection

TEXTS = [f"text {number}" for number in range(6)]


def documents(on_bad_document="error", **keywords):
    return list(corpus.Reader(SourceSection(**keywords), on_bad_document=on_bad_document).read())


def read(**keywords):
    return [document.text for document in documents(**keywords)]


def refusal(**keywords):
    with pytest.raises(RecipeError) as error:
        documents(**keywords)
    return str(error.value)


def write_table(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def test_a_saved_dataset_is_read_by_its_own_list_of_files(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "id": range(6)})
    dataset.save_to_disk(tmp_path / "one", num_shards=2)
    splits = {"clean": dataset.select([1]), "train": dataset, "test_sft": dataset.select([2, 3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert read(path=str(tmp_path / "one")) == TEXTS == read(path=str(tmp_path / "several"))
    assert read(path=str(tmp_path / "several"), data_dir="clean") == TEXTS[1:2]
    assert read(path=str(tmp_path / "several"), split="test_sft") == TEXTS[2:4]
    assert read(path=str(tmp_path / "several"), split="train[1:3]+clean") == [*TEXTS[1:3], TEXTS[1]]
    assert read(path=str(tmp_path / "several"), split="all") == [TEXTS[1], *TEXTS, *TEXTS[2:4]]
    assert "has the splits: clean, train, test_sft" in refusal(path=str(tmp_path / "several"), split="test")
    assert "has the splits: train" in refusal(path=str(tmp_path / "one"), split="test")
    assert "leave data_files out" in refusal(path=str(tmp_path / "one"), data_files="*.arrow")
    last = documents(path=str(tmp_path / "one"))[-1]
    assert last.origin.endswith("one/data-00001-of-00002.arrow") and last.row == 3
    assert "there are: text, id" in refusal(path=str(tmp_path / "one"), text_column="body")

    datasets.load_from_disk(str(tmp_path / "several"))["train"].map(lambda row: {"text": row["text"] * 2})
    assert list((tmp_path / "several" / "train").glob("cache-*.arrow"))
    assert read(path=str(tmp_path / "several")) == TEXTS, "a cache of `map` is no data"
    (tmp_path / "one" / "data-00000-of-00002.arrow").unlink()
    assert "data-00000-of-00002.arrow can't be read" in refusal(path=str(tmp_path / "one"))
    (tmp_path / "several" / "train" / "state.json").write_text("{")
    assert "train is damaged: state.json: JSONDecodeError" in refusal(path=str(tmp_path / "several"))
    (tmp_path / "several" / "train" / "state.json").write_text("{}")
    assert "train is damaged: state.json: KeyError: '_data_files'" in refusal(path=str(tmp_path / "several"))


def test_a_truncated_file_of_a_saved_dataset_is_a_bad_document(tmp_path):
    datasets.Dataset.from_dict({"text": [str(n) * 100 for n in range(3000)]}).save_to_disk(tmp_path)
    file = tmp_path / "data-00000-of-00001.arrow"
    os.truncate(file, file.stat().st_size // 2)
    found = documents("skip", path=str(tmp_path))
    assert 0 < len(found) < 3000 and found[-1].problem[0] == "truncated_file"
    assert "cannot be read further" in refusal(path=str(tmp_path))


def test_a_saved_dataset_keeps_the_identity_that_older_versions_gave_it(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"test": dataset.select([0]), "train": dataset}).save_to_disk(tmp_path)
    source = SourceSection(path=str(tmp_path))
    found = {str(split): len(names) for split, names in load_builder(source, "key").config.data_files.items()}
    kind, *splits = source_identity(source)
    assert kind == "folder" and {name: len(files) for name, *files in splits} == found == {"train": 1, "test": 1}
    assert [name for name, *_ in splits] == list(found)
    before = source_identity(source)
    datasets.DatasetDict({"test": dataset, "train": dataset.select([0])}).save_to_disk(tmp_path)
    assert source_identity(source) != before


def test_text_may_be_in_a_nested_column(tmp_path):
    rows = [{"meta": {"text": text, "page": {"number": "1"}}, "title": text.upper()} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(tmp_path / "a.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    sources = (
        {"path": "json", "data_files": str(tmp_path / "a.jsonl")},
        {"path": "parquet", "data_files": str(tmp_path / "a.parquet")},
        {"path": "arrow", "data_files": str(tmp_path / "saved" / "*.arrow")},  # read by `datasets`
        {"path": str(tmp_path / "saved")},
    )
    for source in sources:
        assert read(**source, text_column="meta.text") == TEXTS
        assert read(**source, text_column="meta.page.number") == ["1"] * 6
        message = refusal(**source, text_column="meta.body")
        assert "no column 'meta.body'; there are: meta.text, meta.page.number, title" in message
        assert "no column 'title.text'" in refusal(**source, text_column="title.text")


def test_a_null_around_a_nested_column_is_a_bad_document_with_its_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"meta": {"text": "x"}}\n{"meta": null}\n{"meta": {}}\n')
    write_table(tmp_path / "a.parquet", meta=[{"text": "x"}, None])
    found = documents("skip", path="json", data_files=str(tmp_path / "a.jsonl"), text_column="meta.text")
    assert [document.problem and document.problem[0] for document in found] == [None, "null_text", "missing_text"]
    message = refusal(path="parquet", data_files=str(tmp_path / "a.parquet"), text_column="meta.text")
    assert "a.parquet:2: expected text, got None" in message


def test_a_column_with_a_dot_in_its_name_comes_before_a_nested_one(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"meta": {"text": "nested"}, "meta.text": "flat"}))
    nested = pa.array([{"text": "nested"}])
    for columns in ({"meta": nested, "meta.text": ["flat"]}, {"meta.text": ["flat"], "meta": nested}):
        path = write_table(tmp_path / "a.parquet", **columns)
        assert read(path="parquet", data_files=path, text_column="meta.text") == ["flat"]
    assert read(path="json", data_files=str(tmp_path / "a.jsonl"), text_column="meta.text") == ["flat"]
    path = write_table(tmp_path / "b.parquet", **{"text.raw": ["raw"], "text": ["clean"]})
    assert read(path="parquet", data_files=path) == ["clean"]


def test_a_template_joins_columns(tmp_path):
    rows = [
        {"title": "A", "meta": {"body": "b"}},
        {"title": "", "meta": {"body": "c"}},
        {"title": "", "meta": {"body": ""}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_table(tmp_path / "a.parquet", **{name: [row[name] for row in rows] for name in rows[0]})
    (tmp_path / "a.csv").write_text("title,meta.body\nA,b\n,c\n,\n")
    for kind, name in (("json", "a.jsonl"), ("parquet", "a.parquet"), ("csv", "a.csv")):
        source = {"path": kind, "data_files": str(tmp_path / name)}
        template = "{title}\n\n{meta.body} {{{title}}}"
        assert read(**source, text_template=template) == ["A\n\nb {A}", "\n\nc {}", ""], "all empty: no text"
        assert read(**source, text_template="# {title}") == ["# A", "", ""]
        message = refusal(**source, text_template="{title} {body}")
        assert "no column 'body'" in message and (kind == "json" or "data.sources.text_template" in message)


def test_a_column_of_a_template_that_is_no_text_is_a_bad_document(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "x", "b": "y"}\n{"a": "x", "b": null}\n{"a": 1, "b": "y"}\n{"a": "x"}\n')
    source = {"path": "json", "data_files": str(tmp_path / "a.jsonl"), "text_template": "{a}{b}"}
    assert "a.jsonl:2: expected text in column 'b', got None" in refusal(**source)
    found = [document.problem and document.problem[0] for document in documents("skip", **source)]
    assert found == [None, "null_text", "not_text", "missing_text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_template": "{title"}, "is not a template"),
        ({"text_template": "title"}, "names no column: write its name in braces, for example {title}"),
        ({"text_template": "{}"}, "braces without the name of a column"),
        ({"text_template": {"title": None}}, 'put the template in quotes, for example "{title}"'),
        ({"text_template": "{title!r}"}, "leave out `!` and `:`"),
        ({"text_template": "{title}", "text_column": "body"}, "`text_column` or `text_template`, not both"),
        ({"path": "text", "sample_by": "line", "text_template": "{title}"}, "`path: text` has none"),
        ({"delimiter": ";"}, "`path: json` reads none"),
        ({"path": "csv", "delimiter": "; "}, "one character"),
        ({"max_documents": 0}, "greater than 0"),
    ],
)
def test_wrong_keys_of_a_source_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        SourceSection(**{"path": "json", "data_files": "a", **changes})
    assert message in str(error.value)


def test_a_recipe_that_a_run_writes_may_have_a_template(folder, tmp_path):
    given = recipe(folder, data__sources=[{"path": "json", "data_files": "a", "text_template": "{a}"}])
    (tmp_path / "recipe.json").write_text(given.model_dump_json())
    assert load_recipe(tmp_path / "recipe.json") == given


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_every_arrow_type_of_text_is_read_and_bad_utf8_has_its_row(tmp_path, kind):
    if pa.types.is_dictionary(kind):
        column = pa.array(TEXTS, kind.value_type).dictionary_encode()
    else:
        column = pa.array(TEXTS, kind)
    path = write_table(tmp_path / "a.parquet", text=column)
    assert pyarrow.parquet.read_schema(path).field("text").type == kind
    assert read(path="parquet", data_files=path) == TEXTS
    if kind == pa.large_string():
        bad = pa.array([b"good", b"two\nlines \xff", None], pa.large_binary()).view(kind)
        path = write_table(tmp_path / "b.parquet", text=bad)
        found = documents("skip", path="parquet", data_files=path)
        assert [document.text for document in found] == ["good", "", ""]
        assert [document.problem and document.problem[0] for document in found] == [None, "invalid_utf8", "null_text"]
        assert "b.parquet:2: not valid UTF-8 (byte 0xff)" in refusal(path="parquet", data_files=path)


def test_a_bad_document_in_a_row_has_the_number_of_the_row(tmp_path):
    path = write_table(tmp_path / "a.parquet", text=["a", "two\nlines\0"])
    assert "a.parquet:2: the text contains a NUL character" in refusal(path="parquet", data_files=path)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\nb\n\ud800"}))
    assert "a.jsonl:1: not valid UTF-8" in refusal(path="json", data_files=str(tmp_path / "a.jsonl"))
    (tmp_path / "a.txt").write_text("a\nb\0")
    assert "a.txt:2: the text" in refusal(path="text", data_files=str(tmp_path / "a.txt"), sample_by="document")


@pytest.mark.parametrize("codec", ["snappy", "gzip", "zstd", "brotli", "lz4", "none"])
def test_compressed_parquet_is_read(tmp_path, codec):
    pyarrow.parquet.write_table(pa.table({"text": TEXTS}), tmp_path / "A.PARQUET", compression=codec)
    assert read(path=str(tmp_path)) == TEXTS


def test_a_parquet_file_that_is_compressed_as_a_whole_is_refused_even_with_skip(tmp_path):
    path = write_table(tmp_path / "a.parquet", text=TEXTS)
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(RecipeError, match=r"b\.parquet\.gz is compressed as a whole: decompress it"):
        documents("skip", path="parquet", data_files=[path, str(tmp_path / "b.parquet.gz")])


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".zst", zstandard.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_all_members_of_a_compressed_file_are_read(tmp_path, suffix, compress):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    members = [compress(line) for line in [*lines[:3], b"", *lines[3:]]]  # bgzip ends files with an empty one
    path = tmp_path / f"A.JSONL{suffix.upper()}"
    path.write_bytes(b"".join(members))
    assert read(path="json", data_files=str(path)) == TEXTS
    path.write_bytes(b"".join(members)[:-6])
    assert str(path) in refusal(path="json", data_files=str(path))


def test_a_hive_partitioned_folder_is_read_as_one_source(tmp_path):
    table = pa.table({"text": TEXTS, "language": ["en", "de", None] * 2})
    partitioning = pyarrow.dataset.partitioning(pa.schema([("language", pa.string())]), flavor="hive")
    pyarrow.dataset.write_dataset(table, tmp_path / "hive", format="parquet", partitioning=partitioning)
    (tmp_path / "hive" / "_SUCCESS").write_text("")
    assert sorted(read(path=str(tmp_path / "hive"))) == TEXTS
    assert sorted(read(path="parquet", data_dir=str(tmp_path / "hive"))) == TEXTS
    assert read(path="parquet", data_files=str(tmp_path / "hive" / "language=de" / "*")) == [TEXTS[1], TEXTS[4]]


def test_a_partition_by_split_is_a_split(tmp_path):
    table = pa.table({"text": TEXTS, "split": ["train", "test"] * 3})
    partitioning = pyarrow.dataset.partitioning(pa.schema([("split", pa.string())]), flavor="hive")
    pyarrow.dataset.write_dataset(table, tmp_path, format="parquet", partitioning=partitioning)
    assert read(path=str(tmp_path)) == TEXTS[::2]
    assert read(path=str(tmp_path), split="test") == TEXTS[1::2]
    assert "the files have: test, train" in refusal(path=str(tmp_path), split="validation")
    assert "belongs to another split" in refusal(path="parquet", data_dir=str(tmp_path))
    assert sorted(read(path=str(tmp_path), split="all")) == TEXTS


def test_csv_fields_are_separated_by_the_delimiter(tmp_path):
    for name, delimiter in (("a.tsv", "\t"), ("b.csv", ";"), ("c.csv", ","), ("D.TSV.GZ", "\t")):
        lines = "".join(f'{number}{delimiter}"{text}"\n' for number, text in enumerate(TEXTS))
        content = f"id{delimiter}text\n{lines}".encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
        given = None if delimiter in "\t," else delimiter
        assert read(path="csv", data_files=str(tmp_path / name), delimiter=given) == TEXTS
    message = refusal(path="csv", data_files=str(tmp_path / "b.csv"))
    assert """there are: id;text. If its fields are separated by ';', set `delimiter: ";"`""" in message
    assert SourceSection(path="csv", data_files="a", delimiter=r"\t").delimiter == "\t"
    (tmp_path / "b.csv").unlink()
    assert read(path=str(tmp_path)) == TEXTS * 3
    (tmp_path / "json").mkdir()
    write_jsonl(tmp_path / "json" / "a.jsonl", ["x"])
    assert "this source has none" in refusal(path=str(tmp_path / "json"), delimiter=";")


def test_thousands_of_small_files_are_one_source(tmp_path):
    for number in range(2000):
        (tmp_path / f"{number:04}.txt").write_text(f"text {number}")
    source = {"path": str(tmp_path), "sample_by": "document"}
    found = documents(**source)
    assert len(found) == 2000 and found[-1].origin.endswith("1999.txt")
    assert len(source_identity(SourceSection(**source))) == 2001
    assert corpus.Reader(SourceSection(**source)).groups() == [range(2000)]


def test_texts_to_score_may_have_suffixes_in_upper_case(tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"one"))
    write_jsonl(tmp_path / "B.JSONL", ["two", "three"])
    assert file_texts([str(tmp_path / name) for name in ("A.TXT.GZ", "B.JSONL")]) == {
        "A.TXT.GZ": ["one"],
        "B.JSONL": ["two", "three"],
    }


def test_a_limit_reads_only_the_first_documents(tmp_path):
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"{number}{n}" for n in range(4)])
    (tmp_path / "0.jsonl").open("a").write('{"text": ""}\n')
    whole = read(path=str(tmp_path))
    for limit, expected, stopped in (
        ({"max_documents": 7}, whole[:7], True),
        ({"max_documents": 13}, whole, False),
        ({"max_documents": 99}, whole, False),
        ({"max_bytes": 9}, whole[:5], True),  # the empty document is still within
        ({"max_bytes": 10}, whole[:6], True),
        ({"max_bytes": 10, "max_documents": 2}, whole[:2], True),
        ({"max_documents": 3, "split": "train[2:]"}, whole[2:5], True),
    ):
        reader = corpus.Reader(SourceSection(path=str(tmp_path), **limit))
        for _ in range(2):
            assert [document.text for document in reader.read()] == expected, limit
            assert reader.stopped_at_limit == stopped, limit
    assert "the first document has 2 bytes" in refusal(path=str(tmp_path), max_bytes=1)
    (tmp_path / "0.jsonl").open("a").write("broken\n")
    assert read(path=str(tmp_path), max_documents=5) == whole[:5], "what is beyond a limit is not read"


@pytest.fixture
def limited(folder, monkeypatch):
    """A recipe whose second source ends at a limit within its second file."""
    monkeypatch.setattr(packing, "PART_CHARS", 20_000)
    monkeypatch.setattr(packing, "BATCH_CHARS", 4_000)
    texts = small_text(900)
    write_jsonl(folder / "a.jsonl", texts[:300])
    for number in range(2):
        write_jsonl(folder / f"b{number}.jsonl", texts[300 + 300 * number :][:300])
    sources = [
        {"path": "json", "data_files": str(folder / "a.jsonl")},
        {"path": "json", "data_files": str(folder / "b*.jsonl"), "max_documents": 450},
    ]
    return recipe(folder, data__sources=sources)


def test_a_limit_is_counted_in_the_manifest_and_loses_no_token(limited, folder):
    data = prepare(limited)
    first, second = data.manifest["sources"]
    assert "stopped_at_limit" not in first and second["stopped_at_limit"]
    assert second["documents_read"] == 450 and first["documents_read"] == 300
    assert "source 1: only its first 450 documents" in summary(data)
    write_jsonl(folder / "b1.jsonl", small_text(900)[600:750])
    sources = [source.model_copy(update={"max_documents": None}) for source in limited.data.sources]
    whole = prepare(limited.model_copy(update={"data": limited.data.model_copy(update={"sources": tuple(sources)})}))
    assert whole.path != data.path and "stopped_at_limit" not in whole.manifest["sources"][1]
    for split in data.manifest["splits"]:
        assert token_stream(whole, split) == token_stream(data, split)


def test_a_limit_gives_the_same_bytes_after_a_stop_and_in_shards(limited, folder):
    expected = checksums(prepare(limited).path)
    path = prepared_path(limited)
    alone = path.rename(path.with_name("alone"))
    for index in range(2):
        prepare_shard(limited, index, 2)
    work = path.with_name(path.name + ".incomplete")
    for account in sorted((work / "parts").glob("1-*.json"))[::2]:  # as if stopped before these parts were done
        account.unlink()
    assert checksums(prepare(limited).path) == expected
    assert alone.is_dir()


def test_a_limited_training_source_is_refused_in_a_stream(folder):
    sources = [{"path": "json", "data_files": "a.jsonl", "max_bytes": 10}]
    with pytest.raises(ValueError, match="`max_documents` and `max_bytes` of `sources` need prepared data"):
        recipe(folder, data__sources=sources, data__streaming=True, data__validation_fraction=0.0)


def test_recipes_without_the_new_keys_keep_the_names_of_their_prepared_folders(folder):
    data = recipe(folder).data
    assert fingerprint(data, TokenizerSection(pretrained="gpt2"), [["json", ["a", 1, "b"]]]) == "cba820aefa44537a"


def test_an_arrow_stream_that_was_cut_between_two_batches_is_refused(tmp_path):
    """pyarrow, and with it `datasets.load_from_disk`, read it as a shorter one."""
    texts = small_text(3000)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    with pa.ipc.open_stream(file.read_bytes()) as reader:
        schema, batches = reader.schema, list(reader)
    assert len(batches) > 1
    with pa.ipc.new_stream(file, schema) as writer:
        for batch in batches[:2]:
            writer.write(batch)
    file.write_bytes(file.read_bytes()[:-8])  # without the mark of its end
    source = SourceSection(path=str(tmp_path / "saved"))
    with pytest.raises(RecipeError, match="the end of the Arrow stream is missing"):
        list(corpus.Reader(source).read())
    *good, bad = corpus.Reader(source, on_bad_document="skip").read()
    assert [document.text for document in good] == texts[: sum(map(len, batches[:2]))]
    assert bad.problem[0] == "truncated_file"


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_missing_column_is_reported_with_its_file(tmp_path, suffix):
    def write(name, **columns):
        table = pa.table(columns)
        path = tmp_path / name / f"a.{suffix}"
        path.parent.mkdir()
        if suffix == "parquet":
            pyarrow.parquet.write_table(table, path)
            return {"path": "parquet", "data_files": str(path)}
        datasets.Dataset(table).save_to_disk(path.parent / "saved")
        return {"path": str(path.parent / "saved")}

    source = write("other", body=["x"], meta=[{"title": "y"}])
    where = source.get("data_files", source["path"])
    message = refusal(**source)
    assert where in message and "no column 'text'; there are: body, meta.title" in message
    assert message.count("text_column") == 1
    message = refusal(**source, text_template="{body}{meta.id}")
    assert where in message and "text_template" in message and "no column 'meta.id'" in message
    source = write("ids", input_ids=[[1, 2]], attention_mask=[[1, 1]])
    message = refusal(**source)
    advice = f"`data_dir: {source['path']}`" if suffix == "arrow" else "the same `data_files`"
    assert f"The column 'input_ids' has token ids: set `path: tokens`, {advice}" in message
    assert "ids_column: tokens" in refusal(**write("other ids", tokens=[[1, 2]]))
    if suffix == "parquet":
        table = pa.table([pa.array(["left"]), pa.array(["right"])], names=["text", "text"])
        pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
        message = refusal(path="parquet", data_files=str(tmp_path / "twice.parquet"))
        assert "twice.parquet: there are 2 columns with the name 'text'" in message


def test_folders_of_writers_that_have_not_finished_are_left_out(tmp_path, caplog):
    caplog.set_level("INFO", "hfpretrain")
    for name in ("a", "_temporary/0/b", "day=1/c", "_day=2/d", "_e", "day=1/_temporary/f", ".g", "day=1/.h/i"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, [path.stem])
    for source in ({"path": str(tmp_path)}, {"path": "json", "data_dir": str(tmp_path)}):
        reader = corpus.Reader(SourceSection(**source))
        assert sorted(document.text for document in reader.read()) == ["a", "c", "d"]
        (note,) = reader.notes
        assert all(name in note for name in ("_temporary/0/b", "_e", "day=1/_temporary/f")) and note in caplog.text
    whole = {"path": "json", "data_files": str(tmp_path / "**" / "*.jsonl")}
    assert sorted(d.text for d in documents(**whole)) == ["_e", "a", "c", "d"], "the pattern says what data is"
    for pattern in ("_temporary/**/*.jsonl", "_temp*/*/*.jsonl", "_temporary/0/b.jsonl"):
        assert [d.text for d in documents(path="json", data_files=str(tmp_path / pattern))] == ["b"]


def test_a_file_that_is_listed_twice_is_noted(tmp_path, caplog, folder):
    caplog.set_level("INFO", "hfpretrain")
    path = str(folder / "corpus.jsonl")
    made = prepare(recipe(folder, data__sources=[{"path": "json", "data_files": [path, str(folder / "*.jsonl")]}]))
    assert made.manifest["sources"][0]["documents_read"] == 200
    (note,) = made.manifest["reading_notes"]
    assert note == f"data.sources.0.data_files: {path} is listed more than once, but read once"
    assert caplog.text.count(note) == 1 and note in summary(made)


LINES = [json.dumps({"text": f"line {number}"}).encode() + b"\n" for number in range(1000)]


def cut_after(suffix, lines, rest):
    """The compressed bytes of `lines` up to a place where all of them can be decompressed, and of `rest`."""
    if suffix == "gz":
        compressor = zlib.compressobj(wbits=31)
        head = compressor.compress(b"".join(lines)) + compressor.flush(zlib.Z_FULL_FLUSH)
        return head, compressor.compress(b"".join(rest)) + compressor.flush()
    if suffix == "zst":
        compressor = zstandard.ZstdCompressor().compressobj()
        head = compressor.compress(b"".join(lines)) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        return head, compressor.compress(b"".join(rest)) + compressor.flush()
    compress = {"xz": lzma.compress, "bz2": bz2.compress}[suffix]
    return compress(b"".join(lines)), compress(b"".join(rest))


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "garbage after the end"])
@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("kind", ["json", "text", "paragraph", "csv"])
@pytest.mark.parametrize("count", [3, 1000])
def test_all_documents_before_the_damage_of_a_compressed_file_are_read(tmp_path, suffix, damage, kind, count):
    lines = LINES[:count] if kind != "paragraph" else [b"a\n" + line + b"\n" for line in LINES[:count]]
    if kind == "csv":
        lines = [b"text\n", *(f"line {number}\n".encode() for number in range(count))]
    rest = [hashlib.sha512(b"%d" % number).hexdigest().encode() for number in range(200)]  # no line ends
    head, tail = cut_after(suffix, lines, rest)
    if damage == "truncated":
        content = head + tail[:40]
        assert len(tail) > 60
    elif damage == "overwritten":
        content = head + b"\xff" * len(tail)
    else:
        head, _ = cut_after(suffix, [], [])
        whole = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress, "bz2": bz2.compress}[suffix]
        content = whole(b"".join(lines)) + b"garbage that is not compressed"
    path = tmp_path / f"a.{ {'json': 'jsonl', 'csv': 'csv'}.get(kind, 'txt') }.{suffix}"
    path.write_bytes(content)
    keys = {"text": {"sample_by": "line"}, "paragraph": {"sample_by": "paragraph"}}.get(kind, {})
    source = {"path": "text" if kind == "paragraph" else kind, "data_files": str(path), **keys}
    found = documents(on_bad_document="skip", **source)
    assert len(found) == count + 1 and [d.problem is None for d in found] == [*[True] * count, False]
    line = 3 * count + 1 if kind == "paragraph" else len(lines) + 1
    assert (found[-1].row, found[-1].problem[0]) == (line, "truncated_file")
    assert f"{path}:{line}: cannot be read further: " in refusal(**source)


@pytest.mark.parametrize("suffix", ["gz", "xz"])
def test_zeros_after_and_between_compressed_members_are_ignored(tmp_path, suffix):
    compress = {"gz": gzip.compress, "xz": lzma.compress}[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    members = [compress(b"".join(LINES[start : start + 500])) for start in (0, 500)]
    path.write_bytes(b"".join(member + b"\0" * size for member, size in zip(members, (8, 200_000), strict=True)))
    assert read(path="json", data_files=str(path)) == [f"line {number}" for number in range(1000)]
    path.write_bytes(members[0][:-20] + b"\0" * 5000)
    assert f"{path}:" in refusal(path="json", data_files=str(path))


@pytest.mark.parametrize("is_array", [False, True])
def test_a_key_that_is_there_twice_is_a_bad_document(tmp_path, is_array):
    path = tmp_path / "a.jsonl"
    good = '{"text": "a", "id": 1, "id": 2, "meta": {"text": "not the same"}, "b": {"text": 1, "text": 2}}'

    def write(*lines):
        path.write_text("[" + ",".join(lines) + "]" if is_array else "\n".join(lines) + "\n")

    write(good, '{"text": "left", "text": "right"}', json.dumps({"text": 'says "text": "text"'}))
    source = {"path": "json", "data_files": str(path)}
    assert "a.jsonl:2: the object has the key 'text' more than once" in refusal(**source)
    found = documents(on_bad_document="skip", **source)
    assert [d.text for d in found] == ["a", "", 'says "text": "text"'] and found[1].problem[0] == "broken_json"
    write(good, '{"meta": {"text": "x"}, "meta": {"text": "y"}}', '{"meta": {"text": "x", "text": "y"}}')
    found = documents(on_bad_document="skip", **source, text_column="meta.text")
    assert [d.text for d in found] == ["not the same", "", ""]
