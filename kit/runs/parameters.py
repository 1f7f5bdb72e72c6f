"""A notebook's parameters: what they are, and whether given values fit.

A parameter is an assignment in the cell tagged `parameters`, with its type and a comment:

    steps: int = 60  # training steps
    learning_rate: float | None = None  # None takes the preset's

Papermill itself lets an unknown name pass with a warning and hands `-p flag true` to the notebook
as the string "true"; here both are settled before a kernel starts.

A parameter with the name of a setting has that setting's bounds too: a `learning_rate` of -1 would
stop the notebook a minute later.
"""

from __future__ import annotations

import ast
import io
import json
import os
import re
import tokenize
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import TypeAdapter, ValidationError

from kit.config import SessionConfig
from kit.config.presets import PRESETS
from kit.errors import RunError, did_you_mean
from kit.utils.formatting import shorten
from kit.utils.reading import first_line, mapping, parse_json, read_text

if TYPE_CHECKING:
    from nbformat import NotebookNode


PARAMETERS_TAG = "parameters"

LONGEST = 200
"""Characters of a value or a line that an error quotes."""
STEPS = ("steps", "num_rollout")
"""Names that notebooks give to the number of training steps."""
_OWN = ("seed", "device")
_SECTIONS = ("training", "rollout", "evaluation")
"""Settings, and sections of them, whose bounds are those of parameters of the same name too."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a notebook."""

    name: str
    default: str
    """As the notebook writes it."""
    kinds: tuple[str, ...] = ()
    """The types it takes, of None, bool, int, float, list, dict, str; empty takes anything."""
    choices: tuple[Any, ...] = ()
    """The only values it takes, where it is annotated with `Literal`."""
    help: str = ""
    """The comment beside it, or else the comment lines above it."""

    @property
    def type(self) -> str:
        """Type as text: `float | None`."""
        if self.choices:
            return f"one of {', '.join(map(repr, self.choices))}"
        ordered = [kind for kind in self.kinds if kind != "None"]
        return " | ".join(ordered + ["None"] * ("None" in self.kinds)) or "any"

    @property
    def value(self) -> Any:
        """The default as a value; its text where the notebook computes it."""
        try:
            return ast.literal_eval(self.default)
        except _NO_LITERAL:
            return self.default

    def __str__(self) -> str:
        line = f"{self.name}: {self.type} = {self.default}"
        return f"{line}  # {self.help}" if self.help else line

    def convert(self, given: object) -> Any:
        """The value that the notebook gets.

        Args:
            given: text from a command line, which is read as the parameter's type; or a Python
                value, which must be of that type already.

        Raises:
            RunError: it is not of the parameter's type, or a value that cannot be.
        """
        try:
            value = self._from_text(given) if isinstance(given, str) else self._checked(given)
        except ValueError:
            raise RunError(
                f"Parameter {self.name!r} takes {self.type}, but was given {_quoted(given)}.",
                fix=f"the notebook's own value is {shorten(self.default, LONGEST)}; give one like "
                "it.",
            ) from None
        if value is not None and value != self.value and (fix := self._way_out(value)):
            raise RunError(f"Parameter {self.name!r} cannot be {_quoted(value)}.", fix=fix)
        return value

    def _from_text(self, text: str) -> Any:
        if not self.kinds:
            return _yaml(text)
        for read in (read for kind, read in _READERS.items() if kind in self.kinds):
            with suppress(ValueError, KeyError):
                return read(text)
        raise ValueError(text)

    def _checked(self, value: object) -> Any:
        kind = type(value).__name__.replace("NoneType", "None")
        if kind == "int" and "float" in self.kinds and "int" not in self.kinds:
            return float(value)  # type: ignore[arg-type]
        if self.kinds and kind not in self.kinds:
            raise ValueError(value)
        return value

    def _way_out(self, value: Any) -> str:
        """What to give instead of a value that is of the right type; empty if it will do."""
        if self.choices and value not in self.choices:
            return did_you_mean(str(value), map(str, self.choices))
        if self.name in STEPS and isinstance(value, int) and value < 0:
            return "give 0 or more."
        is_name = self.name == "preset" and isinstance(value, str) and not Path(value).suffix
        if is_name and self.value in PRESETS and value not in PRESETS:
            return did_you_mean(value, PRESETS)
        return _bound(self.name, value)


def read_parameters(path: str | Path) -> dict[str, Parameter]:
    """The parameters of a notebook, by name, in its order; none where no cell is tagged so.

    Raises:
        RunError: there is no such notebook, it cannot be read, or its parameters cell is not
            plain Python.
    """
    notebook = open_notebook(path)
    cells = [c for c in notebook.cells if PARAMETERS_TAG in c.metadata.get("tags", [])]
    if not cells:
        return {}
    source = cells[0].source
    try:
        tree = ast.parse(source)
        comments = _comments(source)
        found = [_parameter(statement, source, comments) for statement in tree.body]
    except _NO_PYTHON as error:
        where = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        words = error.msg if isinstance(error, SyntaxError) else "it is nested too deeply"
        raise RunError(
            f"The parameters cell of {path} is not plain Python ({where}{words}).",
            fix="keep only assignments such as `steps: int = 60  # training steps` in it.",
        ) from None
    return {parameter.name: parameter for parameter in found if parameter}


_NO_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError)
"""What Python's parser raises, a null byte or a nesting without end included."""
_NO_LITERAL = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)


def open_notebook(path: str | Path) -> NotebookNode:
    """Read a notebook file.

    Raises:
        RunError: there is none, it is not a notebook, or not one for Python.
    """
    import nbformat

    notebook = read_notebook(path)
    try:
        nbformat.validate(notebook)
        kernel = notebook.metadata.get("kernelspec", {})
        language = kernel.get("language", "python")
    except Exception as error:  # an AssertionError too, for JSON that is no notebook
        raise RunError(f"{path} is not a notebook.", why=f"{first_line(error)}.") from None
    if language != "python":
        words = f"{path} is a notebook for {language}; only Python notebooks can be run."
        raise RunError(words)
    return notebook


def read_notebook(path: str | Path) -> NotebookNode:
    """Read a notebook file of any language, as far as it is one.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    import nbformat

    file = Path(path)
    if not os.path.lexists(file) or file.is_dir():
        near = sorted(str(other) for other in file.parent.glob("*.ipynb"))
        raise RunError(
            f"There is no notebook {str(file)!r}.",
            fix=did_you_mean(str(file), near) if near else "check the path.",
        )
    try:
        text = read_text(file)
        mapping(parse_json(text))
        notebook: NotebookNode = nbformat.reads(text, as_version=4)
    except OSError as error:
        raise RunError(f"The notebook {file} cannot be read.", why=str(error)) from None
    except Exception as error:
        raise RunError(f"{file} is not a notebook.", why=f"{first_line(error)}.") from None
    return notebook


def check_parameters(
    path: str | Path, known: Mapping[str, Parameter], given: Mapping[str, object]
) -> dict[str, Any]:
    """Convert given values to those that the notebook gets.

    Raises:
        RunError: the notebook has no parameter of that name, or the value is of another type.
    """
    for name in given:
        if name not in known:
            listing = "\n".join(f"  {shorten(str(p), LONGEST)}" for p in known.values())
            if not known:
                raise RunError(f"{path} has no parameter {name!r}.", **_untagged(path, name))
            raise RunError(
                f"{path} has no parameter {name!r}.",
                why=f"Its parameters are:\n{listing}",
                fix=did_you_mean(name, known),
            )
    return {name: known[name].convert(value) for name, value in given.items()}


HOW_TO_TAG = (
    f"tag it `{PARAMETERS_TAG}`: in JupyterLab, select it, open the property inspector (the gears "
    "at the top right), and add the tag under Cell Tags"
)


def _untagged(path: str | Path, name: str) -> dict[str, str]:
    """Why a notebook without a parameters cell has no such parameter, and what to do."""
    why = f"It takes no parameters: none of its cells is tagged `{PARAMETERS_TAG}`."
    cells = [cell for cell in open_notebook(path).cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells, start=1):
        if re.search(rf"(?m)^{re.escape(name)}\b\s*[:=]", cell.source):
            return {"why": f"{why} Code cell {number} sets it.", "fix": f"{HOW_TO_TAG}."}
    fix = f"write `{name} = ...` into a cell of its own at the top, and {HOW_TO_TAG}."
    return {"why": why, "fix": fix}


def _parameter(
    statement: ast.stmt, source: str, comments: Mapping[int, tuple[str, bool]]
) -> Parameter | None:
    """The parameter that an assignment of one name defines; None for any other statement."""
    target: ast.expr
    annotation: ast.expr | None = None
    if isinstance(statement, ast.AnnAssign):
        target, annotation = statement.target, statement.annotation
    elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    else:
        return None
    if not isinstance(target, ast.Name) or statement.value is None:
        return None
    return Parameter(
        name=target.id,
        default=ast.get_source_segment(source, statement.value) or "",
        kinds=_annotated(annotation) if annotation else _kind(statement.value),
        choices=_choices(annotation) if annotation else (),
        help=_help(statement, comments),
    )


def _annotated(annotation: ast.expr) -> tuple[str, ...]:
    """The types in `float | None`; empty if one of them is not in `_READERS`."""
    if choices := _choices(annotation):
        return tuple(dict.fromkeys(type(choice).__name__ for choice in choices))
    names = [part.strip().split("[")[0] for part in ast.unparse(annotation).split("|")]
    return tuple(names) if all(name in _READERS for name in names) else ()


def _choices(annotation: ast.expr) -> tuple[Any, ...]:
    """The values of `Literal["a", "b"]`; nothing for any other annotation."""
    if not isinstance(annotation, ast.Subscript) or not ast.unparse(annotation.value).endswith(
        "Literal"
    ):
        return ()
    try:
        found = ast.literal_eval(annotation.slice)
    except _NO_LITERAL:
        return ()
    return found if isinstance(found, tuple) else (found,)


def _kind(value: ast.expr) -> tuple[str, ...]:
    with suppress(*_NO_LITERAL):
        kind = type(ast.literal_eval(value)).__name__
        return (kind,) if kind in _READERS else ()
    return ()


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Comments by line number: the text, and whether it has the line to itself."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (token.string.lstrip("#").strip(), not token.line[: token.start[1]].strip())
        for token in tokens
        if token.type == tokenize.COMMENT
    }


def _help(statement: ast.stmt, comments: Mapping[int, tuple[str, bool]]) -> str:
    last = statement.end_lineno or statement.lineno
    if last in comments:
        return comments[last][0]
    above: list[str] = []
    line = statement.lineno - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    return " ".join(above)


def _yaml(text: str, kind: type = object) -> Any:
    """Parse text as JSON, or else as YAML, in which 1e-5 is a number as it is in settings."""
    from kit.config import from_yaml

    try:
        value = parse_json(text)
    except ValueError:
        try:
            value = from_yaml(text)
            json.dumps(value)
        except (yaml.YAMLError, TypeError, RecursionError) as error:
            raise ValueError(text) from error
    if not isinstance(value, kind):
        raise ValueError(text)
    return value


def _quoted(value: object) -> str:
    return shorten(repr(value), LONGEST)


_NONE = {"none": None, "null": None, "": None}
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLEANS |= {"false": False, "no": False, "off": False, "0": False}
_READERS: dict[str, Callable[[str], Any]] = {
    "None": lambda text: _NONE[text.lower()],
    "bool": lambda text: _BOOLEANS[text.lower()],
    "int": int,
    "float": float,
    "list": lambda text: _yaml(text, list),
    "dict": lambda text: _yaml(text, dict),
    "str": str,
}
"""Reads each type. In the order in which a text is tried: `str` takes anything, so it is last."""


def _bound(name: str, value: Any) -> str:
    """The bound of the setting of this name that a value breaks; empty if there is none."""
    settings = SessionConfig.model_fields
    sections: list[Any] = [settings[part].annotation for part in _SECTIONS]
    places = [{own: settings[own] for own in _OWN}, *(part.model_fields for part in sections)]
    field = next((fields[name] for fields in places if name in fields), None)
    if field is None:
        return ""
    kind: Any = field.annotation
    for bound in field.metadata:
        kind = Annotated[kind, bound]
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        known = first.get("ctx", {}).get("expected", "")
        words = known.replace("'", "").replace(" or ", ", ").split(", ") if known else []
        return did_you_mean(str(value), words) if words else first["msg"] + "."
    except Exception:  # a type that pydantic cannot check by itself
        pass
    return ""
