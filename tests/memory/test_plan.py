"""A plan fits, obeys, and where it cannot, says what would make it fit."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import SessionConfig
from kit.errors import ConfigError
from kit.memory import Card, MemoryPlan, ModelShape, make_plan
from kit.memory.plan import LEVELS, memory_plan
from kit.models.adapters import AdapterShape
from kit.tiny import MODEL_DIR
from kit.utils.hardware import GIB
from tests.small_models import hollow

QWEN3_0_6B = ModelShape(
    parameters=596_049_920, layers=28, hidden=1024, intermediate=3072, heads=16, key_value_heads=8,
    head_size=128, vocabulary=151_936, tied=True,
)  # fmt: skip
QWEN3_4B = ModelShape(
    parameters=4_022_468_096, layers=36, hidden=2560, intermediate=9728, heads=32,
    key_value_heads=8, head_size=128, vocabulary=151_936, tied=True,
)  # fmt: skip
TINY = ModelShape.read(MODEL_DIR)
CONTEXT_LENGTH = 40_960


def plan(
    gib: float,
    config: SessionConfig | None = None,
    *,
    shape: ModelShape = QWEN3_0_6B,
    response: int = 1024,
    gpu: bool = True,
    adapters: AdapterShape | None = None,
    draft: ModelShape | None = None,
) -> MemoryPlan:
    return make_plan(
        config or SessionConfig(),
        shape,
        Card("a card", int(gib * GIB), gpu),
        max_response_len=response,
        context_length=CONTEXT_LENGTH,
        width=2 if gpu else 4,
        adapters=adapters,
        draft=draft,
    )


def with_settings(**sections: dict[str, Any]) -> SessionConfig:
    return SessionConfig(**sections)


@st.composite
def configurations(draw: st.DrawFn) -> SessionConfig:
    """Settings that a plan depends on, given or left open."""
    maybe = st.none()
    return SessionConfig(
        training={
            "rollout_batch_size": draw(st.integers(1, 64)),
            "n_samples_per_prompt": draw(st.integers(2, 32)),
            "kl_loss_coef": draw(st.sampled_from([0.0, 0.01])),
            "advantage_estimator": draw(st.sampled_from(["grpo", "ppo"])),
            "max_tokens_per_gpu": draw(maybe | st.integers(64, 65_536)),
            "optimizer_cpu_offload": draw(maybe | st.booleans()),
        },
        model={
            "gradient_checkpointing": draw(
                maybe | st.sampled_from([True, False, "selective", "alternating"])
            ),
            "compile": draw(maybe | st.booleans()),
        },
        engine={"max_total_tokens": draw(maybe | st.integers(512, 1_000_000))},
        memory={
            "sleep": draw(st.sampled_from(["auto", "never", "always"])),
            "device_gib": draw(maybe | st.floats(4, 100)),
        },
    )


def named_settings(message: str) -> list[str]:
    return re.findall(r"\b((?:model|memory|engine|training|rollout)\.[a-z_]+)", message)


def follow(advice: str, config: SessionConfig, response: int) -> tuple[SessionConfig, int]:
    """The settings after somebody did what one piece of advice says."""
    for words in advice.split(", and "):
        if found := re.match(r"leave (\S+) open", words):
            config = config.replace(found[1], None)
        elif found := re.match(r"set (\S+): (\S+)", words):
            value: Any = {"true": True}.get(found[2], found[2])
            if found[1] == "rollout.max_response_len":
                response = int(value)
            else:
                config = config.replace(found[1], value)
        else:
            raise AssertionError(f"nobody can follow {words!r}")
    return config, response


@given(
    configurations(), st.floats(2, 160), st.integers(1, 32_768),
    st.sampled_from([QWEN3_0_6B, QWEN3_4B, TINY]), st.booleans(),
)  # fmt: skip
def test_a_plan_fits_or_says_which_settings_would_make_it(
    config: SessionConfig, gib: float, response: int, shape: ModelShape, gpu: bool
) -> None:
    try:
        made = plan(gib, config, shape=shape, response=response, gpu=gpu)
    except ConfigError as error:
        refused = error
    else:
        fits(made, gpu=gpu)
        obeys(made, config, gpu=gpu)
        return
    assert re.search(r"needs [\d.,]+ [GM]iB|[\d.,]+ [GM]iB are left", refused.what)
    for name in named_settings(str(refused)):
        section, key = name.split(".")
        assert key in type(getattr(config, section)).model_fields
    *advice, last = refused.fix.split(", or ")
    assert "model.name" in last
    for words in advice:
        changed, shorter = follow(words, config, response)
        fits(plan(gib, changed, shape=shape, response=shorter, gpu=gpu), gpu=gpu)


def fits(made: MemoryPlan, *, gpu: bool) -> None:
    """Every phase stays under the limit, with room for one sample at least."""
    assert all(size >= 0 for phase in made.phases for _, size in phase.parts)
    assert all(phase.total <= made.limit for phase in made.phases)
    assert made.limit <= made.card.total or not gpu
    assert made.trainer_limit > 0 or not gpu  # a process on the CPU is given no limit


def obeys(made: MemoryPlan, config: SessionConfig, *, gpu: bool) -> None:
    """What is given is kept."""
    training, sleeps = config.training, made.kv_sleeps or made.trainer_sleeps
    if training.max_tokens_per_gpu:
        assert made.max_tokens_per_gpu == training.max_tokens_per_gpu
    if config.engine.max_total_tokens:
        assert made.kv_tokens == config.engine.max_total_tokens
    else:
        assert made.samples_at_once >= 1
    if (level := config.model.gradient_checkpointing) is not None:
        assert made.recompute == {False: "none", True: "full"}.get(level, level)  # type: ignore[call-overload]
    if config.model.compile is not None:
        assert made.compile == config.model.compile
    if not gpu:
        assert (sleeps, made.optimizer_cpu_offload) == (False, False)
        return
    if training.optimizer_cpu_offload is not None:
        assert made.optimizer_cpu_offload == training.optimizer_cpu_offload
    if config.memory.sleep == "never":
        assert not sleeps
    if config.memory.sleep == "always":
        assert made.kv_sleeps
        assert made.engine_weights_sleep
        assert made.trainer_sleeps


@pytest.mark.parametrize("shape", [QWEN3_0_6B, QWEN3_4B, TINY], ids=["0.6B", "4B", "tiny"])
@pytest.mark.parametrize("response", [64, 1024, 8192])
def test_a_larger_card_trains_no_slower_and_sleeps_no_more(
    shape: ModelShape, response: int
) -> None:
    made = []
    for gib in range(2, 200, 2):
        try:
            made.append(plan(gib, shape=shape, response=response))
        except ConfigError:
            assert not made, "what fits a smaller card fits a larger one"
    assert made
    for smaller, larger in pairwise(made):
        assert way(larger) <= way(smaller)
        if way(larger) != way(smaller):
            continue  # what it gains, it trains faster with
        assert smaller.kv_sleeps >= larger.kv_sleeps
        assert smaller.engine_weights_sleep >= larger.engine_weights_sleep
        assert smaller.trainer_sleeps >= larger.trainer_sleeps
        if smaller.trainer_sleeps == larger.trainer_sleeps:
            assert smaller.kv_tokens <= larger.kv_tokens
        else:
            assert 2 * larger.kv_tokens >= larger.rollout_tokens


def way(made: MemoryPlan) -> tuple[bool, int, int]:
    """How slowly it trains."""
    return made.optimizer_cpu_offload, LEVELS.index(made.recompute), -made.max_tokens_per_gpu


def test_qwen3_0_6b_trains_on_24_gib_with_its_optimizer_on_the_card() -> None:
    made = plan(24)
    assert not made.optimizer_cpu_offload
    assert made.compile
    assert made.samples_at_once >= 32
    assert all(phase.total <= 24 * GIB for phase in made.phases)


def test_nothing_sleeps_on_a_large_card() -> None:
    made = plan(80)
    assert {made.kv_sleeps, made.engine_weights_sleep, made.trainer_sleeps} == {False}
    assert made.kv_tokens == made.rollout_tokens


def test_engines_side_by_side_on_one_card_are_all_counted() -> None:
    one, two = plan(80), plan(80, with_settings(engine={"replicas": 2}))
    assert 2 * two.kv_tokens == one.kv_tokens  # each has its share of the rollout
    for name in ("engine: weights", "engine: process", "engine: graphs, workspace"):
        assert part(two, name) == 2 * part(one, name)
    assert part(two, "engine: KV cache") == part(one, "engine: KV cache")
    apart = with_settings(training={"num_trainers": 2}, engine={"replicas": 2})
    assert part(plan(80, apart), "engine: weights") == part(one, "engine: weights")


def part(made: MemoryPlan, name: str) -> int:
    """Of the phase in which the engine writes."""
    return dict(made.phases[0].parts)[name]


def test_less_may_be_taken_than_the_card_has() -> None:
    given = plan(80, with_settings(memory={"device_gib": 24}))
    assert replace(given, card=plan(24).card) == plan(24)


def test_a_micro_batch_smaller_than_one_sample_stays_as_it_was_given() -> None:
    made = plan(24, with_settings(training={"max_tokens_per_gpu": 256}))
    assert made.max_tokens_per_gpu == 256


def test_a_card_that_is_too_small_is_refused_with_the_number_and_nothing_useless() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(6)
    message = str(caught.value)
    assert "of the 6.0 GiB" in message
    assert "596 M parameters" in message
    assert "max_response_len" not in message, "shorter responses would not make it fit"


RANK_16 = AdapterShape(
    252, 33_030_144, largest=2560 * 9728, beside=3_633_315_840, linear=3_633_315_840
)
"""Adapters of every linear layer of the larger model."""


def test_adapters_need_neither_moments_nor_float32_of_the_weights_beside_them() -> None:
    reference = {"kl_loss_coef": 0.01}
    made = plan(80, shape=QWEN3_4B, adapters=RANK_16)
    assert part(made, "trainer: frozen weights") == 2 * QWEN3_4B.parameters
    assert part(made, "trainer: adapters, optimizer") == 12 * RANK_16.parameters
    # The reference is the same weights, the critic has its own.
    with_reference = plan(80, with_settings(training=reference), shape=QWEN3_4B, adapters=RANK_16)
    assert with_reference.phases == made.phases
    ppo = with_settings(training={"advantage_estimator": "ppo"})
    doubled = plan(80, ppo, shape=QWEN3_4B, adapters=RANK_16)
    assert part(doubled, "trainer: frozen weights") == 4 * QWEN3_4B.parameters
    assert part(doubled, "trainer: adapters, optimizer") == 24 * RANK_16.parameters
    with pytest.raises(ConfigError, match=r"4,022 M parameters, with .* of 33\.0 M parameters"):
        plan(10, shape=QWEN3_4B, adapters=RANK_16)


def test_a_frozen_output_layer_takes_no_memory_for_its_gradient() -> None:
    whole = replace(RANK_16, trains_head=True)
    frozen, trained = (plan(140, shape=QWEN3_4B, adapters=each) for each in (RANK_16, whole))
    name = "trainer: activations, logits"
    sizes = [dict(made.phase("update").parts)[name] for made in (trained, frozen)]
    assert sizes[0] - sizes[1] == 4 * QWEN3_4B.vocabulary * QWEN3_4B.hidden


def test_adapters_beside_the_engines_weights_are_counted_there_and_merge_nothing() -> None:
    made = plan(80, with_settings(engine={"max_loras_per_batch": 3}), shape=QWEN3_4B)
    assert "engine: adapters" not in dict(made.phases[0].parts)
    settings = {"lora": "adapter", "max_loras_per_batch": 3}
    config = with_settings(engine=settings, model={"name": "tiny", "lora": {"r": 16}})
    beside = plan(80, config, shape=QWEN3_4B, adapters=RANK_16)
    # Twice: as they came, and in their slots.
    assert part(beside, "engine: adapters") == 2 * 3 * 2 * RANK_16.parameters
    merged = plan(80, shape=QWEN3_4B, adapters=RANK_16)
    name = "trainer: a weight and its adapter"
    sums = [dict(each.phase("sync").parts)[name] for each in (beside, merged)]
    assert sums == [0, 6 * RANK_16.largest + 20 * 2**22]
    buckets = "trainer: buckets of weights"
    # Where the engine's weights sleep, a sync brings them too.
    for gib, sleeps in ((24, True), (400, False)):
        each = plan(gib, config, shape=QWEN3_4B, adapters=RANK_16)
        assert each.engine_weights_sleep == sleeps
        embeddings = 2 * QWEN3_4B.vocabulary * QWEN3_4B.hidden
        both = config.engine.update_weight_buffer_size + embeddings  # which are larger
        sent = both if sleeps else 2 * RANK_16.parameters
        assert dict(each.phase("sync").parts)[buckets] == sent


@pytest.mark.parametrize("gib", [14, 16, 18])
def test_where_weights_of_both_sides_do_not_fit_beside_each_other_a_sync_is_refused(
    gib: int,
) -> None:
    with pytest.raises(ConfigError, match=r"weight sync does not fit: .* need 18"):
        plan(gib, shape=QWEN3_4B, adapters=RANK_16)


def in_4_bits(**sections: dict[str, Any]) -> SessionConfig:
    lora = {"r": 16, "load_in_4bit": True}
    return SessionConfig(model={"name": "tiny", "lora": lora}, **sections)


def test_weights_in_4_bits_are_counted_as_such_and_whole_on_each_of_several_ranks() -> None:
    made = plan(80, in_4_bits(), shape=QWEN3_4B, adapters=RANK_16)
    four = part(made, "trainer: frozen weights in 4 bits")
    assert four == pytest.approx(RANK_16.linear * 4.127 / 8, rel=1e-3)
    rest = QWEN3_4B.parameters - RANK_16.linear
    assert part(made, "trainer: frozen weights") == 2 * rest
    two = plan(80, in_4_bits(training={"num_trainers": 2}), shape=QWEN3_4B, adapters=RANK_16)
    assert part(two, "trainer: frozen weights in 4 bits") == four
    assert part(two, "trainer: frozen weights") == rest
    assert not two.optimizer_cpu_offload
    plain = plan(80, shape=QWEN3_4B, adapters=RANK_16)
    working = [
        dict(each.phase("update").parts)["trainer: gradients, weights to compute with"]
        for each in (made, plain)
    ]
    assert working[0] - working[1] == 2 * RANK_16.largest  # one weight at a time


def test_a_card_for_which_bfloat16_is_too_much_is_told_of_4_bits() -> None:
    config = in_4_bits().replace("model.lora.load_in_4bit", False)
    with pytest.raises(ConfigError, match=r"set model\.lora\.load_in_4bit: true"):
        plan(16, config, shape=QWEN3_4B, adapters=RANK_16)
    made = plan(16, in_4_bits(), shape=QWEN3_4B, adapters=RANK_16)
    fits(made, gpu=True)
    assert made.samples_at_once >= 16


def test_bits_that_are_the_engines_need_the_sums_of_weights_and_adapters() -> None:
    exact = with_settings(training={"true_on_policy": True})
    name = "trainer: gradients, weights to compute with"
    sums = [
        dict(plan(140, config, shape=QWEN3_4B, adapters=RANK_16).phase("update").parts)[name]
        for config in (exact, SessionConfig())
    ]
    assert sums[0] - sums[1] == 2 * RANK_16.beside


@pytest.mark.parametrize("gib", [22, 24, 32, 48, 80, 140])
def test_with_adapters_a_sync_fits_too(gib: int) -> None:
    made = plan(gib, shape=QWEN3_4B, adapters=RANK_16)
    fits(made, gpu=True)
    assert all(phase.total <= made.usable for phase in made.phases)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ("0.6b", (1024, 3072, 28, 16)),
        ("1.7b", (2048, 6144, 28, 16)),
        ("4b", (2560, 9728, 36, 32)),
    ],
)
def test_presets_with_adapters_fit_a_card_of_24_gib(
    size: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    preset = SessionConfig.preset(f"qwen3-{size}-lora")
    assert preset.model.name.lower() == f"qwen/qwen3-{size}"
    config = preset.replace("model.name", str(hollow(tmp_path / size, *shape)))
    made = memory_plan(config, device_gib=24)
    fits(made, gpu=True)
    assert made.samples_at_once >= 32
    assert made.max_tokens_per_gpu >= 4096
    assert not made.optimizer_cpu_offload


def test_a_limit_that_is_too_low_is_told_the_one_that_is_enough() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(80, with_settings(memory={"device_gib": 6}))
    found = re.search(r"set memory\.device_gib: (\d+)", str(caught.value))
    assert found
    plan(80, with_settings(memory={"device_gib": int(found[1])}))
    with pytest.raises(ConfigError):
        plan(80, with_settings(memory={"device_gib": int(found[1]) - 1}))


def test_responses_that_are_too_long_are_told_the_length_that_fits() -> None:
    config = with_settings(model={"gradient_checkpointing": False})
    with pytest.raises(ConfigError) as caught:
        plan(24, config, response=32_768)
    found = re.search(r"set rollout\.max_response_len: (\d+)", str(caught.value))
    assert found
    assert plan(24, config, response=int(found[1])).samples_at_once >= 1
    with pytest.raises(ConfigError):
        plan(24, config, response=int(found[1]) + 64)


def test_several_settings_that_must_give_way_together_are_named_together() -> None:
    config = with_settings(
        model={"gradient_checkpointing": False},
        training={"optimizer_cpu_offload": False, "max_tokens_per_gpu": 65_536},
    )
    with pytest.raises(ConfigError) as caught:
        plan(12, config)
    advice, last = caught.value.fix.split(", or ")
    assert advice.count(", and ") == 2
    assert "model.name" in last
    changed, response = follow(advice, config, 1024)
    plan(12, changed, response=response)


def test_measured_memory_stands_beside_the_phase_it_is_of() -> None:
    seen = plan(24).with_measured({"update": 20 * GIB})
    assert [phase.measured for phase in seen.phases] == [None, 20 * GIB, None]


def test_an_engine_with_quantised_weights_takes_the_bytes_of_codes_and_scales() -> None:
    from kit.models.low_precision import is_quantized, scheme_of
    from kit.models.source import stored_shapes

    def weights(**engine: Any) -> int:
        config = SessionConfig(engine=engine)
        made = plan(8, config, shape=TINY, gpu=False)
        return dict(made.phase("generate").parts)["engine: weights"]

    for how in ({"method": "fp8"}, {"method": "int4", "group_size": 64}):
        config = SessionConfig(engine={"quantization": how}).quantization
        assert config is not None
        scheme, expected = scheme_of(config), 0
        for name, shape in stored_shapes(MODEL_DIR).items():
            if is_quantized(name):
                scales = scheme.scales_shape(*shape)
                size = scheme.scales_dtype.itemsize
                expected += shape[0] * shape[1] + scales[0] * scales[1] * size
            else:
                expected += 4 * shape[0] * (shape[1] if shape[1:] else 1)
        assert weights(quantization=how) == pytest.approx(expected, rel=2e-3)
    assert weights() > 3 * weights(quantization="fp8")


def test_on_a_gpu_fp8_halves_the_engines_layers_and_the_trainer_holds_codes_and_reads_one_weight(
) -> None:  # fmt: skip
    plain, both = (
        plan(80, with_settings(model={"quantization": how}, engine={"max_total_tokens": 100_000}))
        for how in (None, "fp8")
    )
    parts = [
        {name: size for phase in p.phases for name, size in phase.parts} for p in (plain, both)
    ]
    saved = parts[0]["engine: weights"] - parts[1]["engine: weights"]
    assert 0.3 < saved / parts[0]["engine: weights"] < 0.5
    name = "trainer: gradients, weights to compute with"
    numbers = 28 * 15_728_640
    codes = numbers + 4 * numbers // 128**2
    assert parts[1][name] - parts[0][name] == codes + 2 * 2 * 1024 * 3072
    int4 = plan(80, with_settings(model={"quantization": "int4"}))
    needed = dict(part for phase in int4.phases for part in phase.parts)[name]
    assert needed - parts[0][name] == 2 * numbers


def test_a_cache_in_fp8_takes_half_of_one_in_bfloat16() -> None:
    limit = {"max_total_tokens": 100_000}
    wide, narrow = (
        plan(80, with_settings(engine=limit | {"kv_cache_dtype": dtype}))
        for dtype in ("auto", "fp8_e4m3")
    )
    name = "engine: KV cache"
    assert dict(wide.phases[0].parts)[name] == 2 * dict(narrow.phases[0].parts)[name]


def test_a_draft_has_weights_a_cache_graphs_and_where_it_learns_an_optimizer() -> None:
    draft = replace(QWEN3_0_6B, parameters=187_042_816, layers=2)
    own = {"algorithm": "standalone", "draft_model": "draft", "num_steps": 3}
    engine = {"speculative": own, "max_total_tokens": 100_000, "max_running_requests": 64}
    plain = plan(80, with_settings(engine={**engine, "speculative": None})).phase("generate")
    frozen = plan(80, with_settings(engine=engine), draft=draft).phase("generate")
    learns = with_settings(engine=engine, training={"draft": {"learning_rate": 1e-4}})
    trained = plan(80, learns, draft=draft).phase("generate")
    before, after, with_optimizer = dict(plain.parts), dict(frozen.parts), dict(trained.parts)

    assert after["engine: draft"] == 2 * draft.parameters
    cache = 100_000 * 2 * 2 * 8 * 128 * 2  # keys and values of two layers
    assert after["engine: KV cache"] - before["engine: KV cache"] == cache
    # 64 requests of 4 tokens: logits, probabilities and what they are drawn by.
    graphs = after["engine: graphs, workspace"] - before["engine: graphs, workspace"]
    assert graphs > 64 * 4 * 4 * 4 * QWEN3_0_6B.vocabulary
    assert "trainer: draft, optimizer" not in after
    assert with_optimizer["trainer: draft, optimizer"] == 12 * draft.parameters
    left, learned = (
        plan(80, each, draft=draft).phase("update").total
        for each in (with_settings(engine=engine), learns)
    )
    assert learned - left == (12 + 4 + 3 * 2) * draft.parameters


def test_a_draft_that_learns_from_distributions_keeps_the_policys_output_and_its_head() -> None:
    own = {"algorithm": "standalone", "draft_model": "draft", "num_steps": 3}
    engine = {"speculative": own, "max_total_tokens": 100_000, "max_running_requests": 64}
    small = replace(QWEN3_0_6B, parameters=187_042_816, layers=2)

    def update(loss: str, draft: ModelShape, tokens: int) -> int:
        training = {"draft": {"loss": loss}, "max_tokens_per_gpu": tokens}
        settings = with_settings(engine=engine, training=training)
        return plan(80, settings, draft=draft).phase("update").total

    # Beside a small draft's pass the policy's is the larger one: only its output is kept longer.
    more = update("forward_kl", small, 16_384) - update("cross_entropy", small, 16_384)
    assert more == 2 * 16_384 * QWEN3_0_6B.hidden
    # A draft as large as the policy has a pass as large, with the policy's output embedding.
    head = 2 * QWEN3_0_6B.vocabulary * QWEN3_0_6B.hidden
    large = update("forward_kl", QWEN3_0_6B, 16_384) - update("cross_entropy", QWEN3_0_6B, 16_384)
    assert large == more + head


def test_a_head_that_learns_keeps_what_it_reads_of_the_policys_pass() -> None:
    shape = replace(QWEN3_0_6B, parameters=15_000_000, layers=1)

    def update(algorithm: str, tokens: int) -> int:
        own = {"algorithm": algorithm, "draft_model": "draft", "num_steps": 3}
        engine = {"speculative": own, "max_total_tokens": 100_000, "max_running_requests": 64}
        training = {"draft": {}, "max_tokens_per_gpu": tokens}
        settings = with_settings(engine=engine, training=training)
        return plan(80, settings, draft=shape).phase("update").total

    more = update("eagle", 16_384) - update("standalone", 16_384)
    assert more == 2 * 2 * 16_384 * QWEN3_0_6B.hidden  # hidden states and embeddings
    more = update("eagle3", 16_384) - update("standalone", 16_384)
    assert more == 5 * 2 * 16_384 * QWEN3_0_6B.hidden  # and the outputs of three layers


def test_moments_in_8_bits_are_a_quarter_and_never_stepped_in_host_memory() -> None:
    eight = with_settings(training={"optimizer": "adamw8bit"})
    kept = [
        dict(plan(141, how, shape=QWEN3_4B).phases[0].parts)["trainer: weights, optimizer"]
        for how in (SessionConfig(), eight)
    ]
    numbers = QWEN3_4B.parameters
    assert kept == [12 * numbers, int((4 + 2 * (1 + 4 / 256)) * numbers)]
    assert plan(24).optimizer_cpu_offload is False
    assert plan(14).optimizer_cpu_offload is True
    with pytest.raises(ConfigError, match=r"set training\.optimizer: adamw \(which may step"):
        plan(12, eight)
