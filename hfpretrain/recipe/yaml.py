"""Read a recipe from YAML with overrides of single keys, write one, and compare two."""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hfpretrain.recipe.keys import find_counterpart, known_keys, unknown_key_message
from hfpretrain.recipe.redaction import redact_all
from hfpretrain.recipe.schema import Problem, Recipe, RecipeError, cross_section_problems


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does: `no` is a string, and 3e-4 is a number.

    Anchors, aliases, merge keys and duplicate keys are not allowed.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not allowed; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not a string", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
        and tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"),
    list("-+.0123456789"),
)


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    # PyYAML's own constructor reads 010 as octal.
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def parse_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text. Raises `RecipeError` with `origin`, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        location = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        fix = "; indent with spaces, tabs are not allowed" if "'\\t'" in str(error.problem) else ""
        raise RecipeError.at(location, f"{error.problem or error}{fix}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError.at(origin, f"not valid YAML: {error}") from None


def read_mapping(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping of a recipe file with `--section.key=value` overrides written into it, not yet validated."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError.at(str(path), "no such recipe file") from None
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text: {error.reason} {error.object[error.start]:#04x} at byte {error.start}"
        raise RecipeError.at(str(path), message) from None
    except OSError as error:
        raise RecipeError.at(str(path), f"cannot be read: {error.strerror}") from None
    mapping = parse_yaml(text, str(path))
    if mapping is None:
        raise RecipeError.at(str(path), "is empty; a recipe is a mapping of sections, see recipes/quickstart.yaml")
    if not isinstance(mapping, dict):
        raise RecipeError.at(str(path), "a recipe is a mapping of sections, see recipes/quickstart.yaml")
    given = list(overrides)
    for override, following in itertools.zip_longest(given, given[1:], fillvalue=""):
        _apply_override(mapping, override, following)
    return mapping


def _apply_override(mapping: dict[str, Any], override: str, following: str) -> None:
    """Write an override into a recipe's mapping.

    `following`: the next argument, which the error message for `--key value` instead of `--key=value` quotes.
    """
    match = re.fullmatch(r"--([A-Za-z_][\w.]*)=(.*)", override, flags=re.DOTALL)
    if match is None:
        raise RecipeError.at(override, f"not an override; write {_suggest_override(override, following)}")
    keys, node = match[1].split("."), typing.cast(Any, mapping)
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError.at(
                    override, f"{'.'.join(keys[:depth])} is a list of {len(node)} entries; it has no entry {key!r}"
                )
            slot: Any = int(key)
        elif isinstance(node, dict):
            slot = key
            if not last and node.get(key) is None:
                node[key] = {}
        else:
            raise RecipeError.at(override, f"{'.'.join(keys[:depth])} is a value; it has no key {key!r}")
        if last:
            # YAML would read a glob such as `*.txt` as an alias.
            node[slot] = match[2] if match[2].startswith("*") else parse_yaml(match[2], override)
        else:
            node = node[slot]


def _suggest_override(argument: str, following: str) -> str:
    """The override that a wrong argument such as `--max_steps` probably means; `following`: the next argument."""
    name = argument.removeprefix("--")
    if name == argument or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        return "--section.key=value"
    meant = name if "." in name else find_counterpart(name) or name
    key, _, value = meant.partition(": ")
    value = value or ("VALUE" if not following or following.startswith("--") else following)
    return f"--{key}={value}" if re.fullmatch(r"[\w.]+", key) else f"{meant}, as --section.key=value"


def read_recipe(
    path: str | Path,
    overrides: Iterable[str] = (),
    checks: Iterable[Callable[[dict[str, Any]], Iterable[Problem]]] = (),
) -> Recipe:
    """Read, override and validate a recipe.

    `checks`: functions that take the raw mapping and return further problems, which only other libraries can find.
    Raises `RecipeError` with all problems at once.
    """
    mapping = read_mapping(path, overrides)
    problems: list[Problem] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(mapping)
        problems += [*_value_problems(mapping, recipe), *cross_section_problems(recipe)]
    except ValidationError as error:
        details = error.errors()
        # pydantic calls a list empty if its only entry is wrong.
        nested = {detail["loc"][:-1] for detail in details} | {
            detail["loc"][:2] for detail in details if len(detail["loc"]) > 2
        }
        problems += [_problem_of(d) for d in details if not (d["type"] == "too_short" and d["loc"] in nested)]
    for check in checks:
        problems += check(mapping)
    if problems or recipe is None:
        raise RecipeError(problems)
    return recipe


def _value_problems(mapping: dict[str, Any], recipe: Recipe) -> Iterator[Problem]:
    """Problems that pydantic does not report: values that it would convert silently, and values that no run can use."""
    converted = dict(flatten(recipe.model_dump(mode="json")))
    for path, value in flatten(mapping):
        if isinstance(value, bool) and not isinstance(converted.get(path, value), bool):
            yield Problem(path, f"needs a number (got {str(value).lower()})")
        elif isinstance(value, int) and abs(value) >= 2**53:
            yield Problem(path, f"is too large; integers must be below 2**53 (got {value:.3e})")
        elif isinstance(value, str) and "\0" in value:
            yield Problem(path, f"contains a NUL character (got {value!r:.100})")
        elif value == "" and not path.startswith(("evaluation.prompts.", "model.config.", "model.config_overrides.")):
            yield Problem(path, "is an empty string; give a value, or leave the key out")


def _problem_of(detail: Any) -> Problem:
    """One pydantic error as a problem: the dotted path, what is wrong, and the value."""
    location = list(detail["loc"])
    if detail["type"] != "extra_forbidden":  # pydantic appends the branch of a union to the path
        location = [p for p in location if not re.fullmatch(r"bool|str|literal\[.*\]|tuple\[.*\]", str(p))]
    path = ".".join(str(part) for part in location) or "recipe"
    if detail["type"] == "extra_forbidden":
        key, known = str(location[-1]), known_keys(location[:-1])
        meant = find_counterpart(key)
        return Problem(path, unknown_key_message(key, known) if meant is None else f"unknown key; use {meant}")
    if detail["type"] == "missing":
        return Problem(path, "is required")
    message = detail["msg"].removeprefix("Value error, ")
    value = detail["input"]
    shown = "" if isinstance(value, (dict, list)) and detail["type"] == "value_error" else f" (got {value!r:.200})"
    return Problem(path, message + shown)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with all defaults, and with `***` for secrets in addresses.

    `read_recipe` reads it back as the same recipe, except for the secrets.
    """
    return dump_mapping(recipe.model_dump(mode="json"))


def dump_mapping(mapping: dict[str, Any]) -> str:
    """A recipe's mapping as YAML, with `***` for secrets in addresses."""
    return yaml.safe_dump(redact_all(mapping), sort_keys=False, allow_unicode=True)


CHANGEABLE_ON_RESUME = (
    "output_dir",
    "data.prepared_dir",
    "data.stages.*.micro_batch_size",
    "model.attn_implementation",
    "model.gradient_checkpointing",
    "model.dtype",
    "model.use_liger_kernel",
    "tokenizer.chat_template",
    "tokenizer.add_bos",  # the tokens that documents begin with are compared instead
    "tokenizer.max_unknown",
    "training.max_steps",
    "training.max_tokens",
    "training.micro_batch_size",
    "training.chunked_loss",
    "training.compile",
    "training.stop_after",
    "training.timeout_seconds",
    "stability",
    "evaluation",
    "checkpoint",
    "logging",
    "hub",
)
"""Keys and sections that may change when a run is resumed. None of them changes the text of a step."""


def differences(now: Recipe, before: Recipe, ignore: Sequence[str] = ()) -> list[Problem]:
    """Keys in which a recipe differs from the one of an earlier run, as problems.

    `ignore`: dotted paths of keys or sections, where `*` is any entry of a list. Secrets of addresses are not compared,
    because an address with a new signature is the same address.
    """
    flat_now, flat_before = (dict(flatten(redact_all(recipe.model_dump(mode="json")))) for recipe in (now, before))
    return [
        Problem(path, f"is {_shown(flat_now.get(path))} now, was {_shown(flat_before.get(path))}")
        for path in sorted(flat_now.keys() | flat_before.keys())
        if flat_now.get(path) != flat_before.get(path) and not any(_is_within(path, skipped) for skipped in ignore)
    ]


def _shown(value: object) -> str:
    return "not set" if value is None else repr(value)


def _is_within(path: str, pattern: str) -> bool:
    """Whether a dotted path is `pattern`, or lies within it; `*` in a pattern is any entry of a list."""
    pairs = itertools.zip_longest(path.split("."), pattern.split("."))
    return all(wanted in (None, "*", key) for key, wanted in pairs)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs (dotted path, value) of all leaves of nested mappings and lists."""
    if isinstance(value, (dict, list)) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
