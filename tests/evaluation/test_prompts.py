import io
import sys

import pytest
import torch
from conftest import small_text
from transformers import AutoConfig, AutoModelForCausalLM

from hfpretrain.data.tokenizer import train_tokenizer
from hfpretrain.evaluation import prompts
from hfpretrain.evaluation.prompts import continue_text, printable, stream_text
from hfpretrain.recipe.schema import TokenizerSection

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA = {"model_type": "llama", "intermediate_size": 48, "num_attention_heads": 4, **SIZES}
MAMBA = {"model_type": "mamba", "state_size": 4, **SIZES}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 64}


@pytest.mark.parametrize(("config", "context"), [(LLAMA, 64), (MAMBA, 64), (GPT2, 40)])
def test_padding_changes_no_token(config, context):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval()
    lengths = set()
    model.register_forward_pre_hook(lambda _, __, kw: lengths.add(kw["input_ids"].shape[1]), with_kwargs=True)
    keywords = {
        "context": context,
        "eos_token_id": 63,
        "device": torch.device("cpu"),
        "broadcast": lambda choice: choice,
    }
    made = continue_text(model, [1, 2, 3], 50, **keywords)
    assert lengths <= {32, context}
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 50:
            ids = torch.tensor([[1, 2, 3, *expected][-context:]])
            if (token := int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())) == 63:
                break
            expected.append(token)
    assert made == expected and len(made) > 5


def test_control_characters_of_a_continuation_are_not_printed():
    assert printable("a\x1b[31mb\x00\r\tc\n漢🌊\x9b") == "a\ufffd[31mb\ufffd\ufffd\tc\n漢🌊\ufffd"
    assert printable("a\u202etxt.exe\u2069 אב\u200f 👩\u200d👩") == "a\ufffdtxt.exe\ufffd אב\u200f 👩\u200d👩"


class Terminal(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_generate_shows_no_control_character_on_a_terminal_and_writes_it_into_a_pipe(is_terminal, monkeypatch):
    tokenizer = train_tokenizer(TokenizerSection(algorithm="byte_level_bpe", vocab_size=320), small_text(50))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA | {"vocab_size": 320}))
    monkeypatch.setattr(prompts, "load_checkpoint", lambda _: (tokenizer, model))
    monkeypatch.setattr(sys, "stdout", output := Terminal(is_terminal))
    stream_text("model", "a \x1b[31mstone \u202e", 8, temperature=0.0, top_k=1, seed=0)
    assert output.getvalue().startswith("a \ufffd[31mstone \ufffd" if is_terminal else "a \x1b[31mstone \u202e")
    assert ("\x1b" in output.getvalue()) != is_terminal
