"""Files and texts that anybody may have written, read within bounds: where every reader begins.

A run folder, a checkpoint or a notebook is data that came from somewhere. A name in it can be a
link to a device without end, or a pipe that nobody writes to; a text can be nested so deeply that
Python's own readers exhaust the stack. So:

open_regular      regular files only, links to them included; never a device, a pipe or a socket
read_text         bounded, and decoded as UTF-8
parse_json        nested at most `DEEPEST` levels, no number beyond what a float holds, no key twice
read_lines        each line bounded, and all together

What cannot be read raises `UnreadableError`, a ValueError whose message says why in half a
sentence; a file that is not there, or that may not be opened, raises OSError as everywhere.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from kit.utils.formatting import data_size, shorten

DEEPEST = 100
"""Levels of lists and mappings in one another; Python's readers take about a thousand."""
DOCUMENT = 256 * 10**6
"""Bytes of a text that is read at once: notebooks hold pictures, checkpoints a long history."""
SETTINGS = 10**6
"""Bytes of a text that a person writes; reading YAML takes seconds for each of these."""
LINE = 64 * 10**6
"""Bytes of one line: a sample of a million tokens has about half of them."""
LINES = 2 * 10**9
"""Bytes of a file of lines."""
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_LONG_NUMBER = re.compile(r"\d{309}")
LARGEST = 10**308
"""Whole numbers are at most so large, so that each is also a float, and can be shown."""


class UnreadableError(ValueError):
    """A file or a text is not what it should be; the message says why."""


def open_regular(file: str | Path) -> BinaryIO:
    """Open a regular file to read its bytes.

    Raises:
        UnreadableError: it is a device, a pipe, a socket or a folder.
        OSError: it is not there, or may not be read.
    """
    if "\0" in str(file):
        raise UnreadableError("its name has a null byte, which no file's has")
    _refuse_others(os.stat(file).st_mode)
    # Without waiting, should somebody put a pipe in its place between the two looks.
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _refuse_others(os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _refuse_others(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in _KINDS.items() if is_kind(mode)), "something else")
        raise UnreadableError(f"it is {kind}, not a file")


def read_bytes(file: str | Path, most: int = DOCUMENT) -> bytes:
    """Read a regular file of at most `most` bytes. Raises UnreadableError, OSError."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        found = opened.read(most + 1) if size <= most else b""
    if size > most or len(found) > most:
        raise UnreadableError(
            f"it has more than the {data_size(most)} that are read of such a file"
        )
    return found


def read_text(file: str | Path, most: int = DOCUMENT) -> str:
    """Read a regular file as UTF-8, with newlines alone. Raises UnreadableError, OSError."""
    text = decode(read_bytes(file, most))
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_end(file: str | Path, most: int = SETTINGS) -> str:
    """The end of a log; what is no UTF-8 is replaced. Raises UnreadableError, OSError."""
    with open_regular(file) as opened:
        opened.seek(max(os.fstat(opened.fileno()).st_size - most, 0))
        return opened.read(most).decode("utf-8", "replace")


def decode(data: bytes) -> str:
    """Decode UTF-8. Raises UnreadableError, which names the first byte that is not."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"byte {error.start + 1} ({data[error.start]:#04x}) is no UTF-8 text"
        ) from None


def read_lines(file: str | Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line, without its end. Raises UnreadableError, OSError."""
    left = LINES
    with open_regular(file) as opened:
        number = 0
        while line := opened.readline(LINE + 1):
            number += 1
            left -= len(line)
            if len(line) > LINE:
                raise UnreadableError(f"line {number} has more than {data_size(LINE)}")
            if left < 0:
                raise UnreadableError(f"it has more than {data_size(LINES)}")
            yield number, line.removesuffix(b"\n")


def parse_json(text: str | bytes, *, unique: bool = True) -> Any:
    """Parse JSON.

    Args:
        text: what is parsed.
        unique: refuse a key that is there twice. Otherwise the last one counts, as in Transformers,
            for the files of a model.

    Raises:
        UnreadableError: it is no JSON, or not within the bounds.
    """
    text = text if isinstance(text, str) else decode(text)
    _check_depth(text)
    whole = _whole_number if _LONG_NUMBER.search(text) else None
    try:
        return json.loads(text, parse_int=whole, object_pairs_hook=_unique if unique else None)
    except UnreadableError:
        raise
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"not JSON: {first_line(error)}") from None


def read_json(file: str | Path, most: int = DOCUMENT, *, unique: bool = True) -> Any:
    """Read a JSON file; `unique` as in `parse_json`. Raises UnreadableError, OSError."""
    return parse_json(read_bytes(file, most), unique=unique)


def read_object(file: str | Path, most: int = DOCUMENT, *, unique: bool = True) -> dict[str, Any]:
    """Read a JSON object; `unique` as in `parse_json`. Raises UnreadableError, OSError."""
    return mapping(read_json(file, most, unique=unique))


def mapping(value: Any) -> dict[str, Any]:
    """The value, which has to be a mapping. Raises UnreadableError."""
    if not isinstance(value, dict):
        raise UnreadableError(f"it holds {kind_of(value)}, not a mapping")
    return value


def kind_of(value: Any) -> str:
    """What a value of JSON or YAML is called."""
    names: Mapping[type, str] = {
        type(None): "nothing",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise UnreadableError(f"the key {shorten(key, 60)!r} is there twice")
        seen.add(key)
    return found


def _check_depth(text: str) -> None:
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth = 0
    for found in _BRACKETS.finditer(text):
        sign = found[0]
        if sign in "[{":
            depth += 1
            if depth > DEEPEST:
                raise UnreadableError(f"its values are nested more than {DEEPEST} levels deep")
        elif sign in "]}":
            depth -= 1


def _whole_number(digits: str) -> int:
    if len(digits) > 310 or abs(int(digits)) > LARGEST:
        raise UnreadableError(
            f"it has a whole number of {len(digits)} digits: {shorten(digits, 20)}"
        )
    return int(digits)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, of a length that can be shown."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 200) if lines else type(error).__name__
