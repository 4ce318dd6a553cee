"""Read a `text_template`: text with the names of columns in braces."""

from __future__ import annotations

import string


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Pairs (text, name of the column that follows it); the last name is None if the template ends with text.

    Raises `ValueError` if braces don't match, if a name is empty, or if a name is followed by `!` or `:`.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template!r} is not a template: {error}; write {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in parts:
        if name == "":
            raise ValueError(f"{template!r} has braces without the name of a column")
        if spec or conversion:
            raise ValueError(f"{template!r} has more than a name in the braces of {name!r}; leave out `!` and `:`")
    if all(name is None for _, name, _, _ in parts):
        raise ValueError(f"{template!r} names no column: write its name in braces, for example {{title}}")
    return [(text, name) for text, name, _, _ in parts]
