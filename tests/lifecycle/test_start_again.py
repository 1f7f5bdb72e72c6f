"""A start where a session runs already: in a notebook it ends for the new one, in a script not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import IPython
import pytest

from kit import RLSession, SessionConfig
from kit.errors import ConfigError, SessionError
from kit.lifecycle import running
from tests.processes import assert_gone

REQUEST = {"header": {"msg_id": "1"}, "content": {"allow_stdin": True}}
TINY = SessionConfig.preset("tiny").replace("training.rollout_batch_size", 4)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process is a notebook's kernel, and a person waits for its answers."""
    kernel = SimpleNamespace(get_parent=lambda _: REQUEST)
    events = SimpleNamespace(register=lambda *_: None)  # Ray asks to be told of cells that end
    shell = SimpleNamespace(kernel=kernel, events=events)
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def first(session: RLSession) -> Iterator[RLSession]:
    """The session of before; whatever runs at the end is left warm for other tests."""
    yield session
    if (last := RLSession.current()) and last is not session:
        last.close(keep_warm=True)


def folder(session: RLSession) -> Path:
    directory: Path = session.debug.stack.cluster.directory
    return directory


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was said of sessions that ended; a start that takes seconds shows how far it is, too."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("The session")]


def test_a_second_session_in_a_script_is_refused_with_the_ways_out(first: RLSession) -> None:
    with pytest.raises(SessionError, match=r"running in this process already(.|\n)*current\(\)"):
        RLSession.start(TINY)
    assert RLSession.current() is first


@pytest.mark.usefixtures("notebook")
def test_a_start_with_new_settings_ends_the_session_of_before_and_takes_over_its_processes(
    first: RLSession, capsys: pytest.CaptureFixture[str]
) -> None:
    first.train(2, show=False)
    first.snapshot("later")
    processes = folder(first)
    again = RLSession.start(TINY.replace("seed", 7))
    assert RLSession.current() is again
    assert (again.config.seed, again.step_count, len(again.snapshots())) == (7, 0, 0)
    assert (again.config.name, folder(again)) == ("tiny", processes)
    assert len(again.generate()) == 4 * again.config.training.n_samples_per_prompt
    (line,) = said(capsys)
    assert line == (
        "The session 'tiny' ended for this one, without its last 2 steps: nobody had saved them; "
        "with it went the snapshot 'later'."
    )
    with pytest.raises(SessionError, match="closed"):
        first.generate()


@pytest.mark.usefixtures("notebook")
def test_a_session_that_was_saved_or_never_trained_ends_without_more_words(
    first: RLSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first.step()
    first.save(tmp_path / "mine")
    again = RLSession.start(TINY)
    RLSession.start(TINY)
    assert said(capsys) == ["The session 'tiny' ended for this one."] * 2
    assert again is not RLSession.current()


@pytest.mark.usefixtures("notebook")
def test_a_start_with_wrong_settings_leaves_the_session_of_before_as_it_is(
    first: RLSession, capsys: pytest.CaptureFixture[str]
) -> None:
    first.step()
    with pytest.raises(ConfigError, match="does not divide"):
        RLSession.start(SessionConfig(training={"global_batch_size": 48}))
    assert first.step().step == 1
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.usefixtures("notebook")
def test_a_long_training_that_nobody_saved_is_saved_first_and_where_is_said(
    first: RLSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first.train(2, show=False)
    responses = first.generate(["12+34="], temperature=0)[0].response
    monkeypatch.setattr(running, "KEPT_SECONDS", 1e-6)
    RLSession.start(TINY)
    words = capsys.readouterr().out
    kept = Path("checkpoints") / "tiny-step-000002"
    assert f"had not been saved and are in {kept.absolute()} (RLSession.load)" in words
    loaded = RLSession.load(kept)
    assert loaded.step_count == 2
    assert loaded.generate(["12+34="], temperature=0)[0].response == responses
    loaded.step()
    loaded.restore(kept)
    loaded.step()  # another step 3 than the first one: none of the two is the other's successor
    RLSession.start(TINY)
    assert "its last step, which took" in capsys.readouterr().out


@pytest.mark.usefixtures("notebook")
def test_a_long_training_that_cannot_be_saved_is_not_ended(
    first: RLSession, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first.step()
    monkeypatch.setattr(running, "KEPT_SECONDS", 1e-6)
    (tmp_path / "checkpoints").write_text("a file where the folder would be")
    with pytest.raises(SessionError, match=r"1 step of it were never saved(.|\n)*\.close\(\)"):
        RLSession.start(TINY)
    assert first.step().step == 1


@pytest.mark.slow
@pytest.mark.usefixtures("notebook")
def test_a_training_on_the_dashboard_ends_for_the_new_session(first: RLSession) -> None:
    training = first.train(10_000, dashboard=True)
    training.pause()
    while training.state != "paused":
        first.generate(["1+1="])
    training.resume()
    again = RLSession.start(TINY)
    assert training.state == "stopped"
    assert again.step().step == 0
    assert again.training is None


@pytest.mark.slow
@pytest.mark.usefixtures("notebook")
def test_where_the_new_engine_is_another_one_nothing_of_the_old_one_is_left(
    first: RLSession,
) -> None:
    entry = first.debug.stack.cluster.entry
    with RLSession.start(TINY.replace("engine.replicas", 1)):
        assert_gone(entry.head, str(entry.folder))
