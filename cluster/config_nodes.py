"""YAML text -> checked values by dotted key, each with the place it came from.

The text is composed, not loaded: nodes keep line numbers and the difference between ``1`` and ``"1"``,
so every error names file, line and key. A file may only hold what the dataclasses declare.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from cluster.errors import ConfigError

_INT = re.compile(r"[+-]?(0|[1-9][0-9_]*)\Z")
_FLOAT = re.compile(r"[+-]?([0-9][0-9_]*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?\Z")
_NULL = "tag:yaml.org,2002:null"
_STR = "tag:yaml.org,2002:str"


@dataclass(frozen=True, slots=True)
class Origin:
    """A file, or one ``--set``: what errors begin with."""

    label: str
    is_file: bool

    def at(self, node: yaml.Node) -> str:
        """``file:line`` for a file, the whole ``--set a.b=c`` otherwise."""
        return f"{self.label}:{node.start_mark.line + 1}" if self.is_file else self.label


@dataclass(frozen=True, slots=True)
class Value:
    """A checked value and where it stands."""

    value: Any
    where: str


def compose(text: str, origin: Origin) -> yaml.Node | None:
    """The root node of a YAML text; None when it is empty.

    Raises:
        ConfigError: not YAML.
    """
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        where = f"{origin.label}:{line}" if origin.is_file else origin.label
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())  # one line
        raise ConfigError(f"{origin.label}: not valid YAML: {text}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin.label}: not valid YAML: nested too deeply") from error


def read_section(
    node: yaml.Node, section: type[Any], origin: Origin, prefix: str = ""
) -> Iterator[tuple[str, Value]]:
    """Yield every leaf of a mapping that sets fields of the dataclass ``section``.

    Raises:
        ConfigError: an unknown or repeated key, or a value of the wrong type.
    """
    if isinstance(node, yaml.ScalarNode) and node.tag == _NULL:
        return  # a section whose lines are all comments
    for name, child, at in _items(node, origin, prefix or "the config"):
        annotation = field_type(section, name, f"{at}: ", prefix)
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(annotation):
            yield from read_section(child, typing.cast("type[Any]", annotation), origin, f"{key}.")
        else:
            yield key, Value(read_value(child, annotation, key, origin), origin.at(child))


def field_type(section: type[Any], name: str, where: str, prefix: str) -> Any:
    """The annotation of field ``name`` of a dataclass.

    Raises:
        ConfigError: no such field; names the nearest one.
    """
    hints = get_type_hints(section)
    names = [field.name for field in dataclasses.fields(section)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f", did you mean {prefix}{near[0]}?" if near else ""
        allowed = ", ".join(names)
        inside = prefix.rstrip(".") or "the config"
        raise ConfigError(f"{where}unknown key {prefix}{name}{hint} ({inside} holds: {allowed})")
    return hints[name]


def read_value(node: yaml.Node, annotation: Any, key: str, origin: Origin) -> Any:
    """One value, checked against its annotation.

    Raises:
        ConfigError: wrong type; names key, value and what is allowed.
    """
    origin_type = get_origin(annotation)
    if origin_type is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise _mismatch(node, annotation, key, origin)
        item = get_args(annotation)[0]
        return tuple(
            read_value(child, item, f"{key}[{i}]", origin) for i, child in enumerate(node.value)
        )
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return _read_record(node, annotation, key, origin)
    if isinstance(node, yaml.ScalarNode):
        options = get_args(annotation) if origin_type in (Union, types.UnionType) else (annotation,)
        for option in options:
            found, value = _read_scalar(node, option)
            if found:
                return value
    raise _mismatch(node, annotation, key, origin)


def describe_type(annotation: Any) -> str:
    """What a field takes, in words: ``integer``, ``auto | fp8``, ``integer | auto``."""
    origin_type = get_origin(annotation)
    if origin_type is Literal:
        return " | ".join(str(choice) for choice in get_args(annotation))
    if origin_type in (Union, types.UnionType):
        return " | ".join(describe_type(option) for option in get_args(annotation))
    if origin_type is tuple:
        return f"list of {describe_type(get_args(annotation)[0])}"
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        hints = get_type_hints(annotation)
        return "{" + ", ".join(f"{name}: {describe_type(t)}" for name, t in hints.items()) + "}"
    words = {bool: "true | false", int: "integer", float: "number", str: "text"}
    return words.get(annotation, str(annotation))


def _read_record(node: yaml.Node, record: type[Any], key: str, origin: Origin) -> Any:
    values: dict[str, Any] = {}
    for name, child, at in _items(node, origin, key):
        annotation = field_type(record, name, f"{at}: ", f"{key}.")
        values[name] = read_value(child, annotation, f"{key}.{name}", origin)
    missing = [
        field.name
        for field in dataclasses.fields(record)
        if field.name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{origin.at(node)}: {key} lacks {', '.join(missing)}")
    return record(**values)


def _items(node: yaml.Node, origin: Origin, what: str) -> Iterator[tuple[str, yaml.Node, str]]:
    """Key, value node and place of every entry of a mapping; repeated keys are refused."""
    if not isinstance(node, yaml.MappingNode):
        text = f"{what.rstrip('.')} must be a mapping of keys, got {_shown(node)}"
        raise ConfigError(f"{origin.at(node)}: {text}")
    seen: dict[str, int] = {}
    for key_node, child in node.value:
        at = origin.at(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{at}: a key of {what.rstrip('.')} must be a word")
        name = key_node.value
        line = key_node.start_mark.line + 1
        if name in seen:
            raise ConfigError(f"{at}: key {name} is there twice (first in line {seen[name]})")
        seen[name] = line
        yield name, child, at


def _read_scalar(node: yaml.ScalarNode, option: Any) -> tuple[bool, Any]:
    """(True, value) when the scalar is what ``option`` declares."""
    text: str = node.value
    plain = node.style is None
    if get_origin(option) is Literal:
        for choice in get_args(option):
            if text == str(choice):
                return True, choice
        return False, None
    if option is bool:
        return plain and text.lower() in ("true", "false"), text.lower() == "true"
    if option is int:
        found = plain and _INT.match(text) is not None
        return found, int(text) if found else None
    if option is float:
        if not plain or not any(c.isdigit() for c in text) or _FLOAT.match(text) is None:
            return False, None
        number = float(text)
        return math.isfinite(number), number
    if option is str:
        return node.tag == _STR, text
    return False, None


def _mismatch(node: yaml.Node, annotation: Any, key: str, origin: Origin) -> ConfigError:
    quote = ""
    if annotation is str and isinstance(node, yaml.ScalarNode) and node.tag != _NULL:
        quote = " (put it in quotes)"
    text = f"{key} must be {describe_type(annotation)}, got {_shown(node)}{quote}"
    return ConfigError(f"{origin.at(node)}: {text}")


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if node.tag == _NULL:
        return "nothing"
    kind = "the text " if node.tag == _STR else ""
    return f"{kind}{node.value!r}" if len(node.value) <= 80 else f"{kind}{node.value[:77]!r}..."
