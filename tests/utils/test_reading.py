"""Files and texts from anywhere are read within bounds, or refused with the reason."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest
import yaml

from kit.utils import reading
from kit.utils.reading import UnreadableError, parse_json, read_bytes, read_lines, read_text
from kit.utils.strict_yaml import NotYamlError, from_yaml, read_yaml


def refused(text: str | bytes) -> str:
    with pytest.raises(UnreadableError) as caught:
        parse_json(text)
    return str(caught.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    zero, pipe = tmp_path / "zero", tmp_path / "pipe"
    zero.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    with tempfile.TemporaryDirectory(dir="/tmp") as short, socket.socket(socket.AF_UNIX) as end:
        end.bind(f"{short}/s")
        for file, kind in ((zero, "a device"), (pipe, "a named pipe"), (tmp_path, "a folder"),
                           (Path(short, "s"), "a socket")):  # fmt: skip
            for read in (read_bytes, read_text, read_yaml, lambda f: [*read_lines(f)]):
                with pytest.raises(UnreadableError, match=f"it is {kind}, not a file"):
                    read(file)


def test_a_key_that_is_there_twice_is_refused_but_for_a_models_files() -> None:
    text = '{"a": 1, "b": [{"c": 1, "c": 2}]}'
    assert refused(text) == "the key 'c' is there twice"
    assert parse_json(text, unique=False) == {"a": 1, "b": [{"c": 2}]}
    assert parse_json('{"a": 1, "b": {"a": 1}}') == {"a": 1, "b": {"a": 1}}


def test_a_link_to_a_file_is_that_file_and_one_to_nothing_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a\r\nb\rc")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link") == "a\nb\nc"
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "gone")


def test_what_is_too_long_is_refused_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "holes"
    with file.open("wb") as opened:
        opened.truncate(2**40)
    with pytest.raises(UnreadableError, match="more than"):
        read_text(file)
    with pytest.raises(UnreadableError, match="line 1 has more than"):
        list(read_lines(file))
    monkeypatch.setattr(reading, "LINES", 10)
    (tmp_path / "lines").write_text("12345\n12345\n")
    with pytest.raises(UnreadableError, match="it has more than 10 B"):
        list(read_lines(tmp_path / "lines"))


def test_other_bytes_are_named() -> None:
    assert "byte 3 (0xff) is no UTF-8" in refused(b'["\xff"]')


def test_nesting_is_counted_outside_of_texts_only() -> None:
    deep = reading.DEEPEST
    assert "nested more than 100 levels" in refused("[" * 100_000)
    assert "nested more than" in refused('{"a":' * (deep + 1) + "1" + "}" * (deep + 1))
    assert parse_json("[" * deep + "]" * deep)
    wide = "[" + ",".join(["[[1]]"] * 1000) + "]"
    assert len(parse_json(wide)) == 1000
    told = '["' + "[" * 500 + '\\"' + "{" * 500 + '"]'
    assert len(parse_json(told)[0]) == 1001
    assert "not JSON" in refused('["' + "[{\\" * 50_000)


@pytest.mark.parametrize("digits", [309, 5000])
def test_a_number_that_nobody_can_show_is_refused(digits: int) -> None:
    assert f"a whole number of {digits} digits" in refused('{"a": ' + "9" * digits + "}")
    assert parse_json('{"a": "' + "9" * digits + '"}')["a"] == "9" * digits, "a text may have them"
    with pytest.raises(yaml.YAMLError, match=r"too large|cannot be read"):
        from_yaml(f"a: {'9' * digits}")


def test_yaml_is_read_as_it_is_written() -> None:
    text = "a: 1e-6\nb: 1:30\nc: 010\nd: 0x1F\ne: -7\nf: 1_000\ng: 2.5\nh: .inf\ni: yes\nj: 0"
    assert from_yaml(text) == {
        "a": 1e-6, "b": "1:30", "c": "010", "d": 31, "e": -7, "f": 1000, "g": 2.5,
        "h": float("inf"), "i": True, "j": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: 2\na: 3", r"the key 'a' is there twice \(line 3"),
        ("x:\n  a: 1\n  a: 1", "the key 'a' is there twice"),
        ("[" * 5000, "nested more than 100 levels"),
        ("\n".join(" " * i + "a:" for i in range(300)), "nested more than 100 levels"),
        ("a: &a [*a]", "a value holds itself"),
        ("2020-99-99", "cannot be read"),
        ("? [1, 2]\n: 3", "a key is a"),
        ("!!timestamp x", "cannot be read"),
        ("!!bool x", "cannot be read"),
        ("!!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("a: 0x" + "f" * 5000, "too large"),
        ("a: [", "expected"),
        ("\x00", "special characters"),
    ],
)
def test_yaml_that_would_be_misread_is_refused(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(NotYamlError, match=why):
        read_yaml(file)


def test_aliases_may_be_used_and_do_not_multiply_without_end() -> None:
    merged = from_yaml("base: &b {x: 1, y: 2}\nmine: {<<: *b, x: 3}\nlist: [*b, *b]")
    assert merged["mine"] == {"x": 3, "y": 2}
    lines = ["a0: &a0 [1]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)
    ]
    with pytest.raises(yaml.YAMLError, match="stands for more than"):
        from_yaml("\n".join(lines))
