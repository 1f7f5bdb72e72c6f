"""Weights on their way to the engine, and who is awake for it, on the real stack."""

from __future__ import annotations

import threading

import pytest

from kit import RLSession
from kit.errors import StackError
from kit.messages import SamplingSettings


def test_a_skipped_sync_fails_the_check_and_is_named(session: RLSession) -> None:
    session.update(session.advantages(session.score(session.generate())))
    report = session.check_mismatch(session.generate())
    assert report.verdict == "fail"
    assert "Stale weights" in report.cause
    assert "session.sync()" in report.cause
    session.sync()
    assert session.check_mismatch(session.generate()).verdict == "pass"


def test_a_verified_sync_says_how_many_parameters_arrived(session: RLSession) -> None:
    report = session.sync(verify=True)
    assert report.verified is not None
    assert report.verified > 30
    assert "parameters verified by checksum" in str(report)
    assert session.sync().verified is None


def test_a_sync_that_did_not_arrive_is_an_error_that_names_a_parameter(session: RLSession) -> None:
    stack = session.debug.stack
    stack.sync(session.step_count)
    session.update(session.advantages(session.score(session.generate())))
    with pytest.raises(StackError, match=r"did not reach the engine: .*weight"):
        stack.verify_weights()
    session.sync(verify=True)


def test_both_sides_wake_for_what_comes_next(session: RLSession) -> None:
    offload = session.debug.stack.offload
    before = session.generate(["12+34="], temperature=0)[0]
    offload.sleep_trainer()
    offload.sleep_engine()
    assert offload.asleep == {"kv_cache", "cuda_graph", "weights"}
    assert session.generate(["12+34="], temperature=0)[0].tokens == before.tokens
    assert not offload.asleep
    offload.sleep_trainer()
    report = session.update(session.advantages(session.score(session.generate())))
    assert report.applied
    assert not offload.trainer_asleep
    offload.sleep_engine()
    session.sync()
    assert offload.asleep == {"kv_cache", "cuda_graph"}  # until something is generated
    assert session.check_mismatch(session.generate()).verdict == "pass"


def test_an_engine_takes_a_call_again_that_has_moved_it(session: RLSession) -> None:
    stack = session.debug.stack  # where one engine dies, the others are asked once more
    for method in ("sleep", "sleep", "wake", "wake"):
        stack.engines.ask(method, ["kv_cache"])
    assert len(session.generate(["1+1="])) == 8


@pytest.mark.slow
def test_an_engine_that_let_go_of_its_weights_wakes_with_the_present_ones(
    session: RLSession,
) -> None:
    session.update(session.advantages(session.score(session.generate())))
    assert (session.engine_version, session.step_count) == (0, 1)
    session.debug.stack.offload.sleep_engine()
    assert {v for s in session.generate() for v in s.weight_versions} == {1}
    assert session.engine_version == 1


@pytest.mark.slow
def test_a_sync_waits_for_what_is_being_written(session: RLSession) -> None:
    stack, written = session.debug.stack, []
    prompts = [[5, 40, 41, 2]] * 600
    sampling = SamplingSettings(temperature=1.0, max_new_tokens=60)

    def generate() -> None:
        for part in stack.generate(prompts, sampling, list(range(len(prompts)))):
            written.extend(part)

    thread = threading.Thread(target=generate)
    thread.start()
    session.sync(verify=True)
    session.sync()
    thread.join()
    assert len(written) == len(prompts)
    assert {answer.finish for _, answer in written} <= {"stop", "length"}


def test_a_sync_forgets_the_prefixes_that_old_weights_cached(session: RLSession) -> None:
    prompt = ["58+67="]
    session.generate(prompt, n_samples_per_prompt=8)
    session.train(3, show=False)
    again = session.generate(prompt, n_samples_per_prompt=8)
    assert session.check_mismatch(again).max_abs_diff < 5e-5
