"""The files around the code agree with each other."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def locked() -> dict[str, list[Version]]:
    """Every version in the lock, by package; one package has two where Python decides."""
    versions: dict[str, list[Version]] = {}
    for line in LOCK.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (pin,) = requirement.specifier
            assert pin.operator == "==", line
            versions.setdefault(canonicalize_name(requirement.name), []).append(
                Version(pin.version)
            )
    return versions


@pytest.mark.parametrize(
    "requirement",
    [
        *PROJECT["project"]["dependencies"],
        *PROJECT["dependency-groups"]["dev"],
    ],
)
def test_the_lock_holds_every_dependency_at_a_version_that_fits(requirement: str) -> None:
    wanted = Requirement(requirement)
    versions = locked().get(canonicalize_name(wanted.name), [])
    assert versions, f"{wanted.name} is not in requirements.lock: run `make lock`"
    assert all(wanted.specifier.contains(version) for version in versions)


@pytest.mark.parametrize("name", ["sglang", "torch", "transformers", "ray"])
def test_the_stack_is_pinned_to_the_locked_version(name: str) -> None:
    pins = [Requirement(r) for r in PROJECT["project"]["dependencies"]]
    (pin,) = [r for r in pins if r.name == name]
    assert pin.specifier == SpecifierSet(f"=={locked()[name][0]}")


def test_the_locked_torch_and_transformers_are_those_that_sglang_names() -> None:
    named = [Requirement(r) for r in importlib.metadata.requires("sglang") or []]
    for requirement in named:
        if requirement.name in ("torch", "transformers") and requirement.marker is None:
            assert requirement.specifier.contains(locked()[requirement.name][0])


def test_the_lock_names_no_package_index() -> None:
    assert "http:" not in LOCK
    assert "https:" not in LOCK
    assert not re.search(r"^\s*-", LOCK, re.MULTILINE)
    assert "@" not in LOCK


def test_conda_takes_the_same_python_and_installs_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (python,) = [d for d in environment["dependencies"] if str(d).startswith("python")]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(
        PROJECT["project"]["requires-python"]
    )
    assert pip == ["-r requirements.lock", "-e ."]


def test_the_image_installs_the_lock_on_a_python_that_the_kit_takes() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(r"uv pip install .*-r requirements\.lock", dockerfile)
    pythons = set(re.findall(r"python(3\.\d+)", dockerfile))
    assert pythons
    assert all(python in SpecifierSet(PROJECT["project"]["requires-python"]) for python in pythons)


def test_the_image_and_make_install_with_the_same_uv() -> None:
    pins = [
        set(re.findall(r"uv==([\d.]+)", (ROOT / file).read_text()))
        for file in ("Dockerfile", "Makefile")
    ]
    assert pins[0] == pins[1]
    assert len(pins[0]) == 1


def test_every_python_that_the_project_names_is_one_it_takes() -> None:
    takes = SpecifierSet(PROJECT["project"]["requires-python"])
    named = [
        classifier.rsplit(" ", 1)[1]
        for classifier in PROJECT["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", classifier)
    ]
    assert named == ["3.11", "3.12"]
    assert all(version in takes for version in named)
    assert "3.13" not in takes


def test_the_installed_kit_has_the_version_of_the_project() -> None:
    import kit

    assert kit.__version__ == PROJECT["project"]["version"]


def test_importing_the_kit_loads_nothing_of_the_stack() -> None:
    code = (
        "import sys, kit, kit.config, kit.samples, kit.reports, kit.tracking.recorder\n"
        "heavy = {'torch', 'sglang', 'ray', 'transformers', 'datasets', 'matplotlib', 'papermill',"
        " 'nbformat', 'pandas', 'IPython'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_importing_the_session_loads_no_torch() -> None:
    code = (
        "import sys, kit.session\n"
        "print(sorted({'torch', 'sglang', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_programs_in_strings_import_is_there() -> None:
    files = [file for room in ("tests", "benchmarks") for file in (ROOT / room).rglob("*.py")]
    named = {
        (file.name, module, name)
        for file in files
        for module, name in re.findall(
            r"\b(?:from|import|-m\W+) ?(kit(?:\.\w+)+)(?: import (\w+))?", file.read_text()
        )
        if file.name != "test_house.py"  # it quotes what it refuses
    }
    assert named
    assert [place for place in named if not offers(*place[1:])] == []


def offers(module: str, name: str) -> bool:
    """Whether there is this module, and in it this name; "" is in every module."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    source = Path(spec.origin).read_text()
    return bool(re.search(rf"\b{name}\b", source) or importlib.util.find_spec(f"{module}.{name}"))


def test_every_name_that_the_kit_offers_can_be_had() -> None:
    import kit

    missing = [name for name in kit.__all__ if not hasattr(kit, name)]
    assert missing == []


def test_a_clean_checkout_has_the_folder_of_runs_and_keeps_none_of_them() -> None:
    assert (ROOT / "papermill_runs" / ".gitkeep").is_file()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"papermill_runs/*", "!papermill_runs/.gitkeep"} <= set(ignored)


def test_the_changelog_knows_the_version() -> None:
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_have_typed_and_explained_parameters_and_the_python_kernel(path: Path) -> None:
    from kit.runs import read_parameters

    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.kernelspec.name == "python3"
    parameters = read_parameters(path)
    assert parameters
    for parameter in parameters.values():
        assert parameter.kinds, parameter.name
        assert parameter.help, parameter.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_sentence_stands_before_each_code_cell_of_a_notebook(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds[0] == "markdown"
    assert ("code", "code") not in set(itertools.pairwise(kinds))
