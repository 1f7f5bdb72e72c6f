"""Imports that take less time, and leave nothing out."""

import gc
import importlib
import subprocess
import sys

import pytest

from kit.utils.imports import without_garbage_collection


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ray_makes_no_grammar_of_addresses_and_who_checks_one_has_it() -> None:
    code = """
import sys
from kit.utils.imports import import_ray
import_ray()
assert "ray" in sys.modules
print("lark" in sys.modules, "rfc3987_syntax" in sys.modules)
from jsonschema import FormatChecker
from jsonschema.exceptions import FormatError
FormatChecker().check("http://exämple.org/ä", "iri")
for form in ("iri", "iri-reference"):
    try:
        FormatChecker().check("http://[x", form)
    except FormatError:
        print(form)
import rfc3987_syntax
print(rfc3987_syntax.is_valid_syntax("iri", "http://a.b"))
"""
    assert printed(code).split() == ["False", "False", "iri", "iri-reference", "True"]


@pytest.mark.slow
def test_where_jsonschema_is_imported_already_nothing_is_changed() -> None:
    code = """
import sys, jsonschema
before = sys.modules.get("rfc3987_syntax")
from kit.utils.imports import import_ray
import_ray(); import_ray()
print(before is not None, sys.modules.get("rfc3987_syntax") is before)
"""
    assert printed(code).split() == ["True", "True"]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_afterwards_as_it_was_before(enabled: bool) -> None:
    if not enabled:
        gc.disable()
    try:
        with pytest.raises(ImportError), without_garbage_collection():
            importlib.import_module("there_is_no_such_module" if not gc.isenabled() else "gc")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
