"""Make `docs/settings.md` and `docs/api.md` from descriptions and docstrings.

Run it with `.venv/bin/python docs/make_reference.py`.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import kit
import kit.rewards
from kit.config import SessionConfig
from kit.config.counterparts import COUNTERPARTS
from kit.miles.table import LINKS

DOCS = Path(__file__).parent

_SETTINGS = """\
# Settings

Every setting, as it stands in a YAML file or in `SessionConfig(training={"learning_rate": 1e-5})`.
`config.dump("config.yaml")` writes all of them, and a file needs only those that differ.

A model and data of your own:

```yaml
model:
  name: /models/my-model          # a directory as Transformers saves it, or a name on the hub
data:
  source: train.jsonl             # {"prompt": "What is 3 + 4?", "label": "7"}
  eval_source: test.jsonl
reward:
  name: number                    # or a function: RLSession.start(config, reward=my_function)
```

The environment variable `KIT_CORES` bounds the CPU cores that a session keeps busy, where it shares
the machine: `KIT_CORES=2 make lab`. Without it a session takes all that the process may use.

## Names in TRL, verl and Miles

An unknown setting that one of them has is answered with its name here.
[Miles' flags](from_and_to_miles.md) can be read and written as a whole script.

"""

_API = """\
# API reference

What `from kit import ...` and `from kit.rewards import ...` give. [Settings](settings.md) has the
sections of `SessionConfig`; [architecture](architecture.md) says what stands behind.

"""


def settings_page() -> str:
    """The page of settings, as Markdown."""
    return _SETTINGS + "\n".join([*_names(), "", *_sections()]) + "\n"


def api_page() -> str:
    """The page of classes and functions, as Markdown."""
    lines = []
    for module, names in ((kit, kit.__all__), (kit.rewards, kit.rewards.__all__)):
        lines += [f"## {module.__name__}", ""]
        for name in names:
            thing = getattr(module, name)
            if inspect.isclass(thing):
                lines += _class(name, thing)
            elif callable(thing):
                lines += _entry("###", name, thing)
    return _API + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


# ---- settings ------------------------------------------------------------------------------------


def _names() -> Iterator[str]:
    flags = {link.setting: link.flags for link in LINKS}
    yield "| here | TRL | verl | Miles | remark |"
    yield "|---|---|---|---|---|"
    for entry in COUNTERPARTS:
        ours = f"`{entry.ours}`" if entry.ours else "–"
        miles = flags.get(entry.ours) or tuple("--" + n.replace("_", "-") for n in entry.miles)
        names = " | ".join(map(_code, (entry.trl, entry.verl, miles)))
        yield f"| {ours} | {names} | {entry.note} |"


def _code(names: tuple[str, ...]) -> str:
    return "<br>".join(f"`{name}`" for name in names)


def _sections() -> Iterator[str]:
    fields = SessionConfig.model_fields
    yield from ("## Of the session", "", *_table(SessionConfig), "")
    for name, field in fields.items():
        if _is_section(field.annotation):
            yield from _section(name, field.annotation)


def _section(path: str, section: Any) -> Iterator[str]:
    yield from (f"## {path}", "", " ".join(inspect.getdoc(section).split()), "")
    yield from (*_table(section), "")
    for name, field in section.model_fields.items():
        inner = _inner(field.annotation)
        if inner:
            yield from _section(f"{path}.{name}", inner)


def _table(section: Any) -> Iterator[str]:
    yield "| setting | type | default | |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        if _inner(field.annotation):
            continue
        default = field.get_default(call_default_factory=True)
        words = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{name}` | {_type(field.annotation)} | `{_shown(default)}` | {words} |"


def _inner(annotation: Any) -> Any:
    """The section in `MisConfig | None`; None for a plain setting."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next((kind for kind in kinds if _is_section(kind)), None)


def _is_section(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _type(annotation: Any) -> str:
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    if "Annotated" in text:
        text = re.sub(r"typing\.Annotated\[(\w+),[^\[\]]*(\[[^\[\]]*\])?[^\[\]]*\]", r"\1", text)
    text = re.sub(r"typing\.|types\.|<class '(\w+)'>", r"\1", text).replace("NoneType", "None")
    text = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace(", ", " | "), text)
    text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)
    text = re.sub(r"^Union\[(.*)\]$", lambda match: match[1].replace(", ", " | "), text)
    return "`" + text.replace("|", "\\|") + "`"


def _shown(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(list(value)) if isinstance(value, tuple) else str(value) or '""'


# ---- classes and functions -----------------------------------------------------------------------


def _class(name: str, kind: Any) -> list[str]:
    lines = _entry("###", name, kind, call=False)
    fields = _fields(kind)
    if _is_section(kind):
        lines += ["Its settings are in [settings.md](settings.md).", ""]
    lines += [f"- `{field}`: {words}".removesuffix(": ") for field, words in fields.items()]
    lines += [""] if fields else []
    for member, value in vars(kind).items():
        if member.startswith("_") or member in fields:
            continue
        if isinstance(value, (property, cached_property)):
            words = " ".join(inspect.getdoc(value).split()) if inspect.getdoc(value) else ""
            lines += [f"#### `{name}.{member}`", "", words, ""]
        elif isinstance(value, (classmethod, staticmethod)) or inspect.isfunction(value):
            lines += _entry("####", f"{name}.{member}", getattr(kind, member))
    return lines


def _entry(level: str, name: str, thing: Any, *, call: bool = True) -> list[str]:
    doc = inspect.getdoc(thing) or ""
    title = f"`{name}{_signature(thing)}`" if call else f"`{name}`"
    return [f"{level} {title}", "", *_markdown(doc), ""]


def _signature(thing: Any) -> str:
    signature = inspect.signature(thing)
    plain = [p.replace(annotation=p.empty) for n, p in signature.parameters.items() if n != "self"]
    return str(inspect.Signature(plain))


def _markdown(doc: str) -> Iterator[str]:
    """A docstring as Markdown: its sections in bold, their items as a list, blocks as code."""
    section = False
    for block in re.split(r"\n\s*\n", doc):
        head, _, rest = block.partition("\n")
        if head in ("Args:", "Raises:", "Returns:", "Yields:") and rest:
            yield from (f"**{head[:-1]}**", "")
            yield from (f"- {_item(item)}" for item in _items(textwrap.dedent(rest)))
            section = True
        elif block.startswith("    ") and not section:
            yield from ("```", *textwrap.dedent(block).splitlines(), "```")
        else:
            yield " ".join(block.split())
        yield ""


def _items(text: str) -> list[str]:
    return [" ".join(item.split()) for item in re.split(r"\n(?=\S)", text)]


def _item(text: str) -> str:
    name, colon, words = text.partition(":")
    return f"`{name}`:{words}" if colon else text


def _fields(kind: Any) -> dict[str, str]:
    """Fields of a class and the docstrings below them."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return {}
    (node,) = [part for part in tree.body if isinstance(part, ast.ClassDef)]
    found = {}
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        if isinstance(target, ast.Name) and not target.id.startswith("_"):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[target.id] = " ".join(str(after.value.value).split()) if told else ""
    return {} if _is_section(kind) else found


PAGES = {DOCS / "settings.md": settings_page, DOCS / "api.md": api_page}

if __name__ == "__main__":
    for path, page in PAGES.items():
        path.write_text(page(), encoding="utf-8")
