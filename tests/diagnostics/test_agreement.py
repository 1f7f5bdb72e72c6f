"""A session starts only with a model that trainer, engine and Transformers compute alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, SessionConfig
from kit.diagnostics import agreement
from kit.errors import ModelError, StackError
from tests.cases import slow
from tests.small_models import FAMILIES, WINDOW, make_model

ROWS = [{"prompt": f"{a}+{a + 1}=", "label": str(2 * a + 1)} for a in range(12, 20)]

AT_WINDOW = f"begins after sliding_window {WINDOW} tokens"
REFUSED = {
    "Cohere, untied": "its output layer",
    "Llama, dynamic rope": "the engine",
    "Llama, yarn": "the engine",
    "Olmo3, yarn": "rope scaling",
    "Phi": "bias",
    "StableLm": "cannot be trained",
}
"""What a start says of families that engine or trainer computes otherwise than Transformers."""
IGNORED = json.dumps({"sliding_window": None})
WITHOUT_WINDOW = {"replicas": 1, "extra": {"json_model_override_args": IGNORED}}
"""An engine that is told of no window."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that nothing counts as seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kit" / "agreement"


@contextmanager
def started(directory: str | Path, **settings: Any) -> Iterator[RLSession]:
    if other := RLSession.current():
        other.close(keep_warm=True)
    config = {
        "model": {"name": str(directory)},
        "device": "cpu",
        "rollout": {"max_response_len": 24},
        "engine": {"replicas": 1},
        "training": {
            "rollout_batch_size": 2,
            "n_samples_per_prompt": 2,
            "learning_rate": 1e-2,
        },
    }
    with RLSession.start(SessionConfig(**config | settings), data=ROWS) as session:
        yield session
        # A model that no other test has would keep a stack's memory for ten minutes.
        session.close(keep_warm=isinstance(directory, str))


def trained_and_synced(session: RLSession) -> None:
    """One update that moves all weights; afterwards both sides agree and everything arrived."""
    rollout = session.score(session.generate(), reward=lambda sample: float(sample.index % 2))
    session.update(session.advantages(rollout))
    report = session.sync(verify=True)
    assert report.verified == len(session.debug.stack.checksums()[0])
    assert session.check_mismatch(session.generate()).verdict == "pass"


@pytest.mark.slow
def test_what_agrees_is_noted_and_not_looked_at_again(cache: Path) -> None:
    with started("tiny") as session:
        trained_and_synced(session)
    (record,) = cache.iterdir()
    seen = json.loads(record.read_text())
    assert max(seen["trainer"], seen["prefill"], seen["decode"]) < 1e-5
    assert seen["longest"] > 40
    assert not seen["lost"]
    record.write_text(json.dumps(seen | {"reshaped": ["a.weight"]}))
    with started("tiny") as session:
        assert session.debug.stack.description["reshaped"] == ["a.weight"]


@pytest.mark.slow
def test_a_window_that_the_engine_ignores_is_refused_with_numbers_and_place(
    tmp_path: Path, cache: Path
) -> None:
    folder = make_model(tmp_path / "model", "Mistral, window")
    refused = pytest.raises(ModelError, match=f"(?s)the engine.*{AT_WINDOW}")
    with refused as caught, started(folder, engine=WITHOUT_WINDOW):
        pass
    assert "the trainer is" not in str(caught.value)  # which attends through windows
    assert RLSession.current() is None
    assert not cache.exists()


@pytest.mark.slow
def test_a_model_that_differs_starts_with_a_warning_where_the_settings_ask_for_it(
    tmp_path: Path, cache: Path
) -> None:
    folder = make_model(tmp_path / "model", "Mistral, window")
    warned = pytest.warns(RuntimeWarning, match="otherwise than Transformers")
    settings = {"mismatch": {"on_start": "warn"}, "engine": WITHOUT_WINDOW}
    with warned, started(folder, **settings) as session:
        assert session.generate()
    assert not cache.exists()


def test_sequences_are_longer_than_the_windows_that_a_response_can_reach(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"sliding_window": 100}))
    assert agreement.sequence_length(tmp_path, 512, 100) == agreement.SHORTEST
    assert agreement.sequence_length(tmp_path, 512, 101) > 100 + agreement.WRITTEN
    assert agreement.sequence_length(tmp_path, 110, 110) == 110
    off = {"sliding_window": 100, "use_sliding_window": False}
    (tmp_path / "config.json").write_text(json.dumps(off))
    assert agreement.sequence_length(tmp_path, 512, 400) == agreement.SHORTEST


@pytest.mark.slow
def test_experts_of_mixtral_reach_the_engine(tmp_path: Path) -> None:
    with started(make_model(tmp_path / "model", "Mixtral")) as session:
        trained_and_synced(session)


@pytest.mark.slow
def test_bfloat16_agrees_within_its_rounding_and_nothing_is_named_as_a_cause() -> None:
    with started("tiny", model={"name": "tiny", "dtype": "bfloat16"}) as session:
        report = session.check_mismatch(session.generate(), deep=True)
        assert (report.verdict, report.cause_kind) == ("pass", "none")


@pytest.mark.slow
def test_in_bfloat16_other_weights_do_not_pass_for_rounding() -> None:
    coarse = {"name": "tiny", "dtype": "bfloat16"}
    with started("tiny", model=coarse, engine={"weight_noise": 0.3}) as session:
        report = session.check_mismatch(session.generate())
        assert 0.02 <= report.warn_above < report.mean_abs_diff
        assert (report.verdict, report.cause_kind) != ("pass", "none")


QUICK = "GptOss"
"""Of all it differs most from the others: windows, sinks, experts with biases."""


@pytest.mark.parametrize("family", [QUICK, *slow(*sorted(set(FAMILIES) - {QUICK}))])
def test_each_family_is_accepted_or_refused_rightly(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / "model", family)
    if family in REFUSED:
        refused = pytest.raises((ModelError, StackError), match=REFUSED[family])
        with refused, started(folder):
            pass
    else:
        with started(folder) as session:
            trained_and_synced(session)
