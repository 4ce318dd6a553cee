"""List the keys of a recipe, and find the one that a user probably meant."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from hfpretrain.recipe.schema import Recipe


def unknown_key_message(key: str, known: Iterable[str]) -> str:
    """The message for an unknown key: the nearest known one, or all of them if none is near."""
    known = sorted(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if nearest:
        return f"unknown key; did you mean `{nearest[0]}`?"
    if len(known) <= 30:
        return f"unknown key; known: {', '.join(known)}"
    return f"unknown key; there are {len(known)} known ones"


# Keys of other training scripts, and what to use instead of each. The scripts are transformers' TrainingArguments,
# run_clm, TRL and nanoGPT.
COUNTERPARTS = {
    "learning_rate": "optimizer.lr",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "optim": "optimizer.name",
    "lr_scheduler_type": "scheduler.name",
    "lr_scheduler_kwargs": "scheduler.scheduler_specific_kwargs",
    "warmup_steps": "scheduler.num_warmup_steps",
    "warmup_ratio": "scheduler.num_warmup_steps, in optimizer steps",
    "warmup_iters": "scheduler.num_warmup_steps",
    "min_lr": "scheduler.scheduler_specific_kwargs, with scheduler.name cosine_with_min_lr",
    "bf16": "training.mixed_precision: bf16",
    "fp16": "training.mixed_precision: fp16",
    "tf32": "training.mixed_precision: tf32",
    "fp8": "training.mixed_precision: fp8",
    "precision": "training.mixed_precision",
    "num_train_epochs": "training.max_tokens or training.max_steps; the run logs how many epochs that is",
    "num_epochs": "training.max_tokens or training.max_steps; the run logs how many epochs that is",
    "epochs": "training.max_tokens or training.max_steps; the run logs how many epochs that is",
    "max_train_steps": "training.max_steps",
    "max_iters": "training.max_steps",
    "num_steps": "training.max_steps",
    "num_training_steps": "training.max_steps",
    "per_device_train_batch_size": "training.micro_batch_size",
    "per_device_eval_batch_size": "training.micro_batch_size",
    "per_gpu_train_batch_size": "training.micro_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "train_batch_size": "training.tokens_per_step, in tokens over all processes",
    "global_batch_size": "training.tokens_per_step, in tokens over all processes",
    "batch_size": "training.tokens_per_step, in tokens over all processes, and training.micro_batch_size",
    "gradient_accumulation_steps": "training.tokens_per_step; accumulation follows from it and the micro_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "grad_clip": "training.max_grad_norm",
    "torch_compile": "training.compile",
    "gradient_checkpointing_kwargs": "model.gradient_checkpointing",
    "activation_checkpointing": "model.gradient_checkpointing",
    "torch_dtype": "model.dtype for the export, training.mixed_precision for training",
    "model_name_or_path": "model.pretrained",
    "model_revision": "model.revision",
    "config_name": "model.config",
    "tokenizer_name": "tokenizer.pretrained",
    "dataset_name": "data.sources.0.path",
    "dataset_config_name": "data.sources.0.name",
    "dataset_text_field": "data.sources.0.text_column",
    "dataset_path": "data.sources.0.path",
    "train_file": "data.sources.0.data_files",
    "train_files": "data.sources.0.data_files",
    "validation_file": "data.validation_sources.0.data_files",
    "validation_split_percentage": "data.validation_fraction",
    "max_train_samples": "data.sources.0.max_documents",
    "max_samples": "data.sources.0.max_documents",
    "limit": "data.sources.0.max_documents or data.sources.0.max_bytes",
    "max_eval_samples": "data.validation_sources.0.max_documents",
    "sep": "data.sources.0.delimiter",
    "preprocessing_num_workers": "--num-workers of `hfpretrain prepare`",
    "max_seq_length": "data.block_size",
    "max_seq_len": "data.block_size",
    "max_length": "data.block_size",
    "seq_length": "data.block_size",
    "seq_len": "data.block_size",
    "context_length": "data.block_size",
    "logging_steps": "logging.every_steps",
    "log_interval": "logging.every_steps",
    "report_to": "logging.trackers",
    "run_name": "output_dir",
    "logging_dir": "output_dir",
    "save_steps": "checkpoint.every_steps",
    "save_strategy": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "load_best_model_at_end": "checkpoint.keep_best",
    "metric_for_best_model": "checkpoint.keep_best",
    "resume_from_checkpoint": "checkpoint.resume_from; the same command resumes by itself",
    "eval_steps": "evaluation.every_steps",
    "eval_interval": "evaluation.every_steps",
    "eval_strategy": "evaluation.every_steps",
    "evaluation_strategy": "evaluation.every_steps",
    "push_to_hub": "hub.repo_id",
    "hub_model_id": "hub.repo_id",
    "hub_private_repo": "hub.private",
    "data_seed": "seed",
    "deepspeed": "the file given to `accelerate launch --config_file`",
    "fsdp": "the file given to `accelerate launch --config_file`",
    "fsdp_config": "the file given to `accelerate launch --config_file`",
    **{
        key: f"model.config.{key}"
        for key in (
            "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "tie_word_embeddings",
            "n_embd", "n_layer", "n_head", "n_positions", "attention_dropout", "dropout",
        )
    },
}  # fmt: skip


def find_counterpart(key: str) -> str | None:
    """The dotted path of a recipe key, or an option, to use instead of the unknown key `key`; None if there is none.

    `key` may be the name in another training script, or a key of another section.
    """
    if key in COUNTERPARTS:
        return COUNTERPARTS[key]
    found = [path for path in key_paths(Recipe) if path.rpartition(".")[2] == key]
    return " or ".join(found) if 0 < len(found) <= 4 else None


def key_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys. A list of sections gives the keys of its first entry, such as `data.sources.0.path`."""
    for name, field in section.model_fields.items():
        yield prefix + name
        kind, entry = section_of(field.annotation)
        if kind is not None:
            yield from key_paths(kind, f"{prefix}{name}.{entry}")


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The class of the section that a field holds, or None if it holds no section.

    The second value is `0.` if the field holds a list of sections, otherwise an empty string.
    """
    entry = ""
    while typing.get_origin(annotation) in (tuple, types.UnionType, typing.Union):
        entry = "0." if typing.get_origin(annotation) is tuple else entry
        annotation = typing.get_args(annotation)[0]
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return (annotation if is_section else None), entry


def known_keys(location: Sequence[int | str]) -> list[str]:
    """Keys of the section at `location`, a path of keys and list indices."""
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str):
            section = section_of(section.model_fields[part].annotation)[0] or section
    return list(section.model_fields)
