"""Starting, refusing to start, and ending: what is checked before a process runs, what remains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kit import RLSession, SessionConfig
from kit.checkpoint import checkpoint
from kit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    KitError,
    ModelError,
    RewardError,
    SessionError,
)
from kit.lifecycle.start import SessionParts
from tests.cases import slow
from tests.processes import assert_gone
from tests.steps import responses_and_metrics

ROOT = Path(__file__).parents[2]
TINY = SessionConfig.preset("tiny")


@pytest.fixture(autouse=True, scope="module")
def _no_session_of_other_tests() -> None:
    if session := RLSession.current():
        session.close(keep_warm=True)


def stacks() -> set[str]:
    """Directories of stacks that live now; each stack has one from its first moment."""
    return {str(path) for path in Path(tempfile.gettempdir()).glob("kit-*")}


@pytest.fixture
def nothing_started(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    children = set(psutil.Process().children(recursive=True))
    with tempfile.TemporaryDirectory(prefix="t-") as folder:  # other tests' stacks are elsewhere
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        assert stacks() == set()
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        ({"trainin": {}}, ConfigError, "Did you mean 'training'"),
        ({"training": {"learning_rte": 1e-4}}, ConfigError, "learning_rate"),
        ({"training": {"num_rollout": "many"}}, ConfigError, "num_rollout"),
        ({"training": {"global_batch_size": 48}}, ConfigError, "does not divide"),
        ({"model": {"name": "/no/such/model"}}, ModelError, "/no/such/model"),
        ({"model": {"name": "tyny"}}, ModelError, "tiny"),
        ({"model": {"context_length": 100_000}}, ConfigError, "context_length"),
        ({"data": {"source": "/no/such/rows.jsonl"}}, DataError, "rows.jsonl"),
        ({"data": {"source": "tiny:adition"}}, DataError, "addition"),
        ({"data": {"source": "reasoning_gym:leg_count"}}, DataError, "leg_counting"),
        ({"reward": {"name": "exat"}}, RewardError, "exact"),
        ({"engine": {"extra": {"atention_backend": "x"}}}, ConfigError, "attention_backend"),
        ({"engine": {"attention_backend": "torch_native"}}, ConfigError, "runs on a CPU"),
        ({"engine": {"extra": {"max_loaded_loras": 1}}}, ConfigError, "engine.max_loras_per_batch"),
        ({"memory": {"device_gib": 0.01}}, ConfigError, r"set memory\.device_gib: 1"),
        ({"device": "cuda"}, KitError, "no GPU"),
    ],
)
@pytest.mark.usefixtures("nothing_started")
def test_wrong_settings_are_refused_before_anything_starts(
    settings: dict[str, Any], kind: type[KitError], says: str
) -> None:
    if settings.get("device") == "cuda" and Path("/dev/nvidia0").exists():
        settings = {"device": "tpu"}
        kind, says = ConfigError, "device"
    with pytest.raises(kind, match=says):
        RLSession.start(SessionConfig(**settings))


def test_loggers_end_with_a_start_that_fails_after_theirs(tmp_path: Path) -> None:
    logging = {"use_tensorboard": True, "dir": str(tmp_path)}
    parts = SessionParts(SessionConfig(logging=logging))
    stack = parts.prepare()
    with pytest.raises(AttributeError):  # the stack has no process
        parts.run(stack)
    assert (loggers := parts.tracker.loggers)
    parts.abandon()
    assert loggers.process.wait(60) == 0
    assert (parts.tracker.loggers, parts.phase) == (None, "not started")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "empty"),
        ([{"prompt": "1+1="}, {"promt": "1+2="}], r"row 2.*|prompt"),
        ([{"prompt": 3}], "prompt"),
        ([{"prompt": "1+1=", "metadata": "text"}], "metadata"),
    ],
)
@pytest.mark.usefixtures("nothing_started")
def test_malformed_rows_are_refused_before_anything_starts(
    rows: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        RLSession.start("tiny", data=rows)


@pytest.mark.usefixtures("nothing_started")
def test_a_prompt_longer_than_the_context_is_named_by_its_row_and_leaves_nothing() -> None:
    rows = [{"prompt": "1+1=", "label": "2"}, {"prompt": "9" * 600, "label": "0"}]
    with pytest.raises(DataError, match=r"[Rr]ow 2.*tokens"):
        RLSession.start("tiny", data=rows)


@pytest.mark.usefixtures("nothing_started")
def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KitError, match=r"manifest\.json"):
        RLSession.load(tmp_path)


VERBS = ("generate", "sync", "check_mismatch", "step", "train", "evaluate", "save")


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_before_start_says_how_to_start(verb: str) -> None:
    with pytest.raises(SessionError, match=r"not started(.|\n)*RLSession\.start"):
        getattr(RLSession("tiny"), verb)()


@pytest.mark.slow
def test_a_session_of_many_parts_trains_and_ends(tmp_path: Path) -> None:
    """Two trainers, a reference model, two optimizer steps a rollout, a schedule, own data."""
    settings = {
        "num_trainers": 2,
        "kl_loss_coef": 0.01,
        "global_batch_size": 32,
        "rollout_batch_size": 8,
        "learning_rate": 1e-4,
        "lr_schedule": "cosine",
        "warmup_steps": 2,
        "max_tokens_per_gpu": 200,
        "num_rollout": 4,
    }
    rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a in (12, 57) for b in range(21, 29)]
    seen = []

    def reward(sample: Any) -> float:
        seen.append(sample.label)
        return float(sample.response == sample.label)

    config = SessionConfig(model={"name": "tiny"}, training=settings)
    with RLSession.start(config, data=rows, eval_data=rows[:4], reward=reward) as session:
        assert session.check_mismatch().verdict == "pass"
        assert session.check().healthy
        session.snapshot("start")
        once = responses_and_metrics([session.step()])
        tried = session.what_if(lr=1e-3)
        assert (tried.snapshot, tried[0].update) != ("", None)
        session.restore("start")
        assert responses_and_metrics([session.step()]) == once
        session.restore("start")
        first, *_, last = session.train(4, show=False).steps
        assert len(first.update.per_step) == 2
        assert first.update.per_step[0]["train/kl_loss"] == pytest.approx(0.0, abs=1e-7)
        assert last.metrics["train/kl_loss"] > 0
        rates = [row["train/lr"] for s in (first, last) for row in s.update.per_step]
        assert rates[0] == pytest.approx(5e-5)
        assert rates[1] == pytest.approx(1e-4)
        assert rates[-1] < rates[1]
        deep = session.check_mismatch(session.generate(), deep=True)
        assert deep.max_abs_diff < 5e-5
        assert "checksums of 34 parameters: 0 differ" in deep.evidence
        assert session.evaluate().prompts == 4
        saved = session.save(tmp_path / "two-trainers")
        stack = session.debug.stack.cluster.directory
        assert set(seen) <= {row["label"] for row in rows}
    assert not stack.exists()
    with pytest.raises(SessionError, match="closed"):
        session.generate()
    session.close()  # again, without harm
    _load_with_one_trainer(saved, rows, reward)


def _load_with_one_trainer(saved: Path, rows: list[dict[str, Any]], reward: Any) -> None:
    config, _ = checkpoint.read(saved)
    assert config.training.num_trainers == 2
    own: dict[str, Any] = {"data": rows, "eval_data": rows[:4]}
    with pytest.raises(CheckpointError, match=r"own.*(?s:.*)reward=\.\.\.\)"):
        RLSession.load(saved, **own)
    changes = {"training.learning_rate": 5e-5, "training.lr_schedule": "constant"}
    own |= {"num_trainers": 1, "reward": reward, "changes": changes}
    with RLSession.load(saved, **own) as session:
        assert session.step_count == 4
        assert [each["to"] for each in session.debug.state.changes] == [5e-5, "constant", 1]
        assert session.step().metrics["train/lr"] == 5e-5
        assert session.check_mismatch(session.generate()).verdict == "pass"


def run_script(text: str, log: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(text)], stdout=file, stderr=file, env=env
        )


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", *slow("exception")])
def test_no_process_outlives_its_session_and_its_shared_memory_has_no_names_to_be_left(
    end: str, tmp_path: Path
) -> None:
    script = """
        import ray  # whoever has it imported already can start a session as well
        from kit import RLSession
        from kit import SessionConfig
        session = RLSession.start(SessionConfig.preset("tiny").replace("stack.lease", 1))
        from tests.processes import named_memory
        cluster = session.debug.stack.cluster
        print("MEMORY", *(f for p in cluster.processes() for f in named_memory(p.pid)))
        print("STACK", cluster.directory, cluster.entry.head)
        import sys; sys.stdout.flush()
        if sys.argv[0] == "-c" and %r == "exception":
            raise RuntimeError("the notebook's own mistake")
        import time; time.sleep(600)
    """
    log = tmp_path / "log"
    process = run_script(script % end, log)
    while b"STACK" not in log.read_bytes():
        assert process.poll() is None or b"STACK" in log.read_bytes(), log.read_text()
        time.sleep(0.1)
    line = next(row for row in log.read_text().splitlines() if row.startswith("STACK"))
    _, directory, head = line.split()
    memory = next(row for row in log.read_text().splitlines() if row.startswith("MEMORY")).split()
    assert memory[1:] == []
    if end == "kill":
        process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert_gone(int(head), directory)
