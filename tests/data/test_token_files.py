"""Sources of tokens: each format gives the same data as its text, and broken or wrong files are refused."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import hfpretrain, small_text, write_jsonl, write_recipe
from preparation import checksums, recipe, token_stream
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hfpretrain.data import packing, prepared, source_files, token_files
from hfpretrain.data.batches import training_data
from hfpretrain.data.corpus import Reader
from hfpretrain.data.encode import framing_ids, token_bytes, token_texts
from hfpretrain.data.identity import source_identity
from hfpretrain.data.prepare import prepare, prepared_path
from hfpretrain.data.summary import preparation_notes, summary
from hfpretrain.data.token_documents import Vocabulary
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.recipe.schema import RecipeError, SourceSection, TokenizerSection

TEXTS = small_text(200)
MEGATRON_CODES = {"uint16": 8, "int32": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(50))


@pytest.fixture
def folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    return tmp_path


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks that are shorter than many of the documents."""
    monkeypatch.setattr(token_files, "CHUNK_TOKENS", 100)
    monkeypatch.setattr(token_files, "_BATCH_ROWS", 7)


def encoded(tokenizer, texts=TEXTS):
    return [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def flat(documents, eos, dtype="<u2", first=False):
    """All documents with an EOS after each, or before each."""
    return np.concatenate([[eos, *ids] if first else [*ids, eos] for ids in documents]).astype(dtype)


def write_header(path, ids, magic=20240520, version=1):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())


def write_megatron(path, documents, dtype="uint16", sequences_per_document=1):
    """Write a `.bin` and its `.idx` as Megatron-LM does."""
    sequences = [part for ids in documents for part in np.array_split(np.array(ids, dtype), sequences_per_document)]
    path.with_suffix(".bin").write_bytes(b"".join(part.tobytes() for part in sequences))
    lengths = np.array([len(part) for part in sequences], "<i4")
    pointers = ((np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize).astype("<i8")
    counts = np.arange(len(documents) + 1, dtype="<i8") * sequences_per_document
    head = np.array([1], "<u8").tobytes() + bytes([MEGATRON_CODES[dtype]])
    head += np.array([len(lengths), len(counts)], "<u8").tobytes()
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00" + head + lengths.tobytes() + pointers.tobytes() + counts.tobytes()
    )


def write_table(path, rows, kind=None, column="input_ids"):
    pyarrow.parquet.write_table(pa.table({column: pa.array(rows, kind)}), path, row_group_size=30)


def tokens(folder, name, **keywords):
    return {"path": "tokens", "data_files": str(folder / name), **keywords}


def of_tokens(folder, *sources, **changes):
    changes = {"tokenizer": {"pretrained": str(folder / "tokenizer")}, **changes}
    return recipe(folder, data__sources=list(sources), **changes)


def of_text(folder, **changes):
    changes = {"tokenizer": {"pretrained": str(folder / "tokenizer")}, **changes}
    return recipe(folder, data__prepared_dir=str(folder / "of-text"), **changes)


def blocks(made):
    """Checksums of the files with blocks."""
    return {name: checksum for name, checksum in checksums(made.path).items() if "/data-" in name}


def nanogpt(folder, ids, eos):
    flat(ids, eos).tofile(folder / "train.bin")
    return tokens(folder, "train.bin", documents_by="eos")


def flat_uint32(folder, ids, eos):
    flat(ids, eos, "<u4").tofile(folder / "train.bin")
    return tokens(folder, "train.bin", documents_by="eos", dtype="uint32")


def modded_nanogpt(folder, ids, eos):
    write_header(folder / "train.bin", flat(ids, eos, first=True))
    return tokens(folder, "train.bin", documents_by="eos")


def llm_c_llama3(folder, ids, eos):
    write_header(folder / "train.bin", flat(ids, eos, "<u4", first=True), 20240801, 7)
    return tokens(folder, "train.bin", documents_by="eos")


def numpy_flat(folder, ids, eos):
    np.save(folder / "train.npy", flat(ids, eos, "<i8"))
    return tokens(folder, "train.npy", documents_by="eos")


def numpy_big_endian(folder, ids, eos):
    np.save(folder / "train.npy", flat(ids, eos, ">i4"))
    return tokens(folder, "train.npy", documents_by="eos")


def numpy_padded_rows(folder, ids, eos):
    rows = np.full((len(ids), max(map(len, ids)) + 3), eos, np.int32)
    for row, document in zip(rows, ids, strict=True):
        row[: len(document)] = document
    np.save(folder / "train.npy", rows)
    return tokens(folder, "train.npy", documents_by="row")


def megatron(folder, ids, eos):
    write_megatron(folder / "train", ids)
    return tokens(folder, "train.*")


def megatron_with_eod(folder, ids, eos):
    write_megatron(folder / "train", [[*document, eos] for document in ids], "int32", sequences_per_document=3)
    return tokens(folder, "train.bin")


def parquet_rows(folder, ids, eos):
    write_table(folder / "train.parquet", ids)
    return tokens(folder, "train.parquet")


def parquet_large_rows_with_eos(folder, ids, eos):
    rows = [[*document, eos] for document in ids]
    write_table(folder / "train.parquet", rows, pa.large_list(pa.uint16()), column="tokens")
    return tokens(folder, "train.parquet", ids_column="tokens")


def parquet_packed_rows(folder, ids, eos):
    stream = flat(ids, eos)
    stream = np.concatenate([stream, np.full(-len(stream) % 50, eos, "<u2")])
    write_table(folder / "train.parquet", stream.reshape(-1, 50).tolist(), pa.list_(pa.int32(), 50))
    return tokens(folder, "train.parquet", documents_by="eos")


def numpy_packed(folder, ids, eos):
    stream = flat(ids, eos)
    np.save(folder / "train.npy", np.concatenate([stream, np.full(-len(stream) % 50, eos, "<u2")]).reshape(-1, 50))
    return tokens(folder, "train.npy", documents_by="eos")


def write_arrow(path, rows):
    """Write rows of one length in Arrow's stream format."""
    table = pa.table({"input_ids": pa.array(rows.tolist(), pa.list_(pa.int32(), rows.shape[1]))})
    with pa.ipc.new_stream(path, table.schema) as file:
        file.write_table(table, max_chunksize=7)


def arrow_packed_rows(folder, ids, eos):
    stream = flat(ids, eos)
    write_arrow(
        folder / "train.arrow", np.concatenate([stream, np.full(-len(stream) % 50, eos, "<u2")]).reshape(-1, 50)
    )
    return tokens(folder, "train.arrow", documents_by="eos")


def saved_dataset(folder, ids, eos):
    made = datasets.Dataset.from_dict({"input_ids": ids, "length": list(map(len, ids))})
    made.save_to_disk(folder / "saved", num_shards=3)
    datasets.load_from_disk(str(folder / "saved")).map(lambda row: row)  # leaves a cache in the folder
    assert len(list((folder / "saved").glob("*.arrow"))) == 4
    return {"path": "tokens", "data_dir": str(folder / "saved")}


def saved_dict(folder, ids, eos):
    both = {"train": datasets.Dataset.from_dict({"input_ids": ids})}
    both["validation"] = datasets.Dataset.from_dict({"input_ids": ids[:3]})
    datasets.DatasetDict(both).save_to_disk(folder / "saved")
    return {"path": "tokens", "data_dir": str(folder / "saved")}


FORMATS = [
    *(nanogpt, flat_uint32, modded_nanogpt, llm_c_llama3, numpy_flat, numpy_big_endian, numpy_padded_rows),
    *(megatron, megatron_with_eod, parquet_rows, parquet_large_rows_with_eos, parquet_packed_rows),
    *(saved_dataset, saved_dict),
]


@pytest.mark.parametrize("write", FORMATS)
def test_each_format_gives_the_blocks_of_the_same_text(folder, tokenizer, small_chunks, write):
    expected = prepare(of_text(folder))
    ids = encoded(tokenizer)
    made = prepare(of_tokens(folder, write(folder, ids, tokenizer.eos_token_id)))
    for split in ("train-0", "validation"):
        assert token_stream(made, split) == token_stream(expected, split)
    ours, theirs = made.manifest["sources"][0], expected.manifest["sources"][0]
    names = ("documents_read", "documents_kept", "bytes_read", "train", "validation")
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert made.manifest["hygiene"] == expected.manifest["hygiene"]
    counts = ours["from_tokens"]
    num_eos = counts["tokens_read"] - counts["tokens_kept"]
    assert counts["tokens_kept"] == sum(map(len, ids)) and counts["framing"] == (
        {"<|endoftext|>": num_eos} if num_eos else {}
    )
    assert f"source 0: {counts['tokens_read']:,} ids read" in summary(made) and "from_tokens" not in theirs
    prepared.verify(made.path)


def test_the_same_steps_are_trained_from_tokens_and_from_text(folder, tokenizer):
    nanogpt(folder, encoded(tokenizer), tokenizer.eos_token_id)
    weighted = [{**tokens(folder, "train.bin", documents_by="eos"), "weight": 1.0}]
    weighted.append({"path": "json", "data_files": str(folder / "corpus.jsonl"), "weight": 3.0})
    as_text = [{**weighted[1], "weight": weight} for weight in (1.0, 3.0)]
    mixed, text = of_tokens(folder, *weighted), of_text(folder, data__sources=as_text)
    keywords = {"num_processes": 1, "process_index": 0, "document_masking": True}
    steps = []
    for one in (mixed, text):
        data = training_data(one.data, one.training, one.seed, prepare(one), **keywords)
        steps.append([data.step(step) for step in range(5)])
    assert [step.checksum for step in steps[0]] == [step.checksum for step in steps[1]]
    assert [step.tokens.tolist() for step in steps[0]] == [step.tokens.tolist() for step in steps[1]]


@pytest.mark.parametrize(
    "changes",
    [
        {"data__packing": "best_fit"},
        {"data__deduplicate": True},
        {"data__validation_by": "tail", "data__validation_fraction": 0.2},
        {"data__validation_fraction": 0.0},
    ],
)
def test_packing_and_validation_of_tokens_lose_nothing(folder, tokenizer, changes, monkeypatch):
    monkeypatch.setattr(packing, "PART_CHARS", 20_000)
    ids = encoded(tokenizer, TEXTS + TEXTS[:20])
    write_jsonl(folder / "corpus.jsonl", TEXTS + TEXTS[:20])
    source = nanogpt(folder, ids, tokenizer.eos_token_id)
    made, text = prepare(of_tokens(folder, source, **changes)), prepare(of_text(folder, **changes))
    prepared.verify(made.path)
    ours, theirs = made.manifest["sources"][0], text.manifest["sources"][0]
    assert ours["from_tokens"]["tokens_read"] == sum(map(len, ids)) + len(ids)
    if "data__deduplicate" in changes:
        assert ours["dropped"] == theirs["dropped"] == {"duplicate": 20}
        assert ours["from_tokens"]["tokens_dropped"] == sum(map(len, ids[:20]))
    for name in ("documents_read", "documents_kept", "bytes_read", "bytes_dropped"):
        assert ours[name] == theirs[name]
    if changes.get("data__validation_by") != "tail":  # which cuts tokens, not characters
        assert token_stream(made, "train-0") == token_stream(text, "train-0")


@pytest.mark.parametrize("held_out", ["tokens", "text"])
def test_documents_that_are_also_in_validation_are_dropped_whether_they_are_text_or_tokens(folder, tokenizer, held_out):
    ids = encoded(tokenizer)
    write_megatron(folder / "train", ids)
    write_megatron(folder / "held-out", ids[:30])
    write_jsonl(folder / "held-out.jsonl", TEXTS[:30])
    if held_out == "text":
        train, validation = tokens(folder, "train.bin"), {"path": "json", "data_files": str(folder / "held-out.jsonl")}
    else:
        train, validation = {"path": "json", "data_files": str(folder / "corpus.jsonl")}, tokens(folder, "held-out.bin")
    made = prepare(of_tokens(folder, train, data__validation_sources=[validation], data__validation_fraction=0.0))
    assert made.manifest["sources"][0]["dropped"] == {"also_in_validation": 30}
    assert token_stream(made, "validation") == flat(ids[:30], tokenizer.eos_token_id).tolist()
    came_as_tokens = ["from_tokens" in source for source in made.manifest["sources"]]
    assert came_as_tokens == [held_out == "text", held_out == "tokens"]
    prepared.verify(made.path)


def llama(folder):
    """A tokenizer like Llama's: it adds a space and BOS before a text, and has an unknown token and byte tokens."""
    words = ["▁the", "▁a", "▁river", "▁stone", "▁light", "▁runs", "▁", "t", "h", "e", "s"]
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("t", "h")]
    tokens.append("th")
    backend = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    from tokenizers import decoders

    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<pad>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.save_pretrained(folder / "tokenizer")
    return made


@pytest.mark.parametrize("form", ["bos", "both", "padded", "none"])
def test_bos_and_padding_of_files_are_counted_and_not_doubled(folder, form):
    made = llama(folder)
    ids = encoded(made)
    expected = prepare(of_text(folder))
    if form == "bos":
        flat(ids, 1, first=True).tofile(folder / "train.bin")
        source, framing = tokens(folder, "train.bin", documents_by="bos"), {"<s>": 200}
    elif form == "both":
        flat([[1, *document] for document in ids], 2).tofile(folder / "train.bin")
        source, framing = tokens(folder, "train.bin", documents_by="eos"), {"</s>": 200, "<s>": 200}
    elif form == "padded":
        longest = max(map(len, ids)) + 2
        rows = [[1, *document, 2, *[3] * (longest - len(document) - 2)] for document in ids]
        write_table(folder / "train.parquet", rows)
        source = tokens(folder, "train.parquet", documents_by="row")
        framing = {"</s>": 200, "<pad>": 200 * (longest - 2) - sum(map(len, ids)), "<s>": 200}
    else:
        write_table(folder / "train.parquet", ids)
        source, framing = tokens(folder, "train.parquet"), {}
    prepared_tokens = prepare(of_tokens(folder, source))
    assert token_stream(prepared_tokens, "train-0") == token_stream(expected, "train-0")
    assert token_stream(prepared_tokens, "validation") == token_stream(expected, "validation")
    counts = prepared_tokens.manifest["sources"][0]
    assert counts["from_tokens"]["framing"] == framing
    assert counts["bytes_read"] == sum(len(text.encode()) for text in TEXTS)
    prepared.verify(prepared_tokens.path)


def test_documents_may_be_whole_files_and_empty_ones_are_dropped(folder, tokenizer):
    ids = encoded(tokenizer)
    for number in range(3):
        np.array(ids[number], "<u2").tofile(folder / f"part-{number}.bin")
    (folder / "part-3.bin").touch()
    changes = {"data__validation_fraction": 0.0}
    made = prepare(of_tokens(folder, tokens(folder, "part-*.bin", documents_by="file"), **changes))
    assert made.manifest["sources"][0]["dropped"] == {"empty": 1}
    assert token_stream(made, "train-0") == flat(ids[:3], tokenizer.eos_token_id).tolist()
    assert made.documents("train-0", 0)[0] == (str(folder / "part-0.bin"), 1)
    write_table(folder / "rows.parquet", [[], ids[0], [tokenizer.eos_token_id], ids[1]])
    made = prepare(of_tokens(folder, tokens(folder, "rows.parquet"), **changes))
    assert made.manifest["sources"][0]["dropped"] == {"empty": 2}
    assert made.manifest["sources"][0]["from_tokens"]["framing"] == {"<|endoftext|>": 1}
    prepared.verify(made.path)


def test_slices_count_documents_of_tokens(folder, tokenizer):
    source = nanogpt(folder, encoded(tokenizer), tokenizer.eos_token_id)
    made = prepare(of_tokens(folder, {**source, "split": "train[:25%]"}))
    assert made.manifest["sources"][0]["documents_read"] == 50


@pytest.mark.parametrize("limit", [{"max_documents": 50}, {"max_bytes": 5000}])
def test_a_limit_reads_the_same_documents_of_tokens_as_of_text(folder, tokenizer, limit):
    text = {"path": "json", "data_files": str(folder / "corpus.jsonl"), **limit}
    expected = prepare(of_text(folder, data__sources=[text]))
    source = nanogpt(folder, encoded(tokenizer), tokenizer.eos_token_id)
    made = prepare(of_tokens(folder, {**source, **limit}))
    for split in ("train-0", "validation"):
        assert token_stream(made, split) == token_stream(expected, split)
    ours, theirs = made.manifest["sources"][0], expected.manifest["sources"][0]
    for name in ("documents_read", "bytes_read", "stopped_at_limit"):
        assert ours[name] == theirs[name], name
    assert ours["documents_read"] < 200 and ours["stopped_at_limit"]
    assert "source 0: only its first" in summary(made)


def test_a_saved_dict_of_tokens_has_the_splits_it_was_saved_with(folder, tokenizer):
    source = saved_dict(folder, encoded(tokenizer), tokenizer.eos_token_id)
    made = prepare(of_tokens(folder, {**source, "split": "validation"}, data__validation_fraction=0.0))
    assert made.manifest["sources"][0]["documents_read"] == 3
    assert "has the splits: train, validation" in refusal(folder, {**source, "split": "test"})
    (folder / "saved" / "train" / "state.json").write_text("{")
    message = refusal(folder, source)
    assert "data.sources.0.data_dir" in message and "train is damaged: state.json" in message


def test_special_tokens_of_a_file_are_counted_and_stay_tokens(folder, tokenizer):
    own = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(50))
    own.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    own.save_pretrained(folder / "tokenizer")
    mark = own.convert_tokens_to_ids("<mark>")
    write_table(folder / "train.parquet", [[*ids[:5], mark, *ids[5:]] for ids in encoded(own)])
    made = prepare(of_tokens(folder, tokens(folder, "train.parquet"), data__validation_fraction=0.0))
    assert token_stream(made, "train-0").count(mark) == 200
    assert made.manifest["sources"][0]["special_tokens"] == {"<mark>": 200} and not preparation_notes(made)


def test_identity_of_token_files_is_their_content(folder, tokenizer):
    write_megatron(folder / "train", encoded(tokenizer))
    source = SourceSection(**tokens(folder, "train.bin"))
    before = source_identity(source)
    assert [name for name, *_ in before[1:]] == ["train.bin", "train.idx"]
    (folder / "moved").mkdir()
    for name in ("train.bin", "train.idx"):
        (folder / "moved" / name).write_bytes((folder / name).read_bytes())
    assert source_identity(SourceSection(**tokens(folder, "moved/train.bin"))) == before
    write_megatron(folder / "moved" / "train", encoded(tokenizer)[::-1])
    assert source_identity(SourceSection(**tokens(folder, "moved/train.bin"))) != before


def test_only_keys_that_change_the_tokens_change_the_name_of_the_prepared_folder(folder):
    text = of_text(folder)
    content = text.model_dump(mode="json")
    assert {"documents_by", "dtype", "ids_column", "min_agreement"} <= content["data"]["sources"][0].keys()
    source = tokens(folder, "corpus.parquet")
    write_table(folder / "corpus.parquet", [[20, 21], [22]])
    path = prepared_path(of_tokens(folder, source))
    assert path == prepared_path(of_tokens(folder, {**source, "min_agreement": 0}))
    assert path != prepared_path(of_tokens(folder, {**source, "documents_by": "row"}))


def test_token_texts_are_the_bytes_of_the_text(tokenizer):
    texts = token_texts(tokenizer, 320)
    assert b"".join(texts[n] for n in encoded(tokenizer)[0]) == TEXTS[0].encode()
    assert token_bytes(tokenizer, 320).tolist() == list(map(len, texts))
    assert framing_ids(tokenizer) == [0, 1]


def refusal(folder, source, **changes):
    with pytest.raises(RecipeError) as caught:
        prepare(of_tokens(folder, source, **changes))
    return str(caught.value)


TRUNCATED = ["train.bin", "train.npy", "train.parquet", "train.arrow", "header.bin", "megatron.bin"]


@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_files_are_refused(folder, tokenizer, name):
    ids = encoded(tokenizer)
    path, eos = folder / name, tokenizer.eos_token_id
    by = {} if name in ("train.parquet", "train.arrow", "megatron.bin") else {"documents_by": "eos"}
    if name == "train.bin":
        flat(ids, eos).tofile(path)
    elif name == "train.npy":
        np.save(path, flat(ids, eos))
    elif name == "train.parquet":
        write_table(path, ids)
    elif name == "train.arrow":
        table = pa.table({"input_ids": ids})
        with pa.ipc.new_stream(path, table.schema) as file:
            file.write_table(table, max_chunksize=20)
    elif name == "header.bin":
        write_header(path, flat(ids, eos))
    else:
        write_megatron(path, ids)
    path.write_bytes(path.read_bytes()[:-1001])
    message = refusal(folder, tokens(folder, name, **by))
    assert message.startswith("data.sources.0: ") and str(path) in message and "truncated" in message


@pytest.mark.parametrize(("cut", "what"), [(20, "begins with MMIDIDX"), (500, "truncated")])
def test_truncated_indices_are_refused(folder, tokenizer, cut, what):
    write_megatron(folder / "train", encoded(tokenizer))
    (folder / "train.idx").write_bytes((folder / "train.idx").read_bytes()[:cut])
    assert "train.idx" in (message := refusal(folder, tokens(folder, "train.bin"))) and what in message


def test_an_index_of_another_file_is_refused(folder, tokenizer):
    write_megatron(folder / "train", encoded(tokenizer))
    index = (folder / "train.idx").read_bytes()
    write_megatron(folder / "train", encoded(tokenizer)[:-1])
    (folder / "train.idx").write_bytes(index)
    assert "train.bin has" in refusal(folder, tokens(folder, "train.bin"))
    (folder / "train.idx").write_bytes(index[:17] + bytes([7]) + index[18:])
    assert "no integer type" in refusal(folder, tokens(folder, "train.bin"))


def test_unknown_headers_are_refused(folder, tokenizer):
    ids = flat(encoded(tokenizer), tokenizer.eos_token_id)
    for magic, version in ((20240520, 2), (20231231, 1)):
        write_header(folder / "train.bin", ids, magic, version)
        message = refusal(folder, tokens(folder, "train.bin", documents_by="eos"))
        assert f"magic number {magic}, version {version}" in message and "20240520" in message
    write_header(folder / "train.bin", ids)
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes() + bytes(100))
    assert "longer than its header says" in refusal(folder, tokens(folder, "train.bin", documents_by="eos"))


def test_wrong_types_of_ids_are_refused(folder, tokenizer):
    ids, eos = encoded(tokenizer), tokenizer.eos_token_id
    path = folder / "train.bin"
    flat(ids, eos, "<u4").tofile(path)
    assert "data.sources.0.dtype: every second id" in refusal(folder, tokens(folder, "train.bin", documents_by="eos"))
    flat([ids[0] * 2] * 100, eos).tofile(path)
    assert "outside of the vocabulary" in refusal(
        folder, tokens(folder, "train.bin", documents_by="eos", dtype="uint32")
    )
    path.write_bytes(path.read_bytes()[:-2])
    assert "truncated, or `dtype` is wrong" in refusal(
        folder, tokens(folder, "train.bin", documents_by="eos", dtype="uint32")
    )
    np.save(folder / "train.npy", np.zeros(100, np.float32))
    assert "float32" in refusal(folder, tokens(folder, "train.npy", documents_by="eos"))
    np.save(folder / "train.npy", np.zeros((2, 2, 2), int))
    assert "3 dimensions" in refusal(folder, tokens(folder, "train.npy", documents_by="eos"))
    write_table(folder / "train.parquet", ["a", "b"])
    assert "ids_column: " in (message := refusal(folder, tokens(folder, "train.parquet"))) and "string" in message
    assert "no column 'tokens'; there are: input_ids" in refusal(
        folder, tokens(folder, "train.parquet", ids_column="tokens")
    )
    np.save(folder / "train.npy", flat(ids, eos))
    np.save(folder / "train.npy", flat(ids, eos))
    assert "records the type" in refusal(folder, tokens(folder, "train.npy", documents_by="eos", dtype="uint16"))
    np.save(folder / "train.npy", flat(ids, eos))
    (folder / "train.npy").rename(path)
    assert prepare(of_tokens(folder, tokens(folder, "train.bin", documents_by="eos")))  # by its first bytes


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("size", [None, 2])
def test_a_missing_value_is_named_by_its_row(folder, small_chunks, suffix, size):
    kind = pa.list_(pa.int32()) if size is None else pa.list_(pa.int32(), size)
    rows = [[5, 6]] * 20
    for at, value, more in ((11, None, ""), (16, [5, None], ""), (8, None, " (2 such rows among the first 14)")):
        rows_now = [*rows]
        rows_now[at] = value
        if more:
            rows_now[10] = [None, 6]
        table = pa.table({"input_ids": pa.array(rows_now, kind)})
        if suffix == "parquet":
            pyarrow.parquet.write_table(table, folder / "train.parquet")
        else:
            with pa.ipc.new_file(folder / "train.arrow", table.schema) as file:
                file.write_table(table)
        message = refusal(folder, tokens(folder, f"train.{suffix}", documents_by="row"))
        assert f"train.{suffix}:{at + 1}: the column 'input_ids' has a missing value{more}; remove" in message


def test_a_column_that_is_there_twice_is_refused(folder):
    table = pa.table([pa.array([[5, 6]]), pa.array([[7]])], names=["input_ids", "input_ids"])
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    assert "train.parquet has 2 columns with the name 'input_ids'" in refusal(folder, tokens(folder, "train.parquet"))


def test_an_index_in_upper_case_is_found(folder, tokenizer):
    write_megatron(folder / "lower", encoded(tokenizer), "int32")
    expected = blocks(prepare(of_tokens(folder, tokens(folder, "lower.bin"))))
    (folder / "upper").mkdir()
    for suffix in (".bin", ".idx"):
        (folder / "lower").with_suffix(suffix).rename(folder / "upper" / f"A{suffix.upper()}")
    for source in (tokens(folder, "upper/A.BIN"), {"path": "tokens", "data_dir": str(folder / "upper")}):
        assert blocks(prepare(of_tokens(folder, source))) == expected
    (folder / "upper" / "A.BIN").rename(folder / "upper" / "A.bin")
    assert blocks(prepare(of_tokens(folder, tokens(folder, "upper/*")))) == expected
    before = source_identity(SourceSection(**tokens(folder, "upper/A.bin")))
    write_megatron(folder / "upper" / "A", encoded(tokenizer)[:100] * 2, "int32")
    assert source_identity(SourceSection(**tokens(folder, "upper/A.bin"))) != before


@pytest.mark.parametrize("write", [nanogpt, numpy_flat, numpy_packed, parquet_packed_rows, arrow_packed_rows])
def test_documents_that_continue_in_the_next_file_are_noted(folder, tokenizer, write, caplog):
    ids, eos = encoded(tokenizer)[:60], tokenizer.eos_token_id
    caplog.set_level("INFO", "hfpretrain")
    source_files.log_once.cache_clear()
    names = []
    for number, (first, last) in enumerate([(0, 20), (20, 40), (40, 60)]):
        made = write(folder, ids[first:last], eos)
        path = Path(made["data_files"])
        names.append(str(path.rename(path.with_stem(f"{number}"))))
    source = {**made, "data_files": names}
    assert "reading_notes" not in prepare(of_tokens(folder, source)).manifest
    stream = flat(ids, eos)
    packed = np.array_split(np.concatenate([stream, np.full(-len(stream) % 300, eos, "<u2")]).reshape(-1, 50), 3)
    for name, rows in zip(names, packed, strict=True):
        if rows[-1, -1] == eos:
            rows[-1, -1] = rows[-1, -2]
        if write is arrow_packed_rows:
            write_arrow(Path(name), rows)
        elif write is parquet_packed_rows:
            write_table(Path(name), rows.tolist(), pa.list_(pa.int32(), 50))
        elif name.endswith("bin"):
            rows.astype("<u2").tofile(name)
        else:
            np.save(name, rows if write is numpy_packed else rows.reshape(-1))
    made = prepare(of_tokens(folder, {**source, "min_agreement": 0}))
    (note,) = made.manifest["reading_notes"]
    assert note.startswith("data.sources.0: at 2 of 2 borders between files, there is no EOS;") and note in caplog.text
    assert note in summary(made)


@pytest.mark.parametrize("part", ["middle", "end"])
def test_tokens_of_another_tokenizer_are_found_anywhere_in_a_file(folder, tokenizer, small_chunks, part):
    section = TokenizerSection(algorithm="byte_level_bpe", vocab_size=320)
    other = train_tokenizer(section, ["unlike text, quite other"] * 9)
    ours, theirs = encoded(tokenizer) * 5, encoded(other)[:100]
    ids = [*ours[:500], *theirs, *ours[500:]] if part == "middle" else [*ours, *theirs]
    source = nanogpt(folder, ids, tokenizer.eos_token_id)
    message = refusal(folder, source)
    assert "min_agreement" in message and "of its documents" in message
    for write in (nanogpt, parquet_rows, megatron):  # tokens of the same tokenizer are never refused
        assert prepare(of_tokens(folder, write(folder, encoded(tokenizer) * 5, tokenizer.eos_token_id)))


@pytest.mark.parametrize(
    ("write", "where"), [(nanogpt, "position 3,000"), (parquet_rows, "position 2 of row 151"), (megatron, "row 151")]
)
def test_the_largest_id_outside_of_the_vocabulary_is_named(folder, tokenizer, small_chunks, write, where):
    ids = encoded(tokenizer)
    eos = tokenizer.eos_token_id
    ids[10][0], ids[150][2] = 400, 9999
    if write is nanogpt:
        source = write(folder, ids, eos)
        stream = np.fromfile(folder / "train.bin", "<u2")
        stream[stream == 9999], stream[3000] = 20, 9999
        stream.tofile(folder / "train.bin")
    else:
        source = write(folder, ids, eos)
    message = refusal(folder, source)
    assert "largest id outside of the vocabulary is 9,999" in message and where in message and "train." in message
    assert "up to 319" in message and "tokenizer.pretrained" in message
    write_table(folder / "negative.parquet", [[5, -100, 6], [7]])
    assert "is -100 at position 1 of row 1" in refusal(folder, tokens(folder, "negative.parquet"))


def test_tokens_of_another_tokenizer_are_refused(folder, tokenizer):
    section = TokenizerSection(algorithm="byte_level_bpe", vocab_size=320)
    other = train_tokenizer(section, ["unlike text, quite other"] * 9)
    source = nanogpt(folder, encoded(other), other.eos_token_id)
    message = refusal(folder, source)
    assert "data.sources.0.min_agreement" in message and "another tokenizer" in message and "train.bin" in message
    made = prepare(of_tokens(folder, {**source, "min_agreement": 0}))
    assert made.manifest["sources"][0]["documents_read"] == 200


def test_documents_without_known_bounds_are_refused(folder, tokenizer):
    ids, eos = encoded(tokenizer), tokenizer.eos_token_id
    source = nanogpt(folder, ids, eos)
    del source["documents_by"]
    assert "documents_by: is missing" in refusal(folder, source)
    assert "has no rows" in refusal(folder, {**source, "documents_by": "row"})
    message = refusal(folder, {**source, "documents_by": "file"})
    assert "<|endoftext|> (id 0)" in message and "train.bin:1" in message and "documents_by" in message
    np.concatenate(ids).astype("<u2").tofile(folder / "train.bin")
    assert "contains no EOS (<|endoftext|>, id 0)" in refusal(folder, {**source, "documents_by": "eos"})
    packed = parquet_packed_rows(folder, ids, eos)
    del packed["documents_by"]
    assert "rows of one length" in refusal(folder, packed)
    write_table(folder / "train.parquet", [[*ids[0], eos, *ids[1]], ids[2]])
    assert "train.parquet:1" in refusal(folder, packed)
    made = prepare(of_tokens(folder, packed, data__on_bad_document="skip", data__validation_fraction=0.0))
    assert made.manifest["sources"][0]["dropped"] == {"framing_inside": 1}
    assert made.manifest["sources"][0]["from_tokens"]["tokens_dropped"] == len(ids[0]) + len(ids[1]) + 1
    prepared.verify(made.path)


def test_files_of_other_kinds_are_refused(folder, tokenizer):
    assert "ends in none of" in refusal(folder, tokens(folder, "corpus.jsonl"))
    (folder / "train.bin.gz").write_bytes(b"\x1f\x8b")
    assert "compressed" in refusal(folder, tokens(folder, "train.bin.gz"))
    (folder / "train.bin").write_bytes(b"PK\x03\x04" + bytes(range(200)))
    assert "zip archive" in refusal(folder, tokens(folder, "train.bin", documents_by="eos"))
    write_megatron(folder / "train", encoded(tokenizer))
    assert "ends in none of" in refusal(folder, tokens(folder, "train.idx"))


def test_a_recipe_with_tokens_needs_a_tokenizer_and_no_keys_of_text(folder, tokenizer):
    nanogpt(folder, encoded(tokenizer), tokenizer.eos_token_id)
    source = tokens(folder, "train.bin", documents_by="eos")
    result = hfpretrain("check", str(write_recipe(folder, data__sources=[source])))
    assert result.returncode == 2 and "tokenizer.pretrained: is missing; data.sources.0 has tokens" in result.stderr
    changes = {"data__sources": [source], "tokenizer": {"pretrained": str(folder / "tokenizer")}}
    path = str(write_recipe(folder, **changes))
    assert hfpretrain("check", path).returncode == 0
    result = hfpretrain("prepare", path)
    assert result.returncode == 0 and "200 <|endoftext|> around documents" in result.stdout, result.stderr
    assert hfpretrain("verify", result.stdout.split()[2]).returncode == 0
    flat(encoded(tokenizer), tokenizer.eos_token_id, "<u4").tofile(folder / "train.bin")
    result = hfpretrain("check", path)
    assert result.returncode == 2 and "data.sources.0.dtype" in result.stderr
    of_text = {"special_tokens": "tokens", "text_column": "body", "text_template": "{a}", "delimiter": ";"}
    for key, value in {**of_text, "sample_by": "line"}.items():
        with pytest.raises(ValueError, match=f"`{key}` is only for text"):
            SourceSection(**source, **{key: value})
    with pytest.raises(ValueError, match="`dtype` is only for `path: tokens`"):
        SourceSection(path="json", data_files="a.jsonl", dtype="uint16")
    with pytest.raises(ValueError, match="`streaming` reads text"):
        of_tokens(folder, source, data__streaming=True)


def test_tokens_that_are_needed_as_text_are_refused(folder, tokenizer):
    source = SourceSection(**nanogpt(folder, encoded(tokenizer), tokenizer.eos_token_id))
    with pytest.raises(RecipeError, match="text is needed"):
        list(Reader(source).read())


def test_a_tokenizer_that_changes_text_has_no_exact_text(tokenizer, folder):
    from tokenizers import normalizers

    assert Vocabulary(tokenizer).has_exact_text
    assert not Vocabulary(llama(folder)).has_exact_text  # it reads " x" as "x"
    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(5))
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert not Vocabulary(made).has_exact_text


def test_tokens_of_a_tokenizer_without_a_decoder_are_read_with_a_warning(folder, tokenizer, caplog):
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    content["decoder"] = None
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    made = prepare(of_tokens(folder, nanogpt(folder, encoded(tokenizer), tokenizer.eos_token_id)))
    assert made.manifest["sources"][0]["documents_read"] == 200 and "can't check" in caplog.text
