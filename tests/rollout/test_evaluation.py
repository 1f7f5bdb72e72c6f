"""Evaluation on one held-out set, or on several by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, SessionConfig
from kit.config import DataConfig
from kit.data import load_held_out
from kit.errors import ConfigError, DataError
from kit.tracking.recorder import Recorder
from kit.tracking.run_folder import EVALUATIONS, read_rows

OWN = [{"prompt": f"{n}+{n}=", "label": str(2 * n)} for n in range(11, 17)]


def test_sets_have_the_names_that_they_are_given(tmp_path: Path) -> None:
    file = tmp_path / "doubles.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in OWN))
    config = DataConfig(eval_source={"sums": "tiny:addition@[:8]", "own": str(file)})
    assert [(each.name, len(each)) for each in load_held_out(config)] == [("sums", 8), ("own", 6)]
    passed = load_held_out(DataConfig(), override={"a": OWN, "b": "tiny:chain@[:3]"})
    assert [(each.name, len(each)) for each in passed] == [("a", 6), ("b", 3)]
    (one,) = load_held_out(DataConfig(), override=OWN)
    assert (one.name, len(one)) == ("in_memory", 6)


@pytest.mark.parametrize("data", [{"prompt": ["1+1="], "label": ["2"]}, {"test": OWN[:1]}])
def test_columns_and_splits_of_a_dataset_are_one_set(data: Any) -> None:
    (one,) = load_held_out(DataConfig(), override=data)
    assert len(one) == 1


def test_a_fault_names_the_set_and_a_set_without_name_or_source_is_refused() -> None:
    with pytest.raises(DataError, match=r"^broken: .*nowhere"):
        load_held_out(DataConfig(), override={"fine": OWN, "broken": "nowhere.jsonl"})
    for sets in ({}, {"": "tiny:chain"}, {"chain": ""}):
        with pytest.raises(ConfigError, match=r"data\.eval_source is"):
            SessionConfig(data={"eval_source": sets})


@pytest.mark.slow
def test_each_set_is_evaluated_logged_and_shown(session: RLSession, tmp_path: Path) -> None:
    alone = session.evaluate()
    session.close(keep_warm=True)
    config = session.config.replace("evaluation.interval", 1).replace("name", "sets")
    sets: dict[str, Any] = {"first": "tiny:addition", "doubles": OWN}
    with RLSession.start(config, eval_data=sets) as session:
        report = session.evaluate()
        assert [s.response for s in report.rollout] == [s.response for s in alone.rollout]
        doubles = report.sets["doubles"]
        assert [s.label for s in doubles.rollout] == [row["label"] for row in OWN]
        assert report.metrics == {
            "eval/first": alone.mean_reward,
            "eval/doubles": doubles.mean_reward,
        }
        assert "doubles: " in str(report)
        assert ">doubles<" in report._repr_mimebundle_()["text/html"]
        assert set(report.to_pandas()["dataset"]) == {"first", "doubles"}
        session.debug.tracker.recorder = recorder = Recorder(tmp_path / "run")
        recorder.start(session.config, session.debug.state.inputs.described)
        step = session.step()
        assert step.evaluation is not None
        assert step.evaluation.metrics.items() <= session.history[-1].items()
        assert "doubles (evaluation)" in str(step)
        session.debug.tracker.recorder = None
        session.close(keep_warm=True)
    rows = read_rows(tmp_path / "run" / EVALUATIONS)
    assert [(row["dataset"], row["prompts"]) for row in rows[-2:]] == [
        ("first", alone.prompts),
        ("doubles", 6),
    ]
