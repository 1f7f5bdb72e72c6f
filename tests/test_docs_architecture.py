"""The pages for readers of the code name only what exists."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ARCHITECTURE]
FOLDERS = ("benchmarks", "docs", "kit", "notebooks", "tests")
ELSEWHERE = {
    "FSDP2",
    "JupyterLab",
    "SGLang",
    "ServerArgs",
}
"""Names in the pages that other projects define."""
FILE = re.compile(r"[\w./-]+\.(?:html|ipynb|json|jsonl|lock|md|py|sh|toml|yaml)")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

ids = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fences(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What the page sets in code type, outside of blocks: `kit.viz.render`, `errors.py`."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", text)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def modules() -> Iterator[Path]:
    yield from sorted((ROOT / "kit").rglob("*.py"))


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The names that statements define, imported ones included."""
    names: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names[node.target.id] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(a.asname or a.name): node for a in node.names}
        elif isinstance(node, ast.If):
            names |= defined(node.body)
    return names


@cache
def everywhere() -> dict[str, list[ast.stmt]]:
    """Each name that a module of the kit defines at its top, with its definitions."""
    names: dict[str, list[ast.stmt]] = {}
    for path in modules():
        for name, node in defined(tree(path).body).items():
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                names.setdefault(name, []).append(node)
    return names


@cache
def members() -> frozenset[str]:
    """Every method, field and argument that a class or function of the kit has."""
    names: set[str] = set()
    for path in modules():
        for node in ast.walk(tree(path)):
            names |= {node.arg} if isinstance(node, ast.arg) else members_of(node)
    return frozenset(names)


@cache
def members_of(owner: ast.AST) -> set[str]:
    if not isinstance(owner, ast.ClassDef):
        return set()
    attributes = {
        node.attr
        for node in ast.walk(owner)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    inherited = [
        member
        for base in owner.bases
        if isinstance(base, ast.Name)
        for parent in everywhere().get(base.id, [])
        for member in members_of(parent)
    ]
    return {*defined(owner.body), *attributes, *inherited}


def is_in_kit(name: str) -> bool:
    """Whether `kit.viz.render`, or `kit.session.RLSession.start`, can be found in the sources."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            break
    else:
        return False
    rest = parts[length:]
    if length == 1:  # names that `kit` itself offers are looked up when they are used
        import kit

        return not rest or hasattr(kit, rest[0])
    node = defined(tree(file).body).get(rest[0]) if rest else None
    return not rest or (node is not None and (len(rest) == 1 or rest[1] in members_of(node)))


def is_setting(name: str) -> bool:
    from kit.config import SessionConfig

    part: object = SessionConfig
    for key in name.split("."):
        fields = getattr(part, "model_fields", {})
        if key not in fields:
            return False
        part = fields[key].annotation
    return True


def is_room(name: str) -> bool:
    return (ROOT / "kit" / name).is_dir() or (ROOT / "kit" / f"{name}.py").is_file()


@cache
def sources_of_tests() -> str:
    return "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def is_known(name: str) -> bool:
    """Whether the kit has a class, function, method, setting or room of this name."""
    first, *rest = name.split(".")
    if first == "kit":
        return is_in_kit(name)
    if is_setting(name) or first in ELSEWHERE:
        return True
    first = {"session": "RLSession", "rollout": "Rollout"}.get(first, first) if rest else first
    if first not in everywhere():
        return not rest and (
            first in members() or is_room(first) or f"def {first}(" in sources_of_tests()
        )
    return not rest or any(rest[0] in members_of(node) for node in everywhere()[first])


def exists(file: str, page: Path) -> bool:
    places = [ROOT, ROOT / "kit", page.parent]
    return any((place / file).exists() for place in places)


@ids
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    written_by_runs = {"metrics.jsonl", "config.yaml", "train.py"}
    named = [s for s in spans(page) if FILE.fullmatch(s)]
    if page == ARCHITECTURE:
        named += [word for block in fences(page.read_text("utf-8")) for word in FILE.findall(block)]
    missing = [file for file in named if not exists(file, page) and file not in written_by_runs]
    assert named
    assert missing == []


@ids
def test_every_folder_and_file_below_the_projects_folders_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    named = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w/?", text)
    missing = [file for file in named if not exists(file, page)]
    assert missing == []


@ids
def test_every_name_of_the_kit_that_a_page_mentions_is_defined(page: Path) -> None:
    names = {s.removesuffix("()") for s in spans(page)}
    names = {s for s in names if NAME.fullmatch(s) and not FILE.fullmatch(s)}
    if page.name == "README.md":  # names many values, commands and metrics too
        names = {n for n in names if n[0].isupper() != n.isupper() or "." in n}
    missing = sorted(name for name in names if not is_known(name))
    assert missing == []


def test_the_table_of_rooms_is_the_contract_that_is_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = [c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    layers = [re.split(r" [|:] ", layer) for layer in contract["layers"]]
    rows = re.findall(r"^\| (`.*?) \| .* \|$", ARCHITECTURE.read_text("utf-8"), re.MULTILINE)
    table = [re.findall(r"`(\w+)`", row) for row in rows]
    assert table[: len(layers)] == layers
