"""YAML in and out: a small, strict subset, safe to read from strangers and stable to write.

Reading works on the parser's events, so that tags, anchors and aliases are refused where they
stand rather than resolved: nothing in a file can name a Python type or expand without bound.
Plain scalars follow YAML 1.2's core schema: ``no`` and ``1:30`` are text. Writing the same value
gives the same text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from ditopt.errors import PlanError

MAX_BYTES = 16 << 20
"""Largest text that is parsed: about a hundred times a plan for 60 layers of 40 heads."""

_MAX_DEPTH = 32
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INT = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}

Scalar = str | int | float | bool | None


def load(text: str) -> Any:
    """The one document in `text` as dicts with string keys, lists and scalars.

    Raises:
        PlanError: not YAML, a tag, an anchor, a key that stands twice, too long or too deep.
    """
    if len(text) > MAX_BYTES:
        raise PlanError(f"the text has {len(text)} characters, at most {MAX_BYTES} are read")
    try:
        events = _events(text)
        document = _value(next(events), events, depth=0)
        if next(events, None) is not None:
            raise PlanError("expected one YAML document, got several")
    except StopIteration:
        raise PlanError("the text is empty, expected a YAML mapping") from None
    except (yaml.YAMLError, ValueError) as error:
        raise PlanError(f"not valid YAML: {error}") from error
    return document


def dump(value: Any) -> str:
    """`value` as YAML: keys in their order, innermost collections on one line."""
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=100,
        allow_unicode=True,
    )


def _where(event: yaml.Event) -> str:
    return "YAML" if event.start_mark is None else f"line {event.start_mark.line + 1}"


def _events(text: str) -> Iterator[yaml.Event]:
    structure = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent)
    for event in yaml.parse(text, Loader=_LOADER):
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise PlanError(f"{_where(event)}: anchors and aliases are refused; write values out")
        if tag is not None:
            raise PlanError(f"{_where(event)}: tag {tag!r} is refused; a plan is plain data")
        if not isinstance(event, (*structure, yaml.DocumentEndEvent)):
            yield event


def _value(event: yaml.Event, events: Iterator[yaml.Event], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise PlanError(f"{_where(event)}: nested more than {_MAX_DEPTH} deep")
    if isinstance(event, yaml.ScalarEvent):
        return _resolve(event.value) if event.implicit[0] else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(event, events, depth + 1))
        return items
    return _mapping(events, depth)


def _mapping(events: Iterator[yaml.Event], depth: int) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent):
            raise PlanError(f"{_where(event)}: a key must be text, not a collection")
        if event.value in mapping:
            raise PlanError(f"{_where(event)}: key {event.value!r} stands twice; keep one")
        mapping[event.value] = _value(next(events), events, depth + 1)
    return mapping


def _resolve(plain: str) -> Scalar:
    if plain in _CONSTANTS:
        return _CONSTANTS[plain]
    if _INT.fullmatch(plain):
        return int(plain)
    if _FLOAT.fullmatch(plain):
        return float(plain)
    return plain


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Quoted where plain text would be read as something else, or hardly be read at all."""
    style = None if _resolve(text) is text and text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
