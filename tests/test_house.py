"""How the code is laid out: who may touch what, how long a function is, what a folder holds."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    file for room in ("kit", "tests", "benchmarks") for file in (ROOT / room).rglob("*.py")
)
PACKAGES = sorted(file.parent for file in SOURCES if file.name == "__init__.py")
KIT = ROOT / "kit"

LIBRARIES = {
    "benchmarks/gpu_parts/training.py": {"_dynamo"},
    "kit/cluster/fork_server.py": {
        "_forkserver",
        "_forkserver_address",
        "_forkserver_alive_fd",
        "_forkserver_pid",
        "_run_exitfuncs",
    },
    "kit/cluster/client.py": {"_actor_id", "_global_node", "_private"},
    "kit/engine/adapters.py": {"_clear_buffer_slot_for_base", "_handle_abort_req"},
    "kit/engine/actor.py": {"_processes", "_scheduler_init_result", "_subprocess_watchdog"},
    "kit/engine/cpu/operators.py": {
        "_compute_checksum",
        "_hash_tensor",
        "_is_non_persistent_buffer_name",
    },
    "kit/engine/cpu/shared.py": {"_compute_lm_head"},
    "kit/engine/drafts/choice.py": {"_build_trivial_verify_input"},
    "kit/engine/gpu/speculative.py": {
        "_capture_cuda_graphs",
        "_prepare_for_speculative_decoding",
    },
    "kit/engine/drafts/scheduler.py": {
        "_check_str_based_finish",
        "_check_token_based_finish",
        "_draft_extend_for_decode",
        "_draft_extend_for_prefill",
        "_resolve_spec_v2_tokens",
    },
    "tests/engine/logits.py": {"_get_logits", "_preprocess_logits"},
    "tests/engine/test_decode_windows.py": {"_update_decode_kv_buffers"},
    "kit/engine/families/whole_norms.py": {"_k_norm", "_q_norm"},
    "kit/engine/families/whole_projections.py": {"_normalize_tp_style"},
    "kit/engine/gpu/logits.py": {"_get_logits", "_preprocess_logits"},
    "kit/engine/gpu/shared.py": {"_compute_lm_head"},
    "kit/engine/patches.py": {"_hash_tensor"},
    "kit/engine/quantization.py": {"_forward_method"},
    "kit/lifecycle/start.py": {"_shutdown_message"},
    "kit/models/attention.py": {"_varlen_attn", "_varlen_attn_backward"},
    "kit/models/compile.py": {"_dynamo"},
    "kit/models/heads/eagle.py": {"_attn_implementation"},
    "kit/models/heads/eagle3.py": {"_attn_implementation"},
    "kit/models/heads/mtp.py": {"_attn_implementation"},
    "tests/models/test_heads.py": {"_config_draft_model"},
    "kit/models/own/nanochat_2026.py": {"_attn_implementation"},
    "kit/models/state_dict.py": {"_non_persistent_buffers_set", "_weight_conversions"},
    "kit/rewards/timeouts.py": {"_current_frames"},
    "kit/runs/kernel_extension.py": {"_shutdown_message"},
    "kit/models/sharding.py": {
        "_fsdp_param_group",
        "_get_fsdp_state",
        "_modules_to_run_forward",
        "_state_ctx",
        "_training_state",
    },
    "kit/trainer/offload.py": {"_C", "_accelerator_setAllocatorSettings"},
    "kit/trainer/learner.py": {"_dynamo", "_new_buffer"},
    "kit/trainer/process_group.py": {"_get_backend", "_world"},
    "kit/viz/live/frontend.py": {"_reply_subshell_id"},
    "tests/conftest.py": {"_tmp_path_factory"},
    "tests/engine/conftest.py": {"_setupstate"},
    "tests/models/test_compile.py": {"_dynamo"},
    "tests/models/test_lora.py": {"_dynamo"},
    "tests/operators/test_nf4.py": {"_dynamo"},
    "tests/viz/test_browser.py": {"_dom_classes"},
}
"""What other libraries keep to themselves and we need all the same, file by file."""

ANYWHERE = {"os._exit"}
"""Documented, whatever its name looks like."""

READERS = {
    "kit/utils/reading.py",
    "kit/utils/strict_yaml.py",
    "kit/cluster/client.py",  # the address that its own head has written
    "kit/cluster/processes.py",  # the kernel's
    "kit/doctor/device.py",  # a package's source
    "kit/engine/patches.py",  # SGLang's sources
    "kit/engine/server_args.py",
    "kit/tiny/recipe.py",  # what it has made just now
    "kit/utils/hardware.py",  # the kernel's
}
"""Who reads files by other ways than `kit.utils.reading`, which bounds what is read."""
READS = {"read_text", "read_bytes", "safe_load", "unsafe_load", "full_load"}

LONGEST_FUNCTION = 60
FULLEST_FOLDER = 15
FULLEST_ROOT = 7
ONE_DOOR = ["kit.utils.display -> kit.viz"]


def inner(file: Path) -> str:
    return str(file.relative_to(ROOT))


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def owned(kind: ast.ClassDef) -> set[str]:
    """Names that a class gives to its objects or to itself."""
    names = set()
    for node in ast.walk(kind):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def reaches(tree: ast.AST, own: frozenset[str] = frozenset()) -> Iterator[tuple[int, str]]:
    """Line and text of each access to what another object or module keeps to itself.

    A class may touch the same of its other instances.
    """
    waiting = [(tree, own)]
    while waiting:
        node, own = waiting.pop()
        match node:
            case ast.ClassDef():
                own |= owned(node)
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                continue
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                continue
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                yield node.lineno, ast.unparse(node)
            case ast.ImportFrom(names=names, module=module):
                for alias in names:
                    if is_private(alias.name):
                        yield node.lineno, f"{module}.{alias.name}"
            case ast.Call(args=[_, ast.Constant(value=str(name)), *_], func=called):
                # getattr, setattr, and pytest's monkeypatch
                if ast.unparse(called).endswith(("attr", "patch.object")) and is_private(name):
                    yield node.lineno, f"{ast.unparse(node.args[0])}.{name}"
        children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, LEAVES)]
        waiting += [(child, own) for child in reversed(children)]


LEAVES = ast.Constant, ast.Name, ast.expr_context, ast.operator, ast.cmpop, ast.unaryop


def last_name(text: str) -> str:
    return text.rpartition(".")[2]


def is_private(name: str) -> bool:
    """Not so Python's own (`__len__`) and IPython's (`_repr_html_`)."""
    return name.startswith("_") and not name.endswith("_")


@pytest.mark.parametrize("room", ["kit", "tests", "benchmarks"])
def test_nobody_touches_what_another_object_keeps_to_itself(room: str) -> None:
    found = [
        f"{inner(file)}:{line}: {text}"
        for file in SOURCES
        if inner(file).startswith(f"{room}/")
        for line, text in reaches(parsed(file))
        if text not in ANYWHERE and last_name(text) not in LIBRARIES.get(inner(file), set())
    ]
    assert found == []


def test_every_exception_for_a_library_is_in_use() -> None:
    for name, allowed in LIBRARIES.items():
        found = {last_name(text) for _, text in reaches(parsed(ROOT / name))}
        assert allowed <= found, name


@pytest.mark.parametrize(
    ("code", "texts"),
    [
        ("session._stack.close()", ["session._stack"]),
        ("self._stack._parts", ["self._stack._parts"]),
        ("def f(self): return self._a + super()._b", []),
        ("class A:\n def f(self, other): self._a = 1; return other._a", []),
        ("class A:\n def f(self, other): return other._a", ["other._a"]),
        ("from kit.viz.theme import _color", ["kit.viz.theme._color"]),
        ("monkeypatch.setattr(session, '_reward', 1)", ["session._reward"]),
        ("x._repr_html_(), x.__len__()", []),
    ],
)
def test_what_counts_as_touching_is_found(code: str, texts: list[str]) -> None:
    assert [text for _, text in reaches(ast.parse(code))] == texts


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {
        f"{inner(file)}: {node.name}": length(node)
        for file in SOURCES
        if KIT in file.parents
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {where: lines for where, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without those of the docstring: formulas take their room."""
    first = function.body[0]
    has_words = ast.get_docstring(function) is not None
    words = (first.end_lineno or 0) - first.lineno + 1 if has_words else 0
    return (function.end_lineno or 0) - function.lineno + 1 - words


def test_no_folder_holds_too_many_modules() -> None:
    counts = {
        inner(folder): sum(file.name != "__init__.py" for file in folder.glob("*.py"))
        for folder in {file.parent for file in SOURCES if KIT in file.parents}
    }
    assert counts["kit"] <= FULLEST_ROOT
    assert {folder: n for folder, n in counts.items() if n > FULLEST_FOLDER} == {}


def test_the_layers_have_one_door_and_no_other_exception() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = project["tool"]["importlinter"]["contracts"]
    ignored = [arrow for contract in contracts for arrow in contract.get("ignore_imports", [])]
    assert ignored == ONE_DOOR


@pytest.mark.parametrize("package", PACKAGES, ids=inner)
def test_a_package_names_only_files_that_it_has(package: Path) -> None:
    text = ast.get_docstring(parsed(package / "__init__.py")) or ""
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    assert named <= {file.name for file in package.rglob("*.py")}


@pytest.mark.parametrize("package", PACKAGES, ids=inner)
def test_a_package_that_lists_its_files_leaves_none_out(package: Path) -> None:
    text = ast.get_docstring(parsed(package / "__init__.py")) or ""
    listed = set(re.findall(r"^ *(\w+\.py) {2,}", text, re.MULTILINE))
    there = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    assert not listed or there <= set(re.findall(r"\b(\w+\.py)\b", text))


def test_files_from_elsewhere_are_read_in_one_place() -> None:
    found = []
    for file in SOURCES:
        if file.is_relative_to(KIT) and inner(file) not in READERS:
            calls = (node for node in ast.walk(parsed(file)) if isinstance(node, ast.Call))
            called = (call.func for call in calls if isinstance(call.func, ast.Attribute))
            found += [f"{inner(file)}:{f.lineno}: {f.attr}" for f in called if f.attr in READS]
    assert found == []
