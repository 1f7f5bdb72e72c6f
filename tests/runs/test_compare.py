"""Runs side by side: curves over seeds, differences, samples, and the page that shows them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import kit as package
from kit import SessionConfig
from kit.errors import DataError, RunError
from kit.reports import REWARD
from kit.reports.runs import RunComparison
from kit.runs.compare import compare_runs
from kit.samples import Rollout, Sample
from tests.runs.run_folders import make_run
from tests.runs.test_cli import kit

HOSTILE = "</pre><script src=//evil></script><img src=x onerror=alert(1)>\u202e"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two learning rates with three seeds each."""
    root = tmp_path_factory.mktemp("papermill_runs")
    return [
        make_run(root, 3 * i + seed, lr, seed, hostile=HOSTILE)
        for i, lr in enumerate((1e-5, 1e-4))
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def compared(folders: list[Path]) -> RunComparison:
    return package.compare(*folders)


def test_runs_that_differ_only_in_their_seed_are_one_curve_with_mean_and_range(
    compared: RunComparison, folders: list[Path]
) -> None:
    assert [group.label for group in compared.groups] == ["lr 1e-05", "lr 0.0001"]
    assert [group.seeds for group in compared.groups] == [[0, 1, 2]] * 2
    rows = [json.loads((f / "metrics.jsonl").read_text().splitlines()[4]) for f in folders[:3]]
    rewards = [row[REWARD] for row in rows]
    band = compared.groups[0].bands[REWARD]
    assert band.mean[4] == pytest.approx(sum(rewards) / 3)
    assert (band.low[4], band.high[4]) == (min(rewards), max(rewards))
    assert band.steps == tuple(range(12))
    assert compared.metrics[:2] == (REWARD, "eval/tiny:addition")


def test_differences_name_parameters_settings_and_versions_but_no_seed(tmp_path: Path) -> None:
    one = make_run(tmp_path, 1, 1e-5, seed=0)
    two = make_run(
        tmp_path, 2, 1e-4, seed=1, versions={"torch": "2.12.0", "kit": "0.1.0"},
        machine={"gpus": ["H100"]},
    )  # fmt: skip
    compared = compare_runs([one, two])
    assert {(d.kind, d.name, *d.values) for d in compared.differences} == {
        ("parameter", "lr", "1e-05", "0.0001"),
        ("setting", "training.learning_rate", "1e-05", "0.0001"),
        ("version", "torch", "2.11.0", "2.12.0"),
        ("version", "python", "3.11.9", "–"),
        ("machine", "gpus", "–", '["H100"]'),
    }
    assert compared.alike == {"steps": "12", "note": "none"}


def test_the_same_prompts_stand_side_by_side_as_late_as_there_are_any(
    compared: RunComparison,
) -> None:
    assert len(compared.samples) == 4
    first = compared.samples[0]
    assert [side.step for side in first if side] == [10, 10]
    assert len({side.sample.prompt_text for side in first if side}) == 1
    assert [side.reward for side in first if side] == [0.5, 1.0]


def test_runs_without_samples_or_of_other_steps_say_so(tmp_path: Path) -> None:
    one, two = make_run(tmp_path, 1, 1e-5), make_run(tmp_path, 2, 1e-4, sampled=False)
    assert compare_runs([one, two]).samples == ()
    three = make_run(tmp_path, 3, 1e-3, steps=4)
    mixed = compare_runs([one, two, three])
    assert {side.step for row in mixed.samples for side in row if side} == {0}
    assert all(row[1] is None for row in mixed.samples)
    assert "Some runs kept no samples." in mixed.notes
    with (three / "samples.jsonl").open("a") as file:
        file.write('{"step": 0, "promp')
    assert compare_runs([one, two, three]).samples == mixed.samples


def test_runs_of_different_length_are_told_of(tmp_path: Path) -> None:
    long, short = make_run(tmp_path, 1, seed=0), make_run(tmp_path, 2, seed=1)
    rows = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
    (short / "metrics.jsonl").write_text("".join(rows[:5]))
    compared = compare_runs([long, short])
    assert len(compared.groups) == 1
    assert "its runs took 12, 5 steps" in compared.notes[0]
    assert compared.groups[0].bands[REWARD].steps == tuple(range(12))


def test_folders_that_a_person_named_keep_their_names(tmp_path: Path) -> None:
    folders = [make_run(tmp_path, i, lr) for i, lr in enumerate((1e-5, 1e-4))]
    for folder, name in zip(folders, ("too cold", "healthy"), strict=True):
        folder.rename(tmp_path / name)
    compared = compare_runs([tmp_path / "healthy", tmp_path / "too cold"])
    assert [group.label for group in compared.groups] == ["healthy", "too cold"]


def test_one_run_alone_and_one_without_a_step_can_be_looked_at(tmp_path: Path) -> None:
    shown = compare_runs([make_run(tmp_path, 1, steps=0)])._repr_mimebundle_()
    assert "1 run side by side" in shown["text/plain"]
    only = compare_runs([make_run(tmp_path, 2), make_run(tmp_path, 3, seed=1)])
    assert "differ in nothing but their seed" in only._repr_mimebundle_()["text/html"]


def test_metrics_can_be_chosen_and_an_unknown_one_is_refused(folders: list[Path]) -> None:
    chosen = compare_runs(folders, metrics=["perf/step_time"])
    assert chosen.metrics == (REWARD, "eval/tiny:addition", "perf/step_time")
    with pytest.raises(RunError, match="Did you mean 'train/grad_norm'"):
        compare_runs(folders, metrics=["train/grad_nrm"])


class Page(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_has_curves_differences_and_samples_and_needs_nothing_else(
    compared: RunComparison, tmp_path: Path
) -> None:
    text = compared.save(tmp_path / "page.html").read_text("utf-8")
    tags = Page(text).tags
    kinds = {kind for kind, _ in tags}
    assert text.startswith("<!DOCTYPE html>")
    assert kinds.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "a", "base"})
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert not {"href", "src", "action"} & {name for _, attributes in tags for name in attributes}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "default-src 'none'" in text
    assert sum(kind == "svg" for kind, _ in tags) == len(compared.metrics) + 2, "and two pens"
    for words in ("Curves", "Differences", "Samples", "training.learning_rate", "answer: 52"):
        assert words in text
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_what_a_model_wrote_is_text_and_nothing_else(compared: RunComparison) -> None:
    shown = compared._repr_mimebundle_()
    assert "&lt;script src=//evil&gt;" in shown["text/html"]
    assert "<script" not in shown["text/html"]
    assert "<img" not in shown["text/html"]
    assert "\u202e" not in shown["text/html"] + shown["text/plain"]
    assert "lr 0.0001" in shown["text/plain"]


def test_a_curve_is_told_by_number_and_dashes_and_not_only_by_colour(
    compared: RunComparison,
) -> None:
    html = compared._repr_mimebundle_()["text/html"]
    lines = {tuple(re.findall(r'stroke(?:-dasharray)?="([^"]+)"', line))
             for line in re.findall(r'<path d="M1 7H35"[^>]+>', html)}  # fmt: skip
    assert lines == {("var(--kv-s1)",), ("var(--kv-s2)", "7 3")}
    assert html.count(">2</text>") >= len(compared.metrics)


def test_the_command_prints_the_table_and_writes_the_page(
    folders: list[Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    code, output = kit("compare", "last", "000000", "--in", folders[0].parent, "--out", page)
    assert code == 0, output
    assert "2 runs of lesson side by side" in output
    assert page.stat().st_size > 10_000
    code, output = kit("compare", "lst", "--in", folders[0].parent)
    assert code == 2
    assert "There is no run 'lst'" in output
    assert kit("compare", "last", "--in", folders[0].parent, "--out", tmp_path / "page.png")[0] == 2


def test_what_cannot_be_compared_is_refused(folders: list[Path]) -> None:
    with pytest.raises(DataError, match="or the folders of runs"):
        package.compare(folders[0], Rollout([Sample(prompt="a")]))  # type: ignore[call-overload]
    with pytest.raises(DataError, match="nothing"):
        package.compare()


def test_runs_that_differ_only_in_what_no_update_feels_are_said_to_compute_the_same(
    tmp_path: Path,
) -> None:
    def run(number: int, estimator: str, **settings: object) -> Path:
        folder = make_run(tmp_path, number)
        config = SessionConfig.load(folder / "config.yaml")
        for name, value in {"advantage_estimator": estimator, **settings}.items():
            config = config.replace(f"training.{name}", value)
        config.dump(folder / "config.yaml")
        parameters = {"estimator": estimator, "steps": 12, "seed": 0}
        (folder / "params.yaml").write_text(yaml.safe_dump(parameters))
        return folder

    same = [run(1, "grpo"), run(2, "cispo"), run(3, "rloo"), run(4, "gspo", eps_clip=0.1)]
    (first, second, third) = (n for n in compare_runs(same).notes if "compute the same" in n)
    assert "estimator grpo" in first
    assert "estimator cispo" in first
    assert "rloo" not in first + second + third
    assert "training.global_batch_size" in first
    steps = {"global_batch_size": 64}
    two = [run(5, "grpo", **steps), run(6, "cispo", **steps)]
    assert not any("compute the same" in note for note in compare_runs(two).notes)
