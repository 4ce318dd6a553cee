from huggingface_hub import ModelCard

from hfpretrain.publishing import card
from hfpretrain.recipe.schema import TokenizerSection

NEW = """---
license: mit
tags:
- hfpretrain
model-index:
- name: run
  results: []
---

<!-- hfpretrain: generated summary, edits in here are lost -->
# run
<!-- hfpretrain: end -->

<!-- hfpretrain: generated data, edits in here are lost -->
new data
<!-- hfpretrain: end -->
"""


def test_a_card_without_edits_becomes_the_new_card():
    assert card.with_edits(NEW, NEW) == NEW and not card.edits(NEW)
    assert card.with_edits(NEW.replace("new data", "old data"), NEW) == NEW
    assert card.with_edits("", NEW) == NEW


def test_a_card_that_a_person_wrote_stays_above_the_generated_blocks():
    updated = ModelCard(card.with_edits("---\ntags: [a]\nmine: 1\n---\n# Mine\n", NEW))
    assert updated.data.tags == ["hfpretrain", "a"] and updated.data["mine"] == 1 and updated.data.license == "mit"
    assert updated.text == "# Mine\n" + ModelCard(NEW).text


def test_text_outside_of_the_blocks_their_order_and_their_removal_are_kept():
    summary, data = (f"<!-- hfpretrain: generated {name}, edits in here are lost -->\n" for name in ("summary", "data"))
    end = "<!-- hfpretrain: end -->\n"
    old = f"---\nlicense: mit\n---\n{data}old data\n{end}Do not use it for poems.\n"
    text = ModelCard(card.with_edits(old, NEW)).text
    assert text == f"{data}new data\n{end}Do not use it for poems.\n" and summary not in text
    assert card.edits(old) == "Do not use it for poems."


def test_results_of_other_models_stay():
    """`ModelCard` would merge them into one model, so `card.with_edits` does not use it."""
    metric = "{task: {type: text-generation}, dataset: {type: a, name: a}, metrics: [{type: loss, value: 1.0}]}"
    old = f"---\nmodel-index:\n- name: other\n  results:\n  - {metric}\n- name: run\n  results: []\n---\n"
    updated = card.with_edits(old, NEW)
    assert "name: other" in updated and "value: 1.0" in updated and updated.count("name: run") == 1
    assert len(ModelCard(old.replace("results: []", f"results:\n  - {metric}")).data.to_dict()["model-index"]) == 1, (
        "huggingface_hub now keeps the results of several models separate: use ModelCard in card.py"
    )


def test_metadata_that_cannot_be_parsed_stay_as_text():
    for metadata in ("a: [", "- a list", "1: a number"):
        updated = ModelCard(card.with_edits(f"---\n{metadata}\n---\nwords\n", NEW))
        assert metadata in updated.text and "words" in updated.text and updated.data.license == "mit"


def test_the_card_gives_what_llama_cpp_needs_for_a_tokenizer_that_it_cannot_know():
    def text(**section):
        return card._llama_cpp(TokenizerSection(**section))

    assert text(pretrained="base") == ""
    assert "`res` that it has for the tokenizer of the base" in text(pretrained="base", extend={"learn": 5})
    trained = {"algorithm": "byte_level_bpe", "vocab_size": 320}
    assert 'res = "gpt-2"' in text(**trained) and 'res = "dbrx"' in text(**trained, pattern="llama3")
    assert "can't split text as this tokenizer does" in text(**trained, pattern="unspaced")
    assert "can't split text as this tokenizer does" in text(algorithm="character")
