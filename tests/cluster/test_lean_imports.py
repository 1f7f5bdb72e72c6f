"""What is left out stays out, what is not stays in, each checked in a process of its own."""

import subprocess
import sys

from kit.cluster.lean_imports import OPTIONAL, PLACEHOLDERS

START = "from kit.cluster.lean_imports import leave_out; leave_out()\n"


def printed(code: str) -> str:
    """What a fresh interpreter prints that has left the packages out."""
    done = subprocess.run(
        [sys.executable, "-c", START + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_optional_packages_are_not_found_even_where_they_are_installed() -> None:
    code = f"""
import importlib, importlib.util
found = []
for name in {sorted(OPTIONAL)!r}:
    try:
        importlib.import_module(name)
        found.append(name)
    except ModuleNotFoundError as error:
        assert error.name == name
    assert importlib.util.find_spec(name) is None
print(found)
"""
    assert "matplotlib" in OPTIONAL  # which is installed, so that this can fail
    assert printed(code) == "[]"


def test_placeholders_import_at_any_depth_and_raise_where_they_are_called() -> None:
    code = """
import torchvision, torchvision.transforms.v2.functional as functional
from torchvision.io import decode_jpeg
from gguf import GGMLQuantizationType
class Own(torchvision.datasets.VisionDataset): pass     # a base class
kind = GGMLQuantizationType.Q4_0                        # a member of an enumeration
for call in (decode_jpeg, functional.resize, kind, Own):
    try:
        call(1)
    except ImportError as error:
        print(error)
"""
    lines = printed(code).splitlines()
    assert len(lines) == 4
    assert lines[0] == "torchvision.io.decode_jpeg is left out of the kit's CPU processes."
    assert all("is left out of the kit's CPU processes" in line for line in lines)


def test_a_placeholder_makes_up_no_name_that_python_itself_looks_for() -> None:
    code = "import torchvision; print(hasattr(torchvision, '__version__'), torchvision.__name__)"
    assert printed(code) == "False torchvision"


def test_other_packages_are_imported_as_ever() -> None:
    assert printed("import json, yaml, kit.config; print(yaml.safe_load('[1]'))") == "[1]"
    code = "import importlib.util as u; print(u.find_spec('no_such_package_anywhere'))"
    assert printed(code) == "None"


def test_versions_of_what_is_left_out_stay_readable() -> None:
    code = "from importlib.metadata import version; print(version('matplotlib'), version('torch'))"
    from importlib.metadata import version

    assert printed(code) == f"{version('matplotlib')} {version('torch')}"


def test_leaving_out_twice_is_leaving_out_once() -> None:
    code = """
import sys
from kit.cluster.lean_imports import LeanFinder
before = list(sys.meta_path)
leave_out()
print(sys.meta_path == before, sys.meta_path.count(LeanFinder))
"""
    assert printed(code) == "True 1"


def test_only_the_process_that_asked_leaves_anything_out() -> None:
    import importlib.util

    assert importlib.util.find_spec("matplotlib") is not None
    assert OPTIONAL.isdisjoint(PLACEHOLDERS)
