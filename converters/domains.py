"""Which domain a document belongs to: one function per rule, one row in ``RULES``.

    folder           the first folder below the input; a file directly in it takes the input's own name
    file             the file's name without its extensions
    field:meta.set   a field of the record, by dotted path: a text, or an integer such as the number of a cluster
    path:REGEX       the group ``domain`` (or the first) of a pattern searched in the path below the input

A mapping of domains, given beside the rule, renames and merges them (``{"Pile-CC": "web", "C4": "web"}``) and drops
those that map to null; ``"*"`` stands for all that it does not name.

An input written ``name=path`` gives all its documents to the domain ``name``, whatever the rule.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from converters.readers import Piece
from mixer.errors import InputError
from mixer.manifest import domain_folder

__all__ = ["RULES", "check_domain_name", "domain_rule", "field_value"]

MAX_DOMAINS = 4096

# A rule returns the domain, or None where the record does not say (a bad record, reason "domain").
Rule = Callable[[Piece, Mapping[str, Any]], "str | None"]


def _folder(argument: str) -> Rule:
    def rule(piece: Piece, fields: Mapping[str, Any]) -> str:
        parts = PurePosixPath(piece.name).parts
        return parts[0] if len(parts) > 1 else piece.root

    return rule


def _file(argument: str) -> Rule:
    def rule(piece: Piece, fields: Mapping[str, Any]) -> str:
        name = PurePosixPath(piece.name).name
        return name.split(".")[0] or name

    return rule


def _field(argument: str) -> Rule:
    def rule(piece: Piece, fields: Mapping[str, Any]) -> str | None:
        value = field_value(fields, argument)
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return str(value) if is_number else value if isinstance(value, str) and value else None

    return rule


def _path(argument: str) -> Rule:
    try:
        pattern = re.compile(argument)
    except re.error as error:
        raise InputError(f"--domain path:{argument} is not a regular expression: {error}.") from error
    if not pattern.groups:
        raise InputError(f"--domain path:{argument} has no group; write for example 'path:^(?P<domain>[^/]+)/'.")
    group: str | int = "domain" if "domain" in pattern.groupindex else 1

    def rule(piece: Piece, fields: Mapping[str, Any]) -> str | None:
        match = pattern.search(piece.name)
        return (match.group(group) or None) if match else None

    return rule


RULES: dict[str, Callable[[str], Rule]] = {"folder": _folder, "file": _file, "field": _field, "path": _path}
_WITH_ARGUMENT = ("field", "path")


def domain_rule(text: str) -> Rule:
    """Return the rule for ``folder``, ``file``, ``field:…`` or ``path:…``.

    >>> piece = Piece("/data/corpus/web/a.jsonl", "web/a.jsonl", "corpus", "jsonl", 10)
    >>> domain_rule("folder")(piece, {}), domain_rule("file")(piece, {})
    ('web', 'a')
    >>> domain_rule("field:meta.set")(piece, {"meta": {"set": "news"}})
    'news'
    """
    kind, _, argument = text.partition(":")
    if kind not in RULES or (kind in _WITH_ARGUMENT) != bool(argument):
        raise InputError(f"no domain rule {text!r}; use 'folder', 'file', 'field:<dotted.path>' or 'path:<regex>'.")
    rule = RULES[kind](argument)
    if kind == "field":
        return lambda piece, fields: piece.root[1:] if piece.root.startswith("=") else rule(piece, fields)
    # Once per piece, not per record.
    of_piece = functools.lru_cache(64)(lambda piece: piece.root[1:] if piece.root.startswith("=") else rule(piece, {}))
    return lambda piece, fields: of_piece(piece)


def mapped(name: str, mapping: Mapping[str, str | None], used: set[str] | None = None) -> str | None:
    """Return a domain's name after a mapping, None if it is dropped; add names that the mapping has to ``used``.

    >>> [mapped(name, {"a": "x", "b": None}) for name in "abc"], mapped("c", {"a": "x", "*": None})
    (['x', None, 'c'], None)
    """
    if used is not None and name in mapping:
        used.add(name)
    return mapping.get(name, mapping.get("*", name))


def load_mapping(source: str | os.PathLike[str] | Mapping[str, str | None]) -> dict[str, str | None]:
    """Return a mapping of domains from a JSON file, checked."""
    mapping: Any = source
    if not isinstance(source, Mapping):
        try:
            mapping = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read the domain mapping {source}: {error}.") from error
    good = isinstance(mapping, Mapping) and all(isinstance(to, str | None) and to != "" for to in mapping.values())
    if not good:
        raise InputError(f'a domain mapping is a JSON object like {{"old": "new", "unwanted": null}}; {source} is not.')
    return dict(mapping)


def check_domain_name(name: str, known: int) -> None:
    """Raise InputError for a name that cannot be a folder beside the manifest, or if there are too many domains."""
    if name.startswith(".") or "\0" in name or name == "manifest.json" or len(domain_folder(name)) > 255:
        raise InputError(f"a domain cannot be called {name[:80]!r}: choose another --domain rule, or rename it.")
    if known >= MAX_DOMAINS:
        raise InputError(
            f"more than {MAX_DOMAINS:,} domains, the last is {name[:80]!r}; is this the right --domain rule?"
        )


def rule_columns(text: str) -> frozenset[str]:
    """Return the top-level fields that a rule reads."""
    kind, _, argument = text.partition(":")
    return frozenset([argument, argument.split(".")[0]]) if kind == "field" else frozenset()


def field_value(fields: Mapping[str, Any], path: str) -> Any:
    """Return a field by dotted path, or None. A field whose own name holds the dots goes first.

    >>> field_value({"meta": {"set": "news"}}, "meta.set"), field_value({"a.b": 1}, "a.b"), field_value({}, "a")
    ('news', 1, None)
    """
    if path in fields:
        return fields[path]
    value: Any = fields
    for name in path.split("."):
        if isinstance(value, list) and value and isinstance(value[0], tuple):
            value = dict(value)  # a map of Arrow or Parquet
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value
