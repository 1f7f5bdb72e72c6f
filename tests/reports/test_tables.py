"""Results as tables: rows have their steps."""

from __future__ import annotations

from kit.reports.training import History, TrainReport
from tests.viz.results import make_evaluation, make_update


def test_a_history_is_a_list_and_a_table_by_step() -> None:
    history = History([{"step": 4, "a": 1.0}, {"step": 6, "a": 2.0, "eval/x": 0.5}])
    assert history[0] == {"step": 4, "a": 1.0}
    table = history.to_pandas()
    assert table.index.tolist() == [4, 6]
    assert table["a"].tolist() == [1.0, 2.0]
    assert table["eval/x"].isna().tolist() == [True, False]
    assert len(History().to_pandas()) == 0


def test_reports_are_tables_of_steps_optimizer_steps_and_responses() -> None:
    report = TrainReport(history=({"step": 3, "a": 1.0}, {"step": 4, "a": 2.0}))
    assert report.to_pandas()["a"].to_dict() == {3: 1.0, 4: 2.0}
    update = make_update(per_step=({"train/loss": 1.0}, {"train/loss": 2.0}))
    assert update.to_pandas()["train/loss"].tolist() == [1.0, 2.0]
    assert len(make_evaluation().to_pandas()) == 64
