"""Prepared data and the order of training where stages change the block size."""

import json

import numpy as np
import pytest
import torch
from conftest import small_text, write_jsonl
from preparation import recipe, token_stream

from hfpretrain import load_recipe, training_batches
from hfpretrain.data import packing
from hfpretrain.data.batches import epochs_by_source, training_data
from hfpretrain.data.inspection import describe_step
from hfpretrain.data.ledger import Consumption
from hfpretrain.data.order import data_step, steps_of_stages
from hfpretrain.data.prepare import prepare, prepared_path
from hfpretrain.data.prepared import verify
from hfpretrain.evaluation.validation import ValidationSets
from hfpretrain.recipe.schema import RecipeError

STAGES = [{"from_tokens": 768, "block_size": 128}, {"from_tokens": 1536, "block_size": 64}]
"""After 3 and 6 steps of 256 tokens; the first blocks have 32."""


@pytest.fixture
def texts(folder, monkeypatch):
    """A folder with documents of 20 to 600 words, which preparation divides into several parts."""
    monkeypatch.setattr(packing, "PART_CHARS", 20_000)
    joined = [" ".join(small_text(1 + seed % 5, seed)) for seed in range(150)]
    write_jsonl(folder / "corpus.jsonl", joined)
    return folder


def made(folder, stages=STAGES, **changes):
    changes = {"model__config__max_position_embeddings": 128, "training__max_steps": 9, **changes}
    changes.setdefault("training__micro_batch_size", 4)
    return recipe(folder, data__stages=stages, **changes)


def order(one, prepared, **process):
    process = {"num_processes": 1, "process_index": 0, "document_masking": True, **process}
    return training_data(one.data, one.training, one.seed, prepared, **process)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_block_size_has_all_documents(texts, packing):
    one = made(texts, data__packing=packing)
    prepared = prepare(one)
    names = ["train-0", "train-0-128", "train-0-64"]
    assert list(prepared.manifest["splits"]) == [*names, "validation"]
    assert [prepared.block_size(name) for name in names] == [32, 128, 64]
    assert prepared.train_splits == ["train-0"] and prepared.train_splits_of(64) == ["train-0-64"]
    splits = [prepared.manifest["splits"][name] for name in names]
    for key in ("documents", "bytes", "tokens"):
        assert len({split[key] for split in splits}) == 1
    # A short corpus has its documents in one part, and its tokens in the same order for each block size.
    counted = [np.bincount(token_stream(prepared, name), minlength=320) for name in names]
    eos = prepared.manifest["eos_token_id"]
    for counts, split in zip(counted, splits, strict=True):
        counts[eos] -= split["separators"] + split["padding"]
        np.testing.assert_array_equal(counts, counted[0])
    assert sum(counted[0]) == splits[0]["tokens"]
    verify(prepared.path)
    # Documents are counted once, and not once for each block size.
    source = prepared.manifest["sources"][0]
    assert source["train"]["documents"] == splits[0]["documents"]
    assert source["documents_kept"] == source["train"]["documents"] + source["validation"]["documents"]


def test_a_token_too_few_in_one_block_size_is_found(texts):
    prepared = prepare(made(texts))
    path = prepared.path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    split = manifest["splits"]["train-0-128"]
    split["tokens"], split["separators"] = split["tokens"] - 1, split["separators"] + 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match="train-0-128 has"):
        verify(prepared.path)


def test_text_without_a_new_block_size_is_prepared_as_before(texts):
    assert prepared_path(made(texts, [])) == prepared_path(made(texts, [{"from_tokens": 768, "block_size": 32}]))
    assert prepared_path(made(texts, [])) != prepared_path(made(texts))


def test_a_block_size_that_the_text_does_not_fill_is_refused(texts):
    stages = [{"from_tokens": 65536, "block_size": 65536}]
    changes = {"training__tokens_per_step": 65536, "data__validation_fraction": 0.0}
    with pytest.raises(RecipeError, match=r"less than one block of 65536; lower the block_size of the stage"):
        prepare(made(texts, stages, **changes))


def test_validation_blocks_have_the_largest_size(texts):
    prepared = prepare(made(texts))
    assert prepared.block_size("validation") == 128
    sets = ValidationSets(prepared)
    batches = list(sets.batches(batch_size=2, process_index=0, num_processes=1, document_masking=True))
    assert {batch["input_ids"].shape for batch in batches} == {(2, 128)}


def test_the_order_is_a_table_of_stages(texts):
    one = made(texts)
    prepared = prepare(one)
    data = order(one, prepared)
    sizes = [data.part(step).rows(step).shape for step in range(9)]
    assert sizes == [(8, 32)] * 3 + [(2, 128)] * 3 + [(4, 64)] * 3
    seen = [
        (data.part(step).block_size, row) for step in range(9) for _, row, _ in data.part(step).locate_sequences(step)
    ]
    assert len(set(seen)) == len(seen) == 3 * (8 + 2 + 4)  # no block comes twice within an epoch
    assert epochs_by_source(one.data, one.training, one.seed, prepared) == [
        sum(
            3 * count / prepared.manifest["splits"][name]["rows"]
            for name, count in {"train-0": 8, "train-0-128": 2, "train-0-64": 4}.items()
        )
    ]


def test_a_stage_with_the_same_block_size_continues_the_order(texts):
    one, plain = made(texts, [{"from_tokens": 768, "block_size": 32, "micro_batch_size": 8}]), made(texts, [])
    prepared = prepare(one)
    first, second = (order(each, prepared) for each in (one, plain))
    assert [first.checksum(step) for step in range(9)] == [second.checksum(step) for step in range(9)]
    assert [len(first.step(step).batches) for step in (2, 3)] == [2, 1]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_step_is_the_same_on_any_number_of_processes_and_after_a_resume(texts, packing):
    one = made(texts, data__packing=packing)
    prepared = prepare(one)
    alone = order(one, prepared)
    both = [order(one, prepared, num_processes=2, process_index=index) for index in range(2)]
    for step in (8, 2, 3, 5, 6, 0):  # a resumed run begins anywhere
        together = [data.step(step) for data in both]
        assert sum(part.checksum for part in together) % 2**64 == alone.step(step).checksum == alone.checksum(step)
        ids = [torch.cat([batch["input_ids"] for batch in part.batches]) for part in (*together, alone.step(step))]
        assert torch.equal(torch.cat(ids[:2]), ids[2])
        np.testing.assert_array_equal(sum(part.tokens for part in together), alone.step(step).tokens)


def test_training_batches_change_where_a_stage_begins(texts):
    one = made(texts)
    shapes = [{tuple(batch["input_ids"].shape) for batch in step} for step in training_batches(one, prepare(one))]
    assert shapes == [{(4, 32)}] * 3 + [{(1, 128)}] * 3 + [{(2, 64)}] * 3


def test_weights_of_a_stage_hold_from_its_first_step(texts):
    sources = [{"path": "json", "data_files": str(texts / "corpus.jsonl"), "weight": 1.0} for _ in range(2)]
    stages = [
        {"from_tokens": 768, "block_size": 128, "weights": [0.0, 1.0]},
        {"from_tokens": 1536, "block_size": 64},
        {"from_tokens": 1792, "weights": [1.0, 0.0]},
    ]
    one = made(texts, stages, data__sources=sources)
    data = order(one, prepare(one))
    drawn = [{stream for stream, *_ in data.part(step).locate_sequences(step)} for step in range(9)]
    assert drawn == [{0, 1}] * 3 + [{1}] * 4 + [{0}] * 2


def test_the_ledger_counts_the_tokens_of_each_stage():
    class Data:
        checksum, documents_dropped = 1, 0

        def __init__(self, tokens):
            self.tokens = self.documents = np.array(tokens)

    counted = Consumption(2, 3)
    for stage, tokens in ((0, [3, 1]), (0, [2, 2]), (2, [4, 0])):
        counted.add(Data(tokens), stage)
    counted.gather(lambda table: table)
    assert counted.by_source()["stage_tokens"] == [[5, 3], [0, 0], [4, 0]]
    assert counted.by_source()["source_tokens"] == [9, 3]


def test_steps_that_are_left_out_make_a_stage_begin_earlier():
    assert steps_of_stages([0, 3, 6], range(9)) == [3, 3, 3]
    assert steps_of_stages([0, 3, 6], range(4)) == [3, 1, 0]
    assert steps_of_stages([0, 3, 6], range(9), lambda step: data_step(step, [(2, 2)])) == [2, 2, 5]
    assert steps_of_stages([0, 3, 6], range(20, 29), lambda step: step - 20) == [3, 3, 3]


def test_a_source_with_max_epochs_counts_every_order(texts):
    source = {"path": "json", "data_files": str(texts / "corpus.jsonl"), "max_epochs": 2}
    one = made(texts, data__sources=[source])
    with pytest.raises(
        RecipeError, match=r"data.sources.0.max_epochs: is 2, but the run reads this source up to 3 times"
    ):
        order(one, prepare(one))


def test_a_step_of_a_later_stage_is_shown(texts):
    one = made(texts)
    prepare(one)
    lines = list(describe_step(one, 4, ()))
    assert lines[0].startswith("step 4: 2 sequences of 128 tokens")
    assert any("of train-0-128" in line for line in lines)


def write(folder, stages, **changes):
    import yaml
    from conftest import recipe_mapping

    changes = {"model__config__max_position_embeddings": 128, "training__max_steps": 9, **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_mapping(folder, data__stages=stages, **changes)))
    return path


LONG = {"from_tokens": 768, "block_size": 128}


@pytest.mark.parametrize(
    ("stages", "changes", "message"),
    [
        ([{"from_tokens": 768}], {}, "data.stages.0: a stage changes `weights`, `block_size` or both"),
        ([{"from_tokens": 768, "block_size": 1}], {}, "data.stages.0.block_size: "),
        (
            [{"from_tokens": 768, "block_size": 100}],
            {},
            r"256 is not a multiple of it \(got 100\); nearest possible: 32, ",
        ),
        (
            [{"from_tokens": 768, "block_size": 256}],
            {},
            r"data.stages.0.block_size: must be at most the model's max_pos",
        ),
        (
            [LONG],
            {"training__micro_batch_size": 2},
            r"x data.block_size tokens are not a whole number of sequences of 128 tokens; set it",
        ),
        ([{**LONG, "micro_batch_size": 3}], {}, "data.stages.0.micro_batch_size: a step has 2 sequences"),
        ([{"from_tokens": 2300, "block_size": 128}], {}, "data.stages.0.from_tokens: 2300 tokens are only reached"),
        ([LONG, {"from_tokens": 769, "block_size": 64}], {}, None),
        ([{"from_tokens": 700, "block_size": 64}, LONG], {}, "data.stages.1.from_tokens: the stage begins in the same"),
        ([{**LONG, "weights": [1.0]}], {}, "`weights` of `stages` change the sources' `weight`"),
        ([{"from_tokens": 768, "rope_parameters": {}}], {}, "a stage changes"),
        ([{**LONG, "rope_theta": 1.0}], {}, "data.stages.0.rope_theta: unknown key"),
        (
            [LONG],
            {"data__streaming": True, "data__validation_fraction": 0.0},
            "`block_size` of `stages` needs prepared",
        ),
    ],
)
def test_wrong_stages_are_refused_with_the_fix(texts, stages, changes, message):
    changes = {"training__micro_batch_size": 4, **changes}
    path = write(texts, stages, **changes)
    if message is None:
        load_recipe(path)
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
