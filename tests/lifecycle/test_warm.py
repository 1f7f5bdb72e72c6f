"""Stacks that are left warm: begun anew, they are as one that was started just now."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from rich.console import Console

from kit import RLSession, SessionConfig
from kit.checkpoint import checkpoint
from kit.cluster import lease, registry
from kit.errors import CheckpointError, SessionError
from kit.lifecycle import acquire
from kit.runs import run_notebooks
from tests.cases import some
from tests.processes import assert_gone
from tests.steps import responses_and_metrics

TINY = SessionConfig.preset("tiny").replace("training.rollout_batch_size", 8)
MOVING = TINY.replace("training.kl_loss_coef", 0.01).replace("seed", 7)
OTHER = (
    TINY.replace("training.learning_rate", 3e-3)
    .replace("training.advantage_estimator", "ppo")
    .replace("data.source", "tiny:chain")
    .replace("rollout.temperature", 0.7)
    .replace("engine.weight_bits", 8)
)


@pytest.fixture(autouse=True, scope="module")
def _nothing_left() -> Iterator[None]:
    if session := RLSession.current():
        session.close()
    yield
    for entry in registry.living():
        registry.terminate(entry)


def seen(session: RLSession) -> tuple[Any, Any, Any]:
    """Responses, log-probs, metrics and weights of four steps."""
    steps = session.train(4, show=False).steps
    return *responses_and_metrics(steps), session.debug.stack.probe("checksums")


@pytest.mark.slow
def test_a_warm_start_is_bit_for_bit_a_cold_one_whatever_was_trained_in_between() -> None:
    with RLSession.start(MOVING) as session:
        (cold_entry,) = registry.living()
        cold = seen(session)
        session.close(keep_warm=True)
    with RLSession.start(OTHER) as session:
        assert session.debug.stack.cluster.entry.stack == cold_entry.stack
        assert session.train(2, show=False).steps[0].metrics["train/value_loss"] > 0
        assert session.check_mismatch().mean_abs_diff > 0  # by the disturbance
        session.close(keep_warm=True)
    with RLSession.start(MOVING) as session:
        assert session.debug.stack.cluster.entry.stack == cold_entry.stack
        assert (session.step_count, session.engine_version, session.history) == (0, 0, [])
        assert session.check().healthy
        warm = seen(session)
        session.close(keep_warm=True)  # for the next test
    assert warm == cold


@pytest.mark.slow
def test_a_start_that_is_refused_holds_no_stack_that_was_left_warm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> str:
        raise SessionError("There is a session 'tiny' already.")

    with RLSession.start(TINY) as session:
        entry = session.debug.stack.cluster.entry
        session.close(keep_warm=True)
    monkeypatch.setattr(acquire, "current_group", refuse)
    with pytest.raises(SessionError, match="already"):
        RLSession.start(TINY)
    assert_gone(entry.head, entry.directory)


@pytest.mark.slow
def test_other_engine_settings_start_a_stack_of_their_own() -> None:
    with RLSession.start(TINY) as session:
        entry = session.debug.stack.cluster.entry
        session.close(keep_warm=True)
    with RLSession.start(TINY.replace("engine.replicas", 1)) as session:
        assert session.debug.stack.cluster.entry.stack != entry.stack
        assert session.config.name == "tiny"  # a warm stack holds no name
        session.close(keep_warm=True)  # for the next test
    assert entry.alive
    assert registry.terminate(entry) > 0
    assert_gone(entry.head, entry.directory)


@pytest.mark.slow
def test_a_stack_is_left_warm_where_the_configuration_says_so_and_ends_when_its_time_is_over() -> (
    None
):
    one = TINY.replace("engine.replicas", 1)
    session = RLSession.start(one.replace("stack.keep_warm", 30))
    entry = session.debug.stack.cluster.entry
    session.close()
    state = lease.state_of(entry.folder)
    assert state is not None
    assert state["warm"]
    assert 0 < state["ends_in"] <= 30
    assert "○ warm" in str(RLSession.sessions())
    with RLSession.start(one.replace("stack.keep_warm", 0.01)) as again:
        assert again.debug.stack.cluster.entry.stack == entry.stack
    assert_gone(entry.head, entry.directory)
    assert registry.living() == []


@pytest.mark.slow
def test_a_load_that_fails_after_its_start_leaves_the_stack_warm_and_the_next_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = RLSession.start(TINY.replace("engine.replicas", 1).replace("stack.keep_warm", 300.0))
    session.step()
    folder = session.save(tmp_path / "checkpoint")
    entry = session.debug.stack.cluster.entry
    session.close()
    (weights,) = (folder / "trainer").glob("*.safetensors")
    whole, restore = weights.read_bytes(), checkpoint.restore

    def damaged_meanwhile(*arguments: Any) -> None:
        weights.write_bytes(whole[: len(whole) // 2])
        restore(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "restore", damaged_meanwhile)
        with pytest.raises(CheckpointError, match="cannot be read"):
            RLSession.load(folder)
    assert RLSession.current() is None
    assert (lease.state_of(entry.folder) or {})["warm"]
    weights.write_bytes(whole)
    with RLSession.load(folder) as session:
        assert session.debug.stack.cluster.entry.stack == entry.stack
        assert session.step_count == 1
        assert session.step().step == 1
    assert registry.terminate(entry) > 0
    assert_gone(entry.head, entry.directory)


@pytest.mark.slow
def test_notebooks_of_one_call_share_a_stack_and_leave_nothing(tmp_path: Path) -> None:
    code = (
        "from kit import RLSession\nsession = RLSession.start('tiny')\n"
        "print('STACK', session.debug.stack.cluster.stack)\nsession.step()\n"
    )
    ends = {"forgets": "", "fails": "1 / 0"} | some({}, {"closes": "session.close()"})
    for name, end in ends.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code + end)])
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    paths = [tmp_path / f"{name}.ipynb" for name in ends]
    quiet = Console(file=io.StringIO())
    before = {entry.stack for entry in registry.living()}
    results = run_notebooks(paths, out_root=tmp_path / "runs", console=quiet)
    statuses = {"forgets": "completed", "fails": "failed", "closes": "completed"}
    assert [result.status for result in results] == [statuses[name] for name in ends]
    stacks = {re.search(r"STACK (\w+)", r.notebook.read_text())[1] for r in results}  # type: ignore[index]
    assert len(stacks) == 1
    assert {entry.stack for entry in registry.living()} <= before
    rows = [(result.folder / "metrics.jsonl").read_text() for result in results]
    first, *others = [{k: v for k, v in json.loads(r).items() if "perf/" not in k} for r in rows]
    assert others == [first] * len(others)
