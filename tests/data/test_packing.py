import json
import shutil

import datasets
import numpy as np
import pytest
from conftest import small_text, write_jsonl
from preparation import recipe, token_stream

from hfpretrain import files
from hfpretrain.data import packing
from hfpretrain.data import prepared as prepared_format
from hfpretrain.data.prepare import load_prepared_tokenizer, prepare, prepared_path
from hfpretrain.data.prepared import PreparedData
from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.recipe.schema import RecipeError, TokenizerSection


def test_every_document_is_packed_once_with_all_its_tokens(folder):
    prepared = prepare(recipe(folder))
    tokenizer = load_prepared_tokenizer(prepared)
    text = tokenizer.decode(token_stream(prepared, "train-0")).split(tokenizer.eos_token)
    text += tokenizer.decode(token_stream(prepared, "validation")).split(tokenizer.eos_token)
    assert sorted(filter(None, text)) == sorted(small_text(200))


def test_bytes_and_tokens_of_the_manifest_add_up(folder):
    prepared = prepare(recipe(folder))
    manifest = prepared.manifest
    splits = manifest["splits"]
    for entry in splits.values():
        assert entry["tokens"] + entry["separators"] == entry["rows"] * 32 + entry["remainder"]
        assert entry["remainder"] == len(entry["remainder_ids"]) < 32
        assert entry["bytes"] == entry["token_bytes"]
    assert sum(entry["documents"] for entry in splits.values()) == 200
    assert sum(entry["bytes"] for entry in splits.values()) == sum(len(text.encode()) for text in small_text(200))
    assert files.damage(prepared.path) is None


def test_datasets_loads_the_blocks(folder):
    prepared = prepare(recipe(folder))
    dataset = datasets.load_from_disk(str(prepared.path / "train-0"))
    assert len(dataset) == prepared.manifest["splits"]["train-0"]["rows"]
    assert dataset.features["input_ids"].feature.dtype == "uint16" and len(dataset[0]["input_ids"]) == 32


def test_a_large_vocabulary_is_stored_as_uint32(folder):
    made = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(50))
    made.save_pretrained(folder / "tokenizer")
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"extra{number}": len(made) + number for number in range(70_000)}
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    large = recipe(folder, tokenizer={"pretrained": str(folder / "tokenizer")})
    assert prepare(large).blocks("train-0")[0].dtype == np.uint32


def test_bytes_on_disk_do_not_depend_on_how_documents_arrive(folder, monkeypatch):
    monkeypatch.setattr(prepared_format, "ROWS_PER_BATCH", 8)
    monkeypatch.setattr(packing, "PART_CHARS", 10_000)
    first = prepare(recipe(folder)).manifest["files"]
    monkeypatch.setattr(packing, "BATCH_DOCUMENTS", 7)
    second = prepare(recipe(folder, data__prepared_dir=str(folder / "other")), num_workers=1).manifest["files"]
    assert sum(name.endswith(".arrow") for name in first) > 8 and first == second


def test_text_that_contains_the_name_of_eos_ends_no_document(folder):
    write_jsonl(folder / "corpus.jsonl", [*small_text(100), "before <|endoftext|> after" * 3])
    prepared = prepare(recipe(folder))
    tokenizer = load_prepared_tokenizer(prepared)
    ids = token_stream(prepared, "train-0") + token_stream(prepared, "validation")
    assert ids.count(tokenizer.eos_token_id) == 101
    assert "before <|endoftext|> after" in tokenizer.decode(ids)


def test_unchanged_data_are_reused_and_a_change_gives_another_folder(folder):
    path = prepare(recipe(folder)).path
    modified = (path / "manifest.json").stat().st_mtime_ns
    assert prepare(recipe(folder, optimizer__lr=1e-4)).path == path
    assert (path / "manifest.json").stat().st_mtime_ns == modified
    others = [
        prepared_path(recipe(folder, data__block_size=16)),
        prepared_path(recipe(folder, tokenizer__vocab_size=330)),
        prepared_path(recipe(folder, data__validation_fraction=0.2)),
    ]
    write_jsonl(folder / "corpus.jsonl", small_text(201))
    others.append(prepared_path(recipe(folder)))
    assert len({path, *others}) == 5


def test_moved_files_are_not_prepared_again(folder):
    (folder / "a").mkdir()
    write_jsonl(folder / "a" / "held_out.jsonl", small_text(20, seed=1))
    shutil.copy(folder / "corpus.jsonl", folder / "a")
    prepare(recipe(folder)).path.joinpath("tokenizer").rename(folder / "a" / "tokenizer")

    def path(parent):
        return prepared_path(
            recipe(
                folder,
                data__sources=[{"path": "json", "data_files": str(folder / parent / "corpus.jsonl")}],
                data__validation_sources=[{"path": "json", "data_files": [str(folder / parent / "held_out.jsonl")]}],
                data__validation_fraction=0,
                tokenizer={"pretrained": str(folder / parent / "tokenizer")},
            )
        )

    first = path("a")
    shutil.copytree(folder / "a", folder / "b", copy_function=shutil.copyfile)
    assert path("b") == first
    tokens = folder / "b" / "tokenizer" / "tokenizer_config.json"
    tokens.write_text(tokens.read_text() + " ")
    assert path("b") != first


def test_a_folder_without_manifest_is_prepared_again(folder):
    prepared = prepare(recipe(folder))
    (prepared.path / "manifest.json").unlink()
    assert PreparedData.open(prepared.path) is None
    assert files.damage(prepare(recipe(folder)).path) is None


def test_damage_is_reported_with_the_file(folder):
    path = prepare(recipe(folder)).path
    shard = path / "train-0" / "data-0-00000-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "data-0-00000-00000.arrow" in files.damage(path) and "checksum" in files.damage(path)
    shard.write_bytes(content[:-1])
    assert "bytes" in files.damage(path)
    shard.unlink()
    assert "data-0-00000-00000.arrow" in files.damage(path) and "missing" in files.damage(path)


def test_weighted_sources_get_streams_of_their_own(folder):
    write_jsonl(folder / "second.jsonl", small_text(60, seed=1))
    sources = [
        {"path": "json", "data_files": str(folder / "corpus.jsonl"), "weight": 3},
        {"path": "json", "data_files": str(folder / "second.jsonl"), "weight": 1},
    ]
    prepared = prepare(recipe(folder, data__sources=sources))
    assert prepared.train_splits == ["train-0", "train-1"]
    documents = [prepared.manifest["splits"][name]["documents"] for name in ("train-0", "train-1", "validation")]
    assert sum(documents) == 260 and documents[0] > documents[1] > 0
    for source in sources:
        del source["weight"]
    assert prepare(recipe(folder, data__sources=sources)).train_splits == ["train-0"]


@pytest.mark.parametrize(
    ("documents", "changes", "message"),
    [
        (["", ""], {}, r"data\.sources\.0: the corpus is empty"),
        (["short"], {"data__validation_fraction": 0.0}, "less than one block of 32"),
        (small_text(5), {"data__validation_fraction": 1e-9}, "data.validation_fraction: the validation split is empty"),
    ],
)
def test_too_little_text_is_refused(folder, documents, changes, message):
    write_jsonl(folder / "corpus.jsonl", documents)
    with pytest.raises(RecipeError, match=message):
        prepare(recipe(folder, **changes))


def test_dropped_documents_are_counted(folder):
    documents = small_text(100)
    write_jsonl(folder / "corpus.jsonl", ["", *documents, ""])
    held_out = write_jsonl(folder / "held_out.jsonl", documents[:7])
    sources = [{"path": "json", "data_files": str(held_out)}]
    prepared = prepare(recipe(folder, data__validation_sources=sources, data__validation_fraction=0.0))
    assert prepared.manifest["sources"][0]["dropped"] == {"also_in_validation": 7, "empty": 2}
    assert prepared.manifest["splits"]["train-0"]["documents"] == 93


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, p: m["splits"]["train-0"].update(tokens=1), "tokens on disk, "),
        (lambda m, p: m["splits"]["train-0"].update(rows=1), "blocks on disk"),
        (lambda m, p: m["splits"]["train-0"]["remainder_ids"].append(5), "tokens on disk"),
        (lambda m, p: m["sources"][0].update(documents_read=7), "source 0: 7 documents read"),
        (lambda m, p: m["sources"][0].update(bytes_read=7), "source 0: 7 bytes read"),
        (lambda m, p: m["files"].pop("train-0/state.json"), "no entry for train-0/state.json"),
        (lambda m, p: (p / "train-0" / "data-more.arrow").write_bytes(b"x"), "no entry for train-0/data-more.arrow"),
        (lambda m, p: m.pop("splits"), "not a manifest of prepared data: splits missing"),
    ],
)
def test_verify_refuses_counts_that_do_not_match(folder, change, message):
    path = prepare(recipe(folder)).path
    prepared_format.verify(path)
    manifest = files.manifest_of(path)
    change(manifest, path)
    del manifest["manifest_sha256"]  # a wrong manifest may have a correct checksum
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=message):
        prepared_format.verify(path)
