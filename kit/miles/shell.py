"""Reads the flags of a launch script without running it: arrays, variables, quotes, sources.

What a script computes (`$(...)`, conditions, loops) is not evaluated. A variable has the value that
is assigned to it first, or the default of `${NAME:-default}`; the environment is not read.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kit.errors import ConfigError
from kit.miles.links import Flags
from kit.utils.reading import SETTINGS, UnreadableError, read_text

_ASSIGNED = re.compile(r"\s*(?:export\s+|readonly\s+|local\s+)?([A-Za-z_]\w*)(\+?)=")
_ARRAY = re.compile(r"\s*([A-Za-z_]\w*)(\+?)=\(")
_DEFAULTED = re.compile(r'\s*:\s+"?\$\{([A-Za-z_]\w*):?=(.*?)\}"?\s*$')
_SOURCED = re.compile(r"\s*(?:source|\.)\s+(.+)")
_ALL_OF = re.compile(r"\$\{([A-Za-z_]\w*)\[[@*]\]\}")
_ONE = re.compile(r"\$\{([A-Za-z_]\w*)(?::?[-=]([^{}]*))?\}|\$([A-Za-z_]\w*)")
_HEREDOC = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
_LAUNCHES = re.compile(r"(^|[\s/\"'}])train(_async)?\.py\b")

_DOLLAR = "\ue000"
"""Stands for a literal dollar sign, as between single quotes."""


@dataclass(slots=True)
class Script:
    """Content of a launch script: flags, variables, arrays, and remarks on what was not read."""

    flags: Flags = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, list[str]] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    """Files that were sourced and could not be read, by their last name without `.sh`."""


def read_script(path: Path) -> Script:
    """Read the flags that a script passes to `train.py`.

    Raises ConfigError for a file that is missing, and for one that starts no `train.py`.
    """
    try:
        text = read_text(path, SETTINGS)
    except (OSError, UnreadableError) as error:
        raise ConfigError(
            f"{path} cannot be read.", why=str(error), fix="give the path of a bash script."
        ) from None
    script = Script(variables={"PWD": "", "SCRIPT_DIR": str(path.parent)})
    words = _follow(script, text, path.parent)
    if words is None:
        raise ConfigError(
            f"{path} starts no train.py.",
            fix="give the script that calls `ray job submit ... -- python3 train.py`, or that "
            "calls train.py itself.",
        )
    _sort(script, words)
    return script


def _follow(script: Script, text: str, folder: Path) -> list[str] | None:
    """Read a script line by line; returns the words after `train.py`."""
    launched = None
    for line in map(_protected, _statements(text)):
        if found := _DEFAULTED.match(line):
            script.variables.setdefault(found[1], _expand(script, found[2]))
        elif found := _ARRAY.match(line):
            _take_array(script, found[1], bool(found[2]), line[found.end() :])
        elif _LAUNCHES.search(line) and not _ASSIGNED.match(line):
            launched = _behind_train(script, line) if launched is None else launched
        elif found := _SOURCED.match(line):
            _take_source(script, found[1], folder)
        elif found := _ASSIGNED.match(line):
            _take_variable(script, found[1], line[found.end() :])
        elif "+=(" in line:
            script.remarks.append(f"a condition was not followed: {line.strip()}")
    return launched


def _statements(text: str) -> Iterator[str]:
    """Logical lines: joined at a backslash, an open quote or an open array; without heredocs."""
    lines = iter(re.split(r"\r?\n", text))  # what else Python takes for an end of line is text
    for line in lines:
        whole = line
        while True:
            if whole.rstrip().endswith("\\") and not whole.rstrip().endswith("\\\\"):
                whole = whole.rstrip()[:-1] + " "
            elif _is_whole(whole):
                break
            else:
                whole += "\n"
            more = next(lines, None)
            if more is None:
                break
            whole += more
        if mark := _HEREDOC.search(whole):
            for skipped in lines:
                if skipped.strip() == mark[2]:
                    break
        if whole.strip() and not whole.lstrip().startswith("#"):
            yield whole


def _scanned(text: str) -> Iterator[tuple[int, str, str]]:
    """Scan a text: each character, its index, and its context (quote, comment `#`, escape)."""
    inside, is_escaped = "", False
    for at, char in enumerate(text):
        if is_escaped:
            is_escaped = False
            yield at, char, "\\"
            continue
        if inside == "#":
            inside = "" if char == "\n" else "#"
        elif char == "\\" and inside != "'":
            is_escaped = True
        elif char in "'\"" and inside in ("", char):
            yield at, char, inside
            inside = "" if inside else char
            continue
        elif char == "#" and not inside and (at == 0 or text[at - 1] in " \t\n("):
            inside = "#"
        yield at, char, inside


def _protected(text: str) -> str:
    """Mark literal dollar signs: those between single quotes or after a backslash."""
    return "".join(
        _DOLLAR if char == "$" and inside in ("'", "\\") else char
        for _, char, inside in _scanned(text)
    )


def _is_whole(text: str) -> bool:
    words = _words(text)
    if words is None:
        return False
    return not _ARRAY.match(text) or _closing(text) is not None


def _words(text: str) -> list[str] | None:
    """Split a line into words; None if a quote is open."""
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        return None


def _closing(text: str) -> str | None:
    """Text between the brackets of an array, without comments; None while it is open."""
    found: list[str] = []
    depth = 0
    for _, char, inside in _scanned(text[text.index("(") :]):
        if not inside and char in "()":
            depth += 1 if char == "(" else -1
            if not depth:
                return "".join(found[1:])
        if inside != "#":
            found.append(char)
    return None


def _take_array(script: Script, name: str, more: bool, rest: str) -> None:
    words = _resolved(script, _closing(f"({rest}") or "")
    before = script.arrays.get(name, []) if more else []
    script.arrays[name] = [*before, *words]


def _take_variable(script: Script, name: str, rest: str) -> None:
    if "$(" in rest or "`" in rest:
        return  # computed; what was assigned before stays
    words = _words(rest) or [""]
    script.variables.setdefault(name, _expand(script, words[0]))


def _take_source(script: Script, what: str, folder: Path) -> None:
    words = _words(what) or [what]
    file = Path(_expand(script, words[0]))
    if not file.is_absolute():
        file = folder / file
    try:
        text = read_text(file, SETTINGS)
    except (OSError, UnreadableError):
        script.unread[file.stem] = words[0]
        return
    _follow(script, text, file.parent)


def _behind_train(script: Script, line: str) -> list[str]:
    """Words up to the end of the command: a pipe, a redirection, another command."""
    starts = [match.end() for match in _LAUNCHES.finditer(line)]
    rest = line[starts[-1] :].removeprefix('"').removeprefix("'")
    ends = [at for at, char, inside in _scanned(rest) if char in "|<>;&" and not inside]
    return _resolved(script, re.sub(r"\s\d$", "", rest[: ends[0]]) if ends else rest)


def _resolved(script: Script, text: str) -> list[str]:
    """Expand arrays and variables in words."""
    found: list[str] = []
    for word in _words(_without_subshells(text)) or []:
        if name := _ALL_OF.fullmatch(word):
            if name[1] not in script.arrays:
                script.remarks.append(_no_array(script, name[1]))
            found += script.arrays.get(name[1], [])
        else:
            found.append(_expand(script, word))
    return found


def _without_subshells(text: str) -> str:
    """Remove brackets that group commands: those that stand alone, outside of quotes."""
    around = f" {text} "
    return "".join(
        " " if char in "()" and not inside and f"{around[at]}{around[at + 2]}".isspace() else char
        for at, char, inside in _scanned(text)
    )


def _no_array(script: Script, name: str) -> str:
    if name == "MODEL_ARGS" and script.unread:
        return (
            f"MODEL_ARGS come from {', '.join(script.unread)}: the kit reads the architecture from "
            "the checkpoint"
        )
    return f"{name} is not set in the script, and its flags are missing here"


def _expand(script: Script, word: str) -> str:
    def value(match: re.Match[str]) -> str:
        name, default = match[1] or match[3], match[2]
        if name in script.variables:
            return script.variables[name]
        return match[0] if default is None else _expand(script, default)

    expanded = _ONE.sub(value, word).replace(_DOLLAR, "$")
    return expanded.removeprefix("/") if word.startswith("$PWD/") else expanded


def _sort(script: Script, words: list[str]) -> None:
    """Collect flags with their values; the last counts if one is given twice."""
    flag = None
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            script.flags[flag] = [value] if equals else []
        elif flag is not None:
            script.flags[flag].append(word)
        else:
            script.remarks.append(f"{word!r} belongs to no flag")
    for flag, values in script.flags.items():
        if flag == "--wandb-key":
            continue  # nobody wants to see it
        if open_ones := [value for value in values if "$" in value and not value.startswith("{")]:
            script.remarks.append(f"{flag} is {open_ones[0]}, which the script computes")
