import json

import pytest
import torch
from conftest import recipe_mapping
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hfpretrain.checkpoints import export, verify


@pytest.fixture
def run(tmp_path):
    """A run folder with the export of an untrained model and its reference."""
    config = recipe_mapping(tmp_path)["model"]["config"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.for_model(**config, vocab_size=64, eos_token_id=1, bos_token_id=1))
    words = {word: number for number, word in enumerate(["<unk>", "<eos>", *(f"w{i}" for i in range(62))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    export.write_model(model.config, model.state_dict(), tokenizer, tmp_path / "model")
    batch = {"input_ids": torch.arange(32)[None] + 8}
    verify.write_reference(model, batch, "float32", tmp_path / verify.REFERENCE)
    return tmp_path


def test_an_export_reproduces_the_logits_of_training_and_generates_a_sample(run):
    report = verify.verify_export(run / "model", run / verify.REFERENCE)
    assert report["max_logit_difference"] < 1e-5 and report["sample"] and "sample_error" not in report


def test_an_export_whose_class_cannot_generate_verifies(run, monkeypatch):
    def generate(*_, **__):
        raise ValueError("this cache has no length")

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    report = verify.verify_export(run / "model", run / verify.REFERENCE)
    assert report["max_logit_difference"] < 1e-5 and report["sample"] is None
    assert "LlamaForCausalLM.generate fails" in report["sample_error"] and "no length" in report["sample_error"]
    json.dumps(report)


@pytest.mark.parametrize("model_type", ["camembert", "gpt2"])
def test_a_tied_weight_is_exported_whichever_of_its_names_is_given(tmp_path, model_type):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=64, is_decoder=True, **sizes, **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 1}, unk_token="<eos>")))
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    export.write_model(config, state, tokenizer, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(2, 18)[None]
    assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
