"""Adapters of the engine's own, beside its weights, on the real stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kit import RLSession, SessionConfig
from kit.engine.adapters import AdapterSettings
from kit.errors import ConfigError
from tests.conftest import Shared
from tests.trainer.test_lora import RANK_4
from tests.trainer.trainers import Make, backend, make

__all__ = ["make"]  # a fixture
CONFIG = SessionConfig.preset("tiny-lora").replace("engine.lora", "adapter")
CONFIG = CONFIG.replace("engine.call_timeout", 200.0)  # of what waits for an adapter for ever


def with_settings(**settings: Any) -> SessionConfig:
    config = CONFIG
    for name, value in settings.items():
        config = config.replace(name.replace("__", "."), value)
    return config


@pytest.fixture(scope="module")
def running(shared: Shared) -> Iterator[RLSession]:
    """A session whose engine has adapters, on a stack of its own."""
    shared.at(seed=0).close(keep_warm=True)
    with RLSession.start(CONFIG.replace("name", "adapters-beside")) as session:
        session.snapshot("first")
        yield session


@pytest.fixture
def beside(running: RLSession) -> RLSession:
    """It in its first moment."""
    running.restore("first")
    return running


def greedy(session: RLSession) -> list[list[int]]:
    rollout = session.generate([f"{a}+{a + 3}=" for a in range(16)], temperature=1e-5)
    return [sample.tokens for sample in rollout]


def test_a_sync_sends_the_adapters_alone_and_both_sides_agree(beside: RLSession) -> None:
    assert beside.check().healthy
    beside.train(2, show=False)
    rollout = beside.generate()
    report = beside.check_mismatch(rollout, deep=True)
    assert report.verdict == "pass", report
    assert report.mean_abs_diff < 1e-5
    assert any(line.startswith("checksums of 66 parameters: 0 differ") for line in report.evidence)
    sent = beside.sync()
    assert sent.bytes < 400_000  # 84 thousand numbers in float32, and not the 3.6 MB of weights
    whole = beside.sync(verify=True)
    assert whole.verified == 66
    assert whole.bytes > 3_600_000
    assert whole.merge_error is None
    again = beside.check_mismatch(beside.generate())
    assert again.verdict == "pass"


def test_an_adapter_that_is_not_the_trainers_is_named_as_the_cause(beside: RLSession) -> None:
    beside.step()
    beside.step()
    rollout = beside.generate()
    # What a lost hand-over would leave: the trainer goes back, and nobody tells the engine.
    stack = beside.debug.stack
    stack.restore(stack.trainers.ask("status")[0].snapshots[0])
    report = beside.check_mismatch(rollout)
    assert report.verdict == "fail"
    assert report.cause_kind == "adapter", report
    assert "session.sync()" in report.cause
    beside.sync()
    assert beside.check_mismatch(beside.generate()).verdict == "pass"


def test_requests_stopped_before_they_were_begun_hold_no_version_of_the_adapter(
    beside: RLSession,
) -> None:
    stack, sampling = beside.debug.stack, beside.debug.sampler.sampling()
    for _ in range(10):  # until the stop comes in time
        with beside.debug.turn():
            stream = stack.generate([[5, 6, 7]] * 1000, sampling, [*range(1000)])
            stream.stop()
            written = [generation for part in stream for _, generation in part]
        if any(not generation.tokens for generation in written):
            break
    else:
        pytest.fail("all requests had been begun")
    for _ in range(3):  # the second waits until the version that those had asked for is forgotten
        beside.step()
    assert beside.check_mismatch(beside.generate()).verdict == "pass"


def test_an_engine_that_died_gets_weights_and_adapter_again(beside: RLSession) -> None:
    import os
    import signal

    beside.step()
    before = greedy(beside)
    stack = beside.debug.stack
    os.kill(stack.engines.ask("processes")[0][1], signal.SIGKILL)
    assert greedy(beside) == before
    assert beside.check_mismatch(beside.generate()).verdict == "pass"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__lora": None}, "there are no adapters"),
        ({"training__true_on_policy": True}, "one sum of weight and adapter"),
        ({"engine__weight_noise": 0.1}, "now none travel"),
        ({"engine__tensor_parallel": 2}, "engines of one device"),
        ({"cluster__colocate": False}, "by broadcast"),
        ({"model__lora__modules_to_save": ["norm"]}, "which an adapter cannot carry"),
    ],
)
def test_what_an_engine_cannot_have_beside_its_weights_is_refused(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        with_settings(**settings)
    assert "engine.lora: merged" in str(caught.value)


def test_layers_without_adapter_in_one_product_with_some_that_have_one_get_zeros(
    make: Make,
) -> None:
    trainer = make(lora=RANK_4.model_copy(update={"target_modules": ("v_proj", "up_proj")}))
    sent: dict[str, Any] = {}
    for name, value in backend(trainer).named_adapters():
        sent |= dict(backend(trainer).adapter_as_sent(name, value.detach()))
    first = {name: value for name, value in sent.items() if "layers.0." in name}
    layers = {name.split(".")[-3] for name in first}
    assert layers == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert AdapterSettings.of(4, 2.0, ["v_proj", "up_proj"], 1).target_modules == tuple(
        sorted(layers)
    )
    for name, value in first.items():
        has_one = "v_proj" in name or "up_proj" in name
        assert value.any() == (has_one and ".lora_A." in name), name  # B begins at zero
    model = backend(trainer).policy.model
    for name, value in first.items():
        linear: Any = model.get_submodule(name.rpartition(".lora_")[0])
        rows = linear.in_features if ".lora_A." in name else linear.out_features
        assert rows in value.shape
