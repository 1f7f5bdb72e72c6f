"""YAML as settings are read: what it would misread in silence is refused or read as it is written.

`1e-6` is a number (YAML 1.1 takes it for a word), `1:30` is a text (it takes it for 90), `010` is
no 8. A key that is there twice, a value nested without end, a number that nobody can show: each is
an error with its line.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from kit.utils.formatting import shorten
from kit.utils.reading import DEEPEST, LARGEST, SETTINGS, UnreadableError, first_line, read_text

MOST_NODES = 100_000
"""Values of one text, where each use of an alias counts as what it stands for."""
SCIENTIFIC = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_FLOAT = "tag:yaml.org,2002:float"
_INT = "tag:yaml.org,2002:int"
_PLAIN = {
    _FLOAT: re.compile(
        r"^([-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    _INT: re.compile(r"^[-+]?(0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"),
}
"""YAML's own patterns, but for numbers to the base 60 and those of base 8 that begin with 0."""
_KEYS = (str, int, float, bool, type(None))


class _Loader(yaml.SafeLoader):
    """Loader that bounds what it composes, and refuses what a mapping would lose."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node, counting depth and size."""
        if self._depth >= DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"values are nested more than {DEEPEST} levels deep",
                problem_mark=self.peek_event().start_mark,  # type: ignore[no-untyped-call]
            )
        self._depth += 1
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if alias and id(node) not in self._sizes:
            raise _at(node, "a value holds itself")
        self._depth -= 1
        if id(node) not in self._sizes:
            self._sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: Any) -> int:
        """Nodes below one, aliases written out; those below it were measured before."""
        below = [part for pair in node.value for part in pair] if _is_mapping(node) else node.value
        inner = below if isinstance(below, list) else []
        size = 1 + sum(self._sizes[id(part)] for part in inner)
        if size > MOST_NODES:
            raise _at(node, f"it stands for more than {MOST_NODES:,} values")
        return size

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping. Raises ConstructorError for a key that is there twice."""
        if not _is_mapping(node):
            raise _at(node, "a mapping is missing")
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, _KEYS):
                raise _at(key_node, f"a key is a {type(key).__name__}, not a word")
            if key in seen:
                raise _at(key_node, f"the key {shorten(str(key), 60)!r} is there twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_whole(self, node: Any) -> int:
        """Construct a whole number. Raises ConstructorError for one that nobody can show."""
        value: int = self.construct_yaml_int(node)
        if abs(value) > LARGEST:
            raise _at(node, "a whole number is too large")
        return value


def _is_mapping(node: Any) -> bool:
    return isinstance(node, yaml.MappingNode)


def _at(node: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _PLAIN]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (*_PLAIN.items(), (_FLOAT, SCIENTIFIC)):
    _Loader.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))
_Loader.add_constructor(_INT, _Loader.construct_whole)


class NotYamlError(UnreadableError):
    """A text is no YAML, or YAML that would be misread; the message says where."""


def from_yaml(text: str) -> Any:
    """Read YAML as settings are read: `1e-6` is a number. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as e:
        # PyYAML's constructors let through what Python's own say to a date of the 40th of May.
        raise yaml.YAMLError(f"a value cannot be read: {first_line(e)}") from None


def read_yaml(file: str | Path) -> Any:
    """Read a YAML file. Raises UnreadableError, OSError."""
    text = read_text(file, SETTINGS)
    try:
        return from_yaml(text)
    except yaml.YAMLError as error:
        raise NotYamlError(explained(error)) from None


def explained(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    words = getattr(error, "problem", None) or first_line(error)
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return shorten(str(words), 200) + where
