"""Folders of pretrained models and tokenizers, made by plain transformers, from which runs continue."""

import json

import torch
from conftest import small_text
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SIZES = {"max_position_embeddings": 64, "initializer_range": 0.2}
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


def _save(folder, backend, kind, **special):
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": kind}))
    return AutoTokenizer.from_pretrained(folder)


def _byte_level(special, split=None, **model):
    backend = Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    if split is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(split), "isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps) if split else steps[0]
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(small_text(100), trainer)
    content = json.loads(backend.to_str())
    content["model"] |= model
    return Tokenizer.from_str(json.dumps(content))


def gpt2_tokenizer(folder):
    """One special token for BOS and EOS, with the first id."""
    end = "<|endoftext|>"
    return _save(folder, _byte_level([end]), "GPT2Tokenizer", bos_token=end, eos_token=end, unk_token=end)


def llama3_tokenizer(folder):
    """Special tokens after the model's vocabulary, BOS before a text, and `ignore_merges`."""
    backend = _byte_level([], LLAMA3, ignore_merges=True)
    backend.add_special_tokens(["<|begin|>", "<|end|>", "<|reserved|>"])
    bos = ("<|begin|>", backend.token_to_id("<|begin|>"))
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[bos])
    return _save(folder, backend, "PreTrainedTokenizerFast", bos_token="<|begin|>", eos_token="<|end|>")


def _sentencepiece(normalizer, pre_tokenizer):
    """BPE over characters with `▁` for spaces and tokens for bytes, and no words before BPE."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[^▁0-9\\n]+|▁?[0-9]|\\n|▁+"), "isolated")
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=special, limit_alphabet=60, show_progress=False)
    letters = "the▁quick▁brown▁fox▁jumps▁over▁the▁lazy▁dog,▁(0123456789)\n"
    words = [text.split(" №")[0].replace(" ", "▁") for text in small_text(100)]
    backend.train_from_iterator([letters, *words], trainer)
    content = json.loads(backend.to_str())
    first = len(special)
    moved = {token: number + 256 * (number >= first) for token, number in content["model"]["vocab"].items()}
    content["model"]["vocab"] = moved | {f"<0x{byte:02X}>": first + byte for byte in range(256)}
    content["pre_tokenizer"] = pre_tokenizer
    backend = Tokenizer.from_str(json.dumps(content))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if pre_tokenizer is None else [])])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def llama2_tokenizer(folder):
    """As of Llama 2: a text begins with a space, and is one word for BPE."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _save(folder, _sentencepiece(normalizer, None), "LlamaTokenizer", **_SPECIAL)


def gemma_tokenizer(folder):
    """As of Gemma."""
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return _save(folder, _sentencepiece(normalizers.Replace(" ", "▁"), split), "GemmaTokenizer", **_SPECIAL)


def save_model(folder, config):
    """Save a model of this config with random weights, so that its embeddings differ."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _ids(tokenizer, vocab_size):
    size = max(tokenizer.get_vocab().values()) + 1
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"vocab_size": vocab_size or size, **special, "pad_token_id": tokenizer.pad_token_id}


def llama(folder, tied=False, vocab_size=None):
    ids = _ids(llama3_tokenizer(folder), vocab_size)
    return save_model(folder, LlamaConfig(**LAYERS, **SIZES, **ids, tie_word_embeddings=tied))


def gpt2(folder):
    """Tied, with positions that are learned."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return save_model(folder, GPT2Config(**sizes, **_ids(gpt2_tokenizer(folder), None)))


def gemma(folder):
    """Tied, with scaled embeddings and soft caps."""
    ids, sizes = _ids(gemma_tokenizer(folder), None), {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": 16}
    return save_model(folder, Gemma2Config(**LAYERS, **SIZES, **ids, **sizes))


BASES = {"llama": llama, "tied llama": lambda folder: llama(folder, tied=True), "gpt2": gpt2, "gemma": gemma}
TOKENIZERS = {
    "gpt2": gpt2_tokenizer,
    "llama3": llama3_tokenizer,
    "llama2": llama2_tokenizer,
    "gemma": gemma_tokenizer,
}
