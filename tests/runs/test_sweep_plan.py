"""What a sweep would run, and what it refuses before anything starts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.cluster.processes import cores
from kit.errors import RunError
from kit.runs.parameters import Parameter, read_parameters
from kit.runs.sweep.plan import as_text, notes, places, plan_sweep, split_values
from kit.runs.sweep.state import StopBelow, StopMedian
from kit.utils import hardware
from tests.runs.conftest import MakeNotebook

SEEDED = """\
lr: float = 1e-4
estimator: str = "grpo"
seed: int = 0
sizes: list = [1]
label: str | None = None
anything = None
"""


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1e-5,1e-4", ["1e-5", "1e-4"]),
        ("grpo, rloo ,gspo", ["grpo", "rloo", "gspo"]),
        ("60", ["60"]),
        ("", [""]),
        ("[1, 2],[4]", ["[1, 2]", "[4]"]),
        ('{"a": [1, 2]},{}', ['{"a": [1, 2]}', "{}"]),
        ("\"a, b\",'c'", ["a, b", "c"]),
        ("it's,fine", ["it's", "fine"]),
        ('["a, b", "]"],[c]', ['["a, b", "]"]', "[c]"]),
    ],
)
def test_commas_separate_values_but_not_inside_of_brackets_and_quotes(
    text: str, parts: list[str]
) -> None:
    assert split_values(text) == parts


@pytest.mark.parametrize("text", ["1,,2", ",1", "[1,2", '"a,b', "1,"])
def test_values_that_cannot_be_told_apart_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"missing|between"):
        split_values(text)


@given(st.lists(st.lists(st.integers() | st.text(max_size=4), max_size=3), min_size=1, max_size=4))
def test_lists_that_json_writes_stay_whole(values: list[list[object]]) -> None:
    texts = [json.dumps(value) for value in values]
    assert split_values(",".join(texts)) == texts


def test_the_grid_times_the_seeds_with_seeds_changing_fastest(make_notebook: MakeNotebook) -> None:
    path = make_notebook(parameters=SEEDED)
    given = [("lr", "1e-5"), ("estimator", "grpo,rloo"), ("lr", "1e-4"), ("label", "x")]
    plan = plan_sweep(path, given, seeds=2)
    assert list(plan.axes) == ["lr", "estimator", "seed"]
    assert plan.members()[:3] == [
        {"label": "x", "lr": 1e-5, "estimator": "grpo", "seed": 0},
        {"label": "x", "lr": 1e-5, "estimator": "grpo", "seed": 1},
        {"label": "x", "lr": 1e-5, "estimator": "rloo", "seed": 0},
    ]
    assert len(plan.members()) == 8


def test_from_python_a_list_is_several_values(make_notebook: MakeNotebook) -> None:
    path = make_notebook(parameters=SEEDED)
    plan = plan_sweep(path, {"sizes": [[1, 2], [3]], "lr": 0.5}, seeds=[7])
    assert plan.members() == [
        {"lr": 0.5, "sizes": [1, 2], "seed": 7},
        {"lr": 0.5, "sizes": [3], "seed": 7},
    ]


@pytest.mark.parametrize(
    ("given", "seeds", "message"),
    [
        ({"estimatr": "a,b"}, (), "Did you mean 'estimator'"),
        ({"lr": "1e-5,fast"}, (), "takes float"),
        ({"lr": "1e-4,0.0001"}, (), "twice"),
        ({"lr": []}, (), "no value"),
        ({"sizes": "1,2"}, (), "a list in brackets"),
        ({"lr": "1,,2"}, (), "between two commas"),
        ({"seed": "1,2"}, 2, "given twice"),
        ({}, 0, "--seeds is 0"),
        ({}, 10**15, "1,000,000,000,000,000 members"),
        ({}, [1, 1], "a seed twice"),
        ({"lr": [float(i) for i in range(40)]}, 40, "1,600 members"),
        ({name: list(range(500)) for name in ("lr", "anything")}, 400, "100,000,000 members"),
        ({"lr": "nan,1"}, (), "nan"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_way_out(
    make_notebook: MakeNotebook, given: dict[str, object], seeds: int | list[int], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        plan_sweep(make_notebook(parameters=SEEDED), given, seeds)


def test_seeds_go_to_sessions_where_the_notebook_has_no_parameter_for_them(
    make_notebook: MakeNotebook,
) -> None:
    with pytest.raises(RunError, match="would have no effect"):
        plan_sweep(make_notebook("1"), {}, 3)
    starts = make_notebook("from kit import RLSession\nRLSession.start('tiny')")
    assert plan_sweep(starts, {}, 2).members() == [{"seed": 0}, {"seed": 1}]


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 1e-05), ("sizes", [1, "a, b"]), ("label", None), ("label", "true"), ("anything", "7"),
     ("anything", 7), ("anything", {"a": None}), ("estimator", "a=b, c")],
)  # fmt: skip
def test_every_value_reaches_the_notebook_as_it_is(
    make_notebook: MakeNotebook, name: str, value: object
) -> None:
    parameter: Parameter = read_parameters(make_notebook(parameters=SEEDED))[name]
    assert parameter.convert(as_text(parameter, value)) == value


def test_a_cpu_has_as_many_places_as_cores_at_most_and_shares_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("KIT_CORES", "6")
    assert [place.words for place in places()] == ["2 cores"] * 3
    assert [place.settings["KIT_CORES"] for place in places(4)] == ["1"] * 4
    assert len({place.group for place in places(4)}) == 4
    with pytest.raises(RunError, match="6 or less"):
        places(7)
    with pytest.raises(RunError, match="--parallel is 0"):
        places(0)


def test_each_gpu_has_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f")
    found = places()
    assert [place.environment()["CUDA_VISIBLE_DEVICES"] for place in found] == ["2", "GPU-5f"]
    assert [place.words for place in places(1)] == ["GPU 2"]
    with pytest.raises(RunError, match="2 GPUs: a GPU has one session"):
        places(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert hardware.visible_gpus() == []


def test_a_session_is_told_how_many_cores_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIT_CORES", "1")
    assert cores() == 1
    monkeypatch.setenv("KIT_CORES", "many")
    assert cores() >= 1


def test_a_member_ends_when_its_reward_is_below_the_bound_at_that_step() -> None:
    rule = StopBelow.parse("0.3@2")
    assert rule.why([(0, 0.1), (1, 0.1)]) == ""
    assert rule.why([(0, 0.1), (1, 0.1), (2, 0.3), (3, 0.1)]) == ""
    assert rule.why([(0, 0.9), (2, 0.25)]) == "reward 0.250 at step 2, below 0.3"


@pytest.mark.parametrize("text", ["0.3", "@3", "0.3@", "a@b", "0.3@1.5"])
def test_a_bound_without_reward_or_step_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="REWARD@STEP"):
        StopBelow.parse(text)


def test_a_member_ends_below_the_median_of_the_others_at_the_same_step() -> None:
    rule = StopMedian(after=2)
    others = [[(s, r) for s in range(5)] for r in (0.2, 0.5, 0.6)]
    bad, good = [(0, 0.4), (1, 0.4), (2, 0.4)], [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert "below 0.500, the median of 3 others" in rule.why(bad, others)
    assert rule.why(good, others) == ""
    assert rule.why(bad[:2], others) == ""
    assert rule.why([], others) == ""
    assert rule.why(bad, others[:2]) == ""
    assert rule.why(bad, [*others[:2], others[2][:2]]) == "", "one of the others is not there yet"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"estimator": "grpo,cispo"}, "grpo, cispo"),
        ({"estimator": "rloo,gspo,ppo,cispo"}, "gspo, cispo"),
        ({"eps_clip": "0.1,0.2"}, "0.1, 0.2"),
        ({"estimator": "grpo,rloo"}, ""),
        ({"estimator": "grpo", "lr": "1e-4,1e-3"}, ""),
    ],
)
def test_members_that_would_compute_the_same_are_named_before_they_run(
    make_notebook: MakeNotebook, given: dict[str, str], named: str
) -> None:
    parameters = SEEDED + "eps_clip: float = 0.2\n"
    found = notes(plan_sweep(make_notebook(parameters=parameters), given))
    assert len(found) == bool(named)
    assert named in "".join(found)
    source = "config.replace('training.global_batch_size', 8)"
    handled = make_notebook(source, parameters=parameters)
    assert notes(plan_sweep(handled, given)) == []
