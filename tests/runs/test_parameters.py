from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kit.cli.app import app
from kit.errors import RunError
from kit.runs.parameters import Parameter, check_parameters, open_notebook, read_parameters
from tests.runs.conftest import MakeNotebook


def test_parameters_have_the_types_values_and_comments_of_the_notebook(
    make_notebook: MakeNotebook,
) -> None:
    found = read_parameters(make_notebook())
    assert list(found) == ["steps", "rate", "fast", "name", "sizes", "anything", "computed"]
    assert str(found["steps"]) == "steps: int = 5  # training steps"
    assert found["rate"].kinds == ("float", "None")
    assert found["fast"].type == "bool"
    assert found["sizes"].help == "first line, second line"
    assert found["anything"].type == "any"
    assert found["computed"].value == "2 * 3"
    assert found["sizes"].value == [1, 2]


def test_hash_and_equals_signs_inside_of_a_value_are_no_comment(
    make_notebook: MakeNotebook,
) -> None:
    found = read_parameters(make_notebook(parameters='pattern = "a=#b"  # looks for a=#b'))
    assert found["pattern"].value == "a=#b"
    assert found["pattern"].help == "looks for a=#b"


def test_a_notebook_without_a_parameters_cell_takes_none(make_notebook: MakeNotebook) -> None:
    path = make_notebook("1", parameters="")
    assert read_parameters(path) == {}
    with pytest.raises(RunError, match="It takes no parameters"):
        check_parameters(path, {}, {"steps": "3"})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "12", 12),
        ("steps", "+3", 3),
        ("rate", "1e-3", 1e-3),
        ("rate", "2", 2.0),
        ("rate", "None", None),
        ("rate", "null", None),
        ("fast", "true", True),
        ("fast", "No", False),
        ("name", "007", "007"),
        ("name", "true", "true"),
        ("sizes", "[1, 1e-3]", [1, 1e-3]),
        ("sizes", "[a, b]", ["a", "b"]),
        ("anything", "3", 3),
        ("anything", "1e-3", 1e-3),
        ("anything", "a word", "a word"),
    ],
)
def test_text_is_read_as_the_type_of_the_parameter(
    make_notebook: MakeNotebook, name: str, text: str, value: Any
) -> None:
    path = make_notebook()
    result = check_parameters(path, read_parameters(path), {name: text})
    assert result == {name: value}
    assert type(result[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("steps", "3.5"),
        ("steps", "many"),
        ("steps", 3.5),
        ("steps", None),
        ("steps", True),
        ("rate", "fast"),
        ("fast", "maybe"),
        ("fast", 2),
        ("sizes", "{a: 1}"),
        ("sizes", "[1"),
        ("name", 3),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_type_and_default(
    make_notebook: MakeNotebook, name: str, given: object
) -> None:
    path = make_notebook()
    known = read_parameters(path)
    with pytest.raises(RunError) as caught:
        check_parameters(path, known, {name: given})
    assert name in str(caught.value)
    assert known[name].type in str(caught.value)
    assert known[name].default in str(caught.value)


def test_values_from_python_pass_as_they_are() -> None:
    assert Parameter("rate", "0.1", ("float",)).convert(2) == 2.0
    assert Parameter("names", "[]", ("list",)).convert(["a"]) == ["a"]
    assert Parameter("any", "f()").convert({"a": 1}) == {"a": 1}


def test_numbers_inside_of_a_list_or_mapping_are_read_as_settings_read_them() -> None:
    options = Parameter("options", "{}", ("dict",))
    assert options.convert("{a: 1e-5, b: [2E3, x], c: '1e-5'}") == {
        "a": 1e-5,
        "b": [2e3, "x"],
        "c": "1e-5",
    }
    assert Parameter("rates", "[]", ("list",)).convert("[1e-5, -.5e+1]") == [1e-5, -5.0]


@given(st.floats(allow_nan=False))
def test_every_float_that_python_prints_is_read_back(number: float) -> None:
    assert Parameter("rate", "0.1", ("float",)).convert(repr(number)) == number


@given(st.lists(st.integers() | st.booleans() | st.text(max_size=5), max_size=5))
def test_every_list_that_json_writes_is_read_back(values: list[Any]) -> None:
    assert Parameter("values", "[]", ("list",)).convert(json.dumps(values)) == values


def test_an_unknown_parameter_is_refused_with_the_nearest_and_all_known(
    make_notebook: MakeNotebook,
) -> None:
    path = make_notebook()
    with pytest.raises(RunError) as caught:
        check_parameters(path, read_parameters(path), {"step": "3"})
    message = str(caught.value)
    assert "Did you mean 'steps'?" in message
    assert "rate: float | None = None  # None takes the preset's" in message


def test_a_missing_notebook_is_refused_with_the_nearest(make_notebook: MakeNotebook) -> None:
    path = make_notebook()
    with pytest.raises(RunError, match=r"lesson\.ipynb"):
        read_parameters(path.with_name("leson.ipynb"))


@pytest.mark.parametrize("text", ["", "not json", "[]", '{"cells": 3}', "\x00"])
def test_a_file_that_is_no_notebook_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.ipynb"
    path.write_text(text)
    with pytest.raises(RunError, match="is not a notebook"):
        read_parameters(path)


def test_a_notebook_for_another_language_is_refused(make_notebook: MakeNotebook) -> None:
    path = make_notebook()
    path.write_text(path.read_text().replace('"language": "python"', '"language": "julia"'))
    with pytest.raises(RunError, match="julia"):
        read_parameters(path)


def test_a_parameters_cell_that_is_not_plain_python_is_named(make_notebook: MakeNotebook) -> None:
    path = make_notebook(parameters="steps = 3\n%matplotlib inline")
    with pytest.raises(RunError, match="line 2"):
        read_parameters(path)


@pytest.mark.parametrize(
    ("line", "given", "message"),
    [
        ("learning_rate: float = 1e-4", "-1", "cannot be -1.0"),
        ("learning_rate: float = 1e-4", "nan", "cannot be nan"),
        ('advantage_estimator: str = "grpo"', "grop", "Did you mean 'grpo'"),
        ('preset: str = "tiny"', "tinny", "Did you mean 'tiny'"),
        ("seed: int = 0", "-1", "cannot be -1"),
        ("steps: int = 3", "-3", "cannot be -3"),
        ('speed: Literal["fast", "slow"] = "fast"', "slw", "Did you mean 'slow'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_one_that_can(
    make_notebook: MakeNotebook, line: str, given: str, message: str
) -> None:
    (parameter,) = read_parameters(make_notebook(parameters=line)).values()
    with pytest.raises(RunError, match=message):
        parameter.convert(given)


def test_a_model_or_a_source_of_data_is_no_setting_of_that_name(
    make_notebook: MakeNotebook,
) -> None:
    known = read_parameters(make_notebook(parameters='model: str = "tiny"\ndata: str = "a"'))
    assert known["model"].convert("other") == "other"
    assert known["data"].convert("file.jsonl") == "file.jsonl"


def test_a_parameters_cell_without_its_tag_is_told_to_get_it(make_notebook: MakeNotebook) -> None:
    path = make_notebook("import kit", "lr: float = 1e-4\nsteps = 3", parameters="")
    with pytest.raises(RunError, match=r"(?s)Code cell 2 sets it.*tag it `parameters`: in Jupyter"):
        check_parameters(path, {}, {"lr": "1e-5"})
    with pytest.raises(RunError, match=r"(?s)write `seed = \.\.\.` into a cell.*Cell Tags"):
        check_parameters(path, {}, {"seed": "1"})


@pytest.mark.parametrize(
    "source",
    ["x = " + "(" * 5000, "x = " + "[" * 150 + "]" * 150, "x = " + "9" * 5000, "x = \x00",
     "x = " + "-" * 20_000 + "1", "x = '" + "\ud800".encode("utf-8", "surrogatepass").decode(
         "utf-8", "replace"), "x = " + "+".join(["1"] * 5000)],
)  # fmt: skip
def test_a_parameters_cell_of_any_python_is_read_or_refused(tmp_path: Path, source: str) -> None:
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    with suppress(RunError):
        for parameter in read_parameters(tmp_path / "a.ipynb").values():
            assert str(parameter)
            with suppress(RunError):
                parameter.convert("[" * 9000)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 90_000, "nested more than"), ('{"cells": ' + "9" * 5000 + "}", "digits"),
        ("[]", "a list, not a mapping"), ("{}", "not a notebook"), ('{"cells": 1}', "not a noteb"),
        ('{"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": []}, "cells": []}', "no"),
    ],
)  # fmt: skip
def test_what_is_no_notebook_is_refused_with_the_reason(
    tmp_path: Path, text: str, why: str
) -> None:
    (tmp_path / "a.ipynb").write_text(text)
    with pytest.raises(RunError, match=why):
        open_notebook(tmp_path / "a.ipynb")


def test_a_notebook_is_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "a.ipynb").symlink_to("/dev/zero")
    with pytest.raises(RunError, match="it is a device"):
        open_notebook(tmp_path / "a.ipynb")


def test_comments_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell(
        "x: int = 1  # \x1b]0;owned\x07\x1b[31m \u202e", metadata={"tags": ["parameters"]}
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "a.ipynb")
    found = CliRunner().invoke(app, ["params", str(tmp_path / "a.ipynb")])
    assert found.exit_code == 0
    assert "x: int = 1  # ␛]0;owned␇␛[31m ⟨U+202E⟩" in found.output
    wrong = CliRunner().invoke(app, ["run", str(tmp_path / "a.ipynb"), "-p", "\x1b[31mx=1"])
    assert wrong.exit_code != 0
    assert "\x1b[31mx" not in wrong.output
