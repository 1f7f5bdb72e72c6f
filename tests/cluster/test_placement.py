"""Who has which device, and what cannot be."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from kit import SessionConfig
from kit.cluster.client import actors_environment
from kit.cluster.placement import Layout
from kit.errors import ConfigError
from kit.memory import Card, MemoryPlan, ModelShape, make_plan
from kit.utils.hardware import GIB

QWEN = ModelShape(596_049_920, 28, 1024, 3072, 16, 8, 128, 151_936, True)


def layout(device: str = "cuda", **settings: object) -> Layout:
    config = SessionConfig()
    for key, value in settings.items():
        config = config.replace(key.replace("__", "."), value)
    return Layout.of(config, device, 1 << 30)


def test_colocated_each_engine_is_fed_by_the_rank_on_its_own_gpu() -> None:
    found = layout(training__num_trainers=2)
    assert (found.trainers, found.engines) == ((0, 1), ((0,), (1,)))
    assert [found.source_ranks(i) for i in range(2)] == [[0], [1]]
    assert found.count == 2


def test_a_tensor_parallel_engine_is_fed_by_the_ranks_on_all_of_its_gpus() -> None:
    found = layout(training__num_trainers=4, engine__tensor_parallel=2)
    assert found.engines == ((0, 1), (2, 3))
    assert found.source_ranks(1) == [2, 3]


def test_disaggregated_nobody_shares_a_gpu() -> None:
    found = layout(training__num_trainers=2, engine__replicas=2, cluster__colocate=False)
    assert (found.trainers, found.engines, found.count) == ((0, 1), ((2,), (3,)), 4)
    assert [found.feeds(rank) for rank in (0, 1)] == [True, False]


def test_one_trainer_and_two_engines_share_one_gpu_as_before() -> None:
    found = layout(engine__replicas=2)
    assert (found.engines, found.count, found.sharing(0)) == (((0,), (0,)), 1, 3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"training__num_trainers": 4, "engine__replicas": 3}, r"replicas x .* 4"),
        ({"engine__tensor_parallel": 2}, "colocate: false"),
        ({"engine__data_parallel": 2}, r"engine\.replicas: 2"),
        ({"engine__tensor_parallel": 4, "engine__data_parallel": 3}, "does not divide"),
        ({"engine__extra": {"tp_size": 2}}, r"engine\.tensor_parallel"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(
    settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        layout(**settings)


def test_tensor_parallel_is_refused_on_a_cpu_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="NCCL"):
        layout("cpu", engine__tensor_parallel=2)


def plan_of(**settings: object) -> MemoryPlan:
    config = SessionConfig(name="p", data={"source": "tiny:addition"})
    for key, value in settings.items():
        config = config.replace(key.replace("__", "."), value)
    card = Card("a card", 80 * GIB, is_gpu=True)
    return make_plan(config, QWEN, card, max_response_len=1024, context_length=32768, width=2)


def test_two_gpus_each_hold_half_of_weights_and_optimizer() -> None:
    one, two = (dict(plan_of(training__num_trainers=n).phase("update").parts) for n in (1, 2))
    part = "trainer: weights, optimizer"
    assert two[part] == one[part] // 2
    working = "trainer: gradients, weights to compute with"
    assert two[working] < one[working] / 2


def test_disaggregated_nothing_sleeps_and_the_fuller_device_counts() -> None:
    plan = plan_of(cluster__colocate=False)
    update = plan.phase("update")
    assert not plan.kv_sleeps
    assert not plan.trainer_sleeps
    assert update.total == max(update.of("engine"), update.of("trainer"))
    assert plan.trainer_limit > 70 * GIB


def test_trainers_have_the_nccl_that_sglang_sets_for_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks of one group that differ in it wait for each other for ever."""
    sets_for_itself = set(re.findall(r'environ\["(NCCL_\w+)"\] = ', _sglangs_own_settings()))
    sets_for_itself -= {"NCCL_GRAPH_MIXING_SUPPORT"}  # only for context-parallel decoding
    assert sets_for_itself
    for name in sets_for_itself:
        monkeypatch.delenv(name, raising=False)
    assert sets_for_itself <= {*actors_environment("cuda", "s", tmp_path)}
    for name in sets_for_itself:
        monkeypatch.setenv(name, "7")  # SGLang lets what is set stay
    assert {actors_environment("cuda", "s", tmp_path)[name] for name in sets_for_itself} == {"7"}


def _sglangs_own_settings() -> str:
    """The function's source; importing it takes ten seconds."""
    package = find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "srt" / "entrypoints" / "engine.py"
    source = file.read_text("utf-8")
    return next(
        ast.get_source_segment(source, node) or ""
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "_set_envs_and_config"
    )
