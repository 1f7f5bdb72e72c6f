"""Forks on stacks of their own kinds: engines with adapters, a critic, two trainers, deaths."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, SessionConfig
from kit.errors import SessionError, StackError
from kit.lifecycle import journal, running
from kit.runs.index import find_runs, read_run
from tests.forking import CONFIG, OTHER, digest, everything, rows
from tests.forking import alone as by_itself
from tests.lifecycle.test_start_again import notebook
from tests.processes import kill, last_words, of_engine, of_trainer
from tests.runs.conftest import write_notebook
from tests.runs.test_resume import rows as written

__all__ = ["notebook"]  # a fixture
ROOT = Path(__file__).parents[1]

KINDS: dict[str, dict[str, Any]] = {
    "adapters in the engine": {"engine.lora": "adapter"},
    "experts that are replayed": {
        "model.name": "tiny-moe",
        "model.lora.target_modules": ["q_proj", "o_proj"],
        "training.use_rollout_routing_replay": True,
        "engine.lora": "adapter",
    },
    "a critic": {"training.advantage_estimator": "ppo"},
    "shared operators": {"training.true_on_policy": True},
    "bfloat16": {"model.dtype": "bfloat16"},
    "4 bits": {"model.lora.load_in_4bit": True},
    "two engines": {"engine.replicas": 2},
    "two trainers": {"training.num_trainers": 2},
}


def of_kind(kind: dict[str, Any]) -> SessionConfig:
    config = CONFIG
    for name, value in kind.items():
        config = config.replace(name, value)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_forks_in_turns_give_what_each_gives_alone(alone: None, kind: str) -> None:
    config = of_kind(KINDS[kind])
    with RLSession.start(config) as root:
        fresh = root.fork("fresh", fresh=True, seed=5)
        for _ in range(2):
            root.step()
            fresh.step()
        copied = root.fork("copied")
        for session in (root, fresh, copied):
            session.step()
        assert fresh.check_mismatch(fresh.generate()).verdict == "pass"
        found = [everything(s)[1:3] for s in (root, fresh, copied)]
        root.close(keep_warm=True)
    assert found[2] == found[0] != found[1]
    assert found[0] == by_itself(config, 3)[1:3]
    assert found[1] == by_itself(config.replace("seed", 5), 3)[1:3]


@pytest.mark.slow
def test_a_trainer_that_died_takes_every_sessions_weights_and_each_has_its_checkpoint(
    alone: None, tmp_path: Path
) -> None:
    with RLSession.start(CONFIG) as root:
        fork, lost = root.fork("fork", learning_rate=3e-3), root.fork("lost")
        for session in (root, fork):
            session.step()
        saved = {s.name: (s.save(tmp_path / s.name), digest(s)) for s in (root, fork)}
        fork.snapshot("kept")
        root.sync()
        kill(of_trainer(root))
        assert len(root.generate(["1+1="])) == 4  # the engine has its weights still
        for session in (fork, lost, root):
            with pytest.raises(StackError, match=r"(?s)trainer.*died.*RLSession\.load"):
                session.step()
        fork.restore(saved["fork"][0])
        assert digest(fork) == saved["fork"][1]
        fork.step()
        for session in (lost, root):
            with pytest.raises(StackError, match=r"(?s)started again.*session\.restore"):
                session.generate(["1+1="])
        root.restore(saved["adapters"][0])
        assert digest(root) == saved["adapters"][1]
        root.step()
        assert root.check_mismatch(root.generate()).verdict == "pass"
        assert fork.step_count == 2
        with pytest.raises(SessionError, match="does not hold the snapshot"):
            fork.restore("kept")
        assert fork.step().step == 2
        root.fork("lost-again").step()


@pytest.mark.slow
def test_an_engine_that_died_comes_back_with_the_weights_of_whoever_asks(alone: None) -> None:
    with RLSession.start(CONFIG) as root:
        fork = root.fork("fork", learning_rate=3e-3)
        for session in (root, fork):
            session.step()
        for session in (root, fork):
            kill(of_engine(root, 0))
            rollout = session.generate()
            assert rollout.written_by({session.weight_version})
            assert session.check_mismatch(rollout).verdict == "pass"
        expected = rows(fork)
        assert rows(root) != expected


@pytest.mark.slow
def test_a_forks_checkpoint_is_a_session_of_its_own(alone: None, tmp_path: Path) -> None:
    with RLSession.start(CONFIG) as root:
        root.step()
        fork = root.fork("fork", learning_rate=3e-3)
        fork.step()
        path = fork.save(tmp_path / "saved")
        fork.step()
        expected = everything(fork)
    with RLSession.load(path) as loaded:
        assert loaded.config.name == "adapters.fork"
        loaded.step()
        assert everything(loaded) == expected
        assert everything(loaded.fork("again"))[:3] == expected[:3]


FORKS = """\
import os, pathlib, signal
from kit import RLSession, SessionConfig
from tests.forking import CONFIG

session = RLSession.start(CONFIG)
fork = session.fork("b", learning_rate=3e-3)
session.train(3, show=False)
"""
TRAINS = """\
def trap(report):
    file = pathlib.Path("trap")
    if file.exists() and report.step == 2:
        file.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

fork.train(4, callbacks=trap, show=False)
fork.evaluate()
session.step()
fork.save()
session.save()
session.close()
"""


def run(*words: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "kit", "run", *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow
def test_a_batch_run_records_each_fork_by_itself_and_is_resumed_to_the_same_end(
    alone: None, tmp_path: Path
) -> None:
    notebook = write_notebook(tmp_path, FORKS, TRAINS, parameters="", name="forks.ipynb")
    for out in ("whole", "killed"):
        if out == "killed":
            (tmp_path / "trap").touch()
        run(notebook, "--checkpoint-every", 1, "--out", tmp_path / out)
    (whole,), (killed,) = ([*(tmp_path / out).iterdir()] for out in ("whole", "killed"))
    assert not (tmp_path / "trap").exists()
    assert read_run(killed).status == "killed"
    run("--resume", killed)
    assert read_run(killed).status == read_run(whole).status == "completed"
    for file in ("metrics.jsonl", "forks/b/metrics.jsonl", "forks/b/evaluations.jsonl"):
        first, second = written(whole, file), written(killed, file)
        assert first == second != []
    assert len(written(whole, "forks/b/metrics.jsonl")) == 4
    assert (whole / "forks/b/checkpoints/final/manifest.json").is_file()
    assert (killed / "checkpoints/final/manifest.json").is_file()
    settings = SessionConfig.load(whole / "forks/b/config.yaml")
    assert (settings.name, settings.training.learning_rate) == ("adapters.b", 3e-3)
    assert [each.name for each in find_runs(tmp_path / "whole")] == [
        whole.name,
        f"{whole.name}/forks/b",
    ]


DIES = """
import json, os, signal
from kit import RLSession
from kit.lifecycle import step
from tests.forking import CONFIG, OTHER, digest

root = RLSession.start(CONFIG.replace("name", "dying"))
root.step()
copy = root.fork("copy", learning_rate=3e-3)
fresh = root.fork("fresh", fresh=True, seed=5, **OTHER)
given_up = root.fork("given-up", reward=lambda sample: 0.0)
for session in (root, copy, fresh):
    session.step()
copy.snapshot("kept")
print(json.dumps([digest(session) for session in (root, fresh)]), flush=True)
step.hand_over = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
copy.step()
"""


@pytest.mark.slow
def test_a_killed_kernel_leaves_forks_that_go_on(alone: None) -> None:
    told = last_words(DIES)
    own = {"fresh": OTHER, "given-up": None}
    with pytest.raises(
        SessionError, match=r"(?s)fork 'fresh' was.*forks={'fresh': dict\(eval_data"
    ):
        RLSession.attach("dying", forks={"given-up": None})
    with pytest.raises(SessionError, match=r"(?s)no fork 'coppy'.*'copy'"):
        RLSession.attach("dying", forks={"coppy": None})
    with RLSession.attach("dying", forks=own) as root:
        assert set(root.forks) == {"copy", "fresh"}
        copy, fresh = root.forks["copy"], root.forks["fresh"]
        assert (root.step_count, copy.step_count, fresh.step_count) == (2, 3, 1)
        assert [digest(s) for s in (root, fresh)] == told
        for session in (copy, root, fresh):
            session.step()
        found = [(digest(s), rows(s)) for s in (root, copy, fresh)]
        assert copy.snapshots()[0].name == "kept"
        copy.restore("kept")
        assert copy.step_count == 2
        assert fresh.fork("given-up").step_count == 2
        versions = [s.weight_version for s in (root, copy, fresh)]
        assert len({*versions}) == 3
    with RLSession.start(CONFIG) as root:
        root.step()
        copy = root.fork("copy", learning_rate=3e-3)
        fresh = root.fork("fresh", fresh=True, seed=5, **OTHER)
        for session, steps in ((root, 2), (copy, 3), (fresh, 2)):
            for _ in range(steps):
                session.step()
        assert found == [(digest(s), rows(s)) for s in (root, copy, fresh)]


@pytest.mark.slow
@pytest.mark.usefixtures("notebook")
def test_a_start_that_ends_a_session_says_what_of_its_forks_goes(
    alone: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = RLSession.start(CONFIG)
    root.step()
    fork = root.fork("fork")
    directory = root.debug.stack.cluster.directory
    again = RLSession.start(CONFIG)
    assert "The fork 'fork' ended with it.\n" in capsys.readouterr().out
    assert again.debug.stack.cluster.directory == directory
    assert not journal.forks(directory)
    fork = again.fork("fork")
    fork.step()
    monkeypatch.setattr(running, "KEPT_SECONDS", 1e-6)
    with RLSession.start(CONFIG):
        kept = Path("checkpoints") / "adapters.fork-step-000001"
        assert f"and is in {kept.absolute()}" in capsys.readouterr().out
        with pytest.raises(SessionError, match=r"(?s)'adapters.fork' is closed.*'adapters' ended"):
            fork.step()


@pytest.mark.slow
def test_with_adapters_in_the_engine_no_turn_needs_a_sync_and_several_write_at_once(
    alone: None,
) -> None:
    config = CONFIG.replace("engine.lora", "adapter")
    with RLSession.start(config) as root:
        forks = [root.fork(str(i), learning_rate=rate) for i, rate in enumerate((1e-3, 3e-3))]
        everyone = [root, *forks, root.fork("fresh", fresh=True, seed=5), root.fork("sixth")]
        everyone.append(everyone[3].fork("fifth"))
        for session in everyone:
            session.step()
        slots = root.debug.stack.slots
        assert slots.in_engines == {session.debug.slot for session in everyone}
        for session in everyone:
            session.snapshot("here")
        one_by_one = [session.generate() for session in everyone]
        for session in everyone:
            session.restore("here")
        both = RLSession.generate_together(everyone)
        assert slots.in_engines == {session.debug.slot for session in everyone}
        for session, first, second in zip(everyone, one_by_one, both, strict=True):
            assert [s.tokens for s in first] == [s.tokens for s in second]
            for one, other in zip(first, second, strict=True):  # of other batches
                assert other.rollout_log_probs == pytest.approx(one.rollout_log_probs, abs=1e-4)
            assert second.written_by({session.weight_version})
            assert session.last_rollout == second
            assert session.check_mismatch(second).verdict == "pass"
            assert session.sync(verify=True).verified
        asked = ["1+2=", "3+4="]
        same = RLSession.generate_together(everyone, asked, n_samples_per_prompt=1, temperature=0)
        assert [len(rollout) for rollout in same] == [2] * 6
        kill(of_engine(root, 0))
        again = RLSession.generate_together(everyone, asked, n_samples_per_prompt=1, temperature=0)
        assert [[s.tokens for s in r] for r in again] == [[s.tokens for s in r] for r in same]
        update = root.update(root.advantages(root.score(root.generate())))
        assert update.applied
        stale = root.generate(asked)  # of the version that the engine has, as without forks
        assert stale.written_by({root.engine_version})
        assert root.engine_version < root.weight_version
        forks[0].close()
        assert forks[1].step().step == 1
