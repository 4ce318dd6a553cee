"""The recipe's keys as help text: type, default and docstring of each."""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hfpretrain.recipe.keys import section_of, unknown_key_message
from hfpretrain.recipe.schema import Recipe, RecipeError

_WIDTH = 100


def describe_keys(name: str = "") -> str:
    """Help text of the section `name`, for example `optimizer` or `evaluation.lm_eval`; of all sections by default.

    Raises `RecipeError` if there is no such section.
    """
    section: type[BaseModel] = Recipe
    for part in name.split(".") if name else ():
        sections = [key for key, field in section.model_fields.items() if section_of(field.annotation)[0]]
        if part not in sections:
            raise RecipeError.at(name, f"is not a section of a recipe: {unknown_key_message(part, sections)}")
        section = typing.cast(Any, section_of(section.model_fields[part].annotation)[0])
    return "\n".join(_section_lines(section, name, {}))


def _section_lines(section: type[BaseModel], name: str, described: dict[type[BaseModel], str]) -> Iterator[str]:
    """Help text of a section and of the sections in it.

    `described`: the sections that are already described, and their names. Their keys are not repeated.
    """
    if section in described:
        yield f"{name}: has the same keys as {described[section]}"
        return
    described[section] = name
    title = f"{name or 'recipe'}: {' '.join((section.__doc__ or '').split())}"
    yield from textwrap.wrap(title, _WIDTH)
    prefix = f"{name}." if name else ""
    inner = {key: section_of(field.annotation) for key, field in section.model_fields.items()}
    for key, field in section.model_fields.items():
        if inner[key][0] is None or field.description:
            yield from _field_lines(prefix + key, field)
    for key, (kind, index) in inner.items():
        if kind is not None:
            yield ""
            yield from _section_lines(kind, f"{prefix}{key}.{index}".rstrip("."), described)


def _field_lines(path: str, field: FieldInfo) -> Iterator[str]:
    default = field.get_default(call_default_factory=True)
    value = "required" if default is PydanticUndefined else f"default: {_as_yaml(default)}"
    yield from textwrap.wrap(
        f"{path}: {_type_name(field.annotation)} ({value})", _WIDTH, initial_indent="  ", subsequent_indent="      "
    )
    text = " ".join((field.description or "").split())
    yield from textwrap.wrap(text, _WIDTH, initial_indent="      ", subsequent_indent="      ")


def _as_yaml(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value)


def _type_name(annotation: Any) -> str:
    """A field's type in the words of YAML, for example `auto | true | false`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type_name(argument) for argument in arguments))
    if origin is tuple:
        items = [_type_name(argument) for argument in arguments if argument is not Ellipsis]
        return f"[{', '.join(items)}{', ...' if Ellipsis in arguments else ''}]"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {str: "string", bool: "true | false", int: "integer", float: "number", type(None): "null"}
    return names.get(annotation, str(annotation))
