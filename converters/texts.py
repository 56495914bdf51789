"""What the text of a record is: one field, several joined, or a template.

text                         the field of that name (dotted paths reach into nested records)
title,abstract,body          these fields, joined by a blank line
# {title}\\n\\n{meta.author}    a template: fields in braces, {{ and }} for braces
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from typing import Any

from converters.domains import field_value
from mixer.errors import InputError

__all__ = ["text_columns", "text_rule"]

# Returns the text, or the name of the field that is missing or holds something else, with its value.
TextRule = Callable[[Mapping[str, Any]], "str | tuple[str, Any]"]


def text_rule(spec: str) -> TextRule:
    """Return the function from a record's fields to its text.

    >>> text_rule("title,body")({"title": "A", "body": "b"})
    'A\\n\\nb'
    >>> text_rule("{title}: {year}")({"title": "A", "year": 1999})
    'A: 1999'
    >>> text_rule("text")({"body": "b"})
    ('text', None)
    """
    parts, may_be_number = _parts(spec), "{" in spec
    if len(parts) == 1 and not may_be_number:
        name = parts[0][1]
        return lambda fields: value if isinstance(value := field_value(fields, name), str) else (name, value)

    def rule(fields: Mapping[str, Any]) -> str | tuple[str, Any]:
        pieces = []
        for literal, name in parts:
            pieces.append(literal)
            if name:
                value = field_value(fields, name)
                if not isinstance(value, str | int | float if may_be_number else str):
                    return name, value
                pieces.append(str(value))
        return "".join(pieces)

    return rule


def text_columns(spec: str) -> frozenset[str]:
    """Return the top-level fields that a rule may read."""
    names = [name for _, name in _parts(spec) if name]
    return frozenset(names) | frozenset(name.split(".")[0] for name in names)


def _parts(spec: str) -> list[tuple[str, str]]:
    """Return (text before, field) pairs."""
    if "{" not in spec:
        names = [name.strip() for name in spec.split(",")]
        if not all(names):
            raise InputError(f"text field {spec!r} is empty; name a field, 'title,body', or a template '{{title}}'.")
        return [("\n\n" if number else "", name) for number, name in enumerate(names)]
    try:
        parsed = list(string.Formatter().parse(spec))
    except ValueError as error:
        raise InputError(f"text template {spec!r} is not valid: {error}.") from error
    if not any(name for _, name, _, _ in parsed) or any(style or how for _, _, style, how in parsed):
        raise InputError(f"text template {spec!r} must name fields in braces, like '{{title}}\\n\\n{{body}}'.")
    return [(literal, name or "") for literal, name, _, _ in parsed]
