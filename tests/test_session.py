"""The verbs, on the real stack: Ray, SGLang and FSDP2 with the tiny model."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import Batch, RLSession, Rollout, Sample, Status
from kit.errors import DataError, KitError, RewardError, SessionError, StackError
from kit.messages import SamplingSettings
from kit.tracking.catalog import meaning
from tests.cases import slow
from tests.faults.interrupts import interrupted
from tests.steps import responses_and_metrics


def weights(session: RLSession) -> dict[str, dict[str, list[str]]]:
    """A checksum of each of the trainer's parameters."""
    found: dict[str, dict[str, list[str]]] = session.debug.stack.probe("checksums")
    return found


def test_five_verbs_make_one_step(session: RLSession) -> None:
    rollout = session.generate()
    assert len(rollout) == 128
    assert len(rollout.groups()) == 16
    assert all(s.response_length == len(s.rollout_log_probs or []) > 0 for s in rollout)
    scored = session.score(rollout)
    assert {s.reward for s in scored} == {0.0, 1.0}
    batch = session.advantages(scored)
    report = session.update(batch)
    assert report.applied
    assert report.samples == 128
    assert report.metrics["train/grad_norm"] > 0
    assert abs(report.metrics["train/ppo_kl"]) < 1e-9
    sync = session.sync()
    assert sync.weight_version == 1
    assert sync.bytes > 3_000_000


def test_samples_carry_the_version_of_the_weights_that_wrote_them(session: RLSession) -> None:
    before = session.generate()
    session.update(session.advantages(session.score(before)))
    unsynced = session.generate()
    session.sync()
    after = session.generate()
    versions = [{v for s in r for v in s.weight_versions} for r in (before, unsynced, after)]
    assert versions == [{0}, {0}, {1}]


@pytest.mark.slow
def test_trainer_and_engine_agree_before_and_after_twenty_steps(session: RLSession) -> None:
    before = session.check_mismatch(session.generate())
    assert before.verdict == "pass"
    assert before.max_abs_diff < 5e-5
    session.train(20, show=False)
    after = session.check_mismatch(session.generate())
    assert after.verdict == "pass"
    assert after.max_abs_diff < 5e-5


def test_the_same_batch_again_changes_nothing(session: RLSession) -> None:
    batch = session.advantages(session.score(session.generate()))
    first = session.update(batch)
    after = weights(session)
    second = session.update(batch)
    assert first.applied
    assert not second.applied
    assert second.metrics == first.metrics
    assert session.step_count == 1
    assert weights(session) == after


def test_the_same_seed_gives_the_same_samples_and_metrics(
    reseeded: Callable[[int], RLSession],
) -> None:
    runs = []
    for _ in range(2):
        session = reseeded(3)
        steps = session.train(2, show=False).steps
        runs.append(responses_and_metrics(steps))
    assert runs[0] == runs[1]


def test_another_seed_gives_other_samples(reseeded: Callable[[int], RLSession]) -> None:
    responses = []
    for seed in (1, 2):
        session = reseeded(seed)
        responses.append([s.response for s in session.generate(["58+67="] * 4)])
    assert responses[0] != responses[1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, *slow(2, 3)])
def test_grpo_lifts_held_out_accuracy_to_nine_tenths_whatever_the_seed(
    reseeded: Callable[[int], RLSession], seed: int
) -> None:
    session = reseeded(seed)
    before = session.evaluate()
    assert 0.3 <= before.mean_reward <= 0.6
    while session.step_count < 80:
        session.train(10, show=False)
        after = session.evaluate()
        if after.mean_reward >= 0.9:
            break
    assert after.mean_reward >= 0.9


def test_evaluation_is_greedy_and_repeats_itself(session: RLSession) -> None:
    first, second = session.evaluate(), session.evaluate()
    assert first.accuracy == second.accuracy == first.mean_reward
    assert [s.response for s in first.rollout] == [s.response for s in second.rollout]
    assert first.prompts == 669


def test_pass_at_k_grows_with_k(session: RLSession) -> None:
    session.configure({"evaluation.max_prompts": 40})
    report = session.evaluate(n_samples_per_prompt=8, temperature=1.0)
    assert set(report.pass_at_k) == {1, 2, 4, 8}
    shares = [report.pass_at_k[k] for k in (1, 2, 4, 8)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert report.mean_reward == pytest.approx(shares[0])


def test_a_step_is_the_verbs_in_order(session: RLSession) -> None:
    report = session.step()
    assert report.step == 0
    assert session.step_count == session.engine_version == 1
    for name in (
        "rollout/raw_reward",
        "rollout/response_len/mean",
        "rollout/truncated_ratio",
        "train/pg_loss",
        "train/train_rollout_logprob_abs_diff",
        "perf/step_time",
    ):
        assert math.isfinite(report.metrics[name])
    assert report.metrics["rollout/raw_reward"] == report.rollout.mean_reward()
    assert [name for name in report.metrics if not meaning(name).words] == []


def test_training_stops_where_it_is_told_to(session: RLSession) -> None:
    report = session.train(10, until=lambda step: step.step == 1, show=False)
    assert len(report) == 2
    assert "until" in report.stopped


def test_training_checks_and_evaluates_when_it_is_due(session: RLSession) -> None:
    session.configure(
        {"evaluation.interval": 2, "mismatch.interval": 2, "evaluation.max_prompts": 16}
    )
    steps = session.train(4, show=False).steps
    assert [s.evaluation is not None for s in steps] == [False, True, False, True]
    assert [s.mismatch is not None for s in steps] == [True, False, True, False]
    assert "eval/addition" in steps[1].metrics


def test_a_reward_that_raises_leaves_its_groups_out_and_says_why(session: RLSession) -> None:
    def fragile(sample: Sample) -> float:
        if sample.group_index in (0, 5):
            raise ValueError("no label here")
        return float(sample.response == sample.label)

    scored = session.score(session.generate(), reward=fragile)
    assert {s.group_index for s in scored.failed()} == {0, 5}
    report = session.update(session.advantages(scored))
    assert report.samples == 14 * 8
    assert len(report.left_out) == 2
    assert "no label here" in report.left_out[0]


@pytest.mark.parametrize("value", [None, math.nan, "good", [1.0]])
def test_a_reward_that_is_no_number_is_a_failure_of_its_sample(
    session: RLSession, value: object
) -> None:
    def odd(sample: Sample) -> object:
        return value if sample.index == 3 else 1.0

    scored = session.score(session.generate(), reward=odd)
    assert [s.index for s in scored.failed()] == [3]
    assert scored[3].status is Status.FAILED
    assert scored[3].error


def test_the_wrong_number_of_rewards_names_both_numbers(session: RLSession) -> None:
    def short(samples: list[Sample]) -> list[float]:
        return [1.0] * 3

    with pytest.raises(RewardError, match=r"3 .*128"):
        session.score(session.generate(), reward=short)


def test_a_step_in_which_every_reward_fails_trains_nothing(session: RLSession) -> None:
    def broken(sample: Sample) -> float:
        raise KeyError("answer")

    report = session.update(session.advantages(session.score(session.generate(), reward=broken)))
    assert not report.applied
    assert session.step_count == 0


def test_advantages_need_rewards(session: RLSession) -> None:
    with pytest.raises(SessionError, match="no rewards"):
        session.advantages(session.generate())


def test_an_update_that_is_not_finite_is_refused_and_changes_nothing(session: RLSession) -> None:
    batch = session.advantages(session.score(session.generate()))
    before = weights(session)
    bad = Batch(batch.samples, (math.nan, *batch.advantages[1:]))
    with pytest.raises(StackError, match="refused"):
        session.update(bad)
    assert weights(session) == before
    assert session.update(batch).applied


def test_own_prompts_and_temperature_are_taken(session: RLSession) -> None:
    rollout = session.generate(["12+34=", "58+67="], n_samples_per_prompt=3, temperature=0)
    assert [s.prompt for s in rollout] == ["12+34="] * 3 + ["58+67="] * 3
    assert len({s.response for s in rollout[:3]}) == 1


def test_a_prompt_longer_than_the_context_is_refused(session: RLSession) -> None:
    with pytest.raises(DataError, match="tokens"):
        session.generate(["9" * 600])
    assert len(session.generate()) == 128


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s: s.update(s.generate()), "update needs a Batch, got Rollout"),
        (lambda s: s.score(None), "score needs a Rollout, got NoneType"),
        (lambda s: s.generate(n_samples_per_prompt=0), "n_samples_per_prompt is 0"),
        (lambda s: s.generate(temperature=-1), "temperature is -1"),
        (lambda s: s.train(0), "steps is 0"),
        (lambda s: s.train("3"), "steps is '3'"),
        (lambda s: s.generate([{"role": "user", "content": "1+1="}]), "one chat message"),
        (lambda s: s.generate([12]), "Prompt 1 must be a string"),
    ],
)
def test_a_wrong_argument_names_itself(
    session: RLSession, call: Callable[[RLSession], object], says: str
) -> None:
    with pytest.raises(KitError, match=says):
        call(session)
    assert session.step_count == 0


def test_a_second_session_in_the_process_is_refused_at_once(session: RLSession) -> None:
    with pytest.raises(SessionError, match=r"RLSession\.current\(\)"):
        RLSession.start("tiny")
    assert RLSession.current() is session
    assert len(session.generate()) == 128


def test_a_check_after_training_looks_at_fresh_samples(session: RLSession) -> None:
    session.train(2, show=False)
    assert session.check_mismatch().verdict == "pass"


@pytest.mark.slow
def test_a_step_after_an_update_by_hand_samples_from_the_present_weights(
    session: RLSession,
) -> None:
    session.update(session.advantages(session.score(session.generate())))
    step = session.step()
    assert step.rollout.written_by({1})
    assert step.metrics["train/train_rollout_logprob_abs_diff"] < 1e-5


@pytest.mark.slow
def test_an_interrupt_while_generating_leaves_nothing_running(session: RLSession) -> None:
    session.debug.sampler.max_response_len, before = 480, session.debug.sampler.max_response_len
    try:
        # The second one is for Python, which drops an interrupt that comes within a finalizer.
        assert interrupted(
            lambda: session.evaluate(n_samples_per_prompt=64, temperature=50.0), 0.5, again=5.0
        )
    finally:
        session.debug.sampler.max_response_len = before
    assert session.check_mismatch(session.generate(temperature=1.0)).verdict == "pass"


@pytest.mark.parametrize("prompts", ["12+34=", []])
def test_what_is_no_list_of_prompts_is_refused(session: RLSession, prompts: object) -> None:
    with pytest.raises(DataError, match="list of prompts"):
        session.generate(prompts)  # type: ignore[arg-type]


def test_an_answer_that_ray_has_lost_is_an_error_and_the_session_goes_on(
    session: RLSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.exceptions import ObjectLostError

    rollout = session.generate()

    def lose(*_: object, **__: object) -> None:
        raise ObjectLostError("00", None, "")

    monkeypatch.setattr("kit.stack.calls.LAST_BREATH", 0.0)  # nobody has died
    with monkeypatch.context() as losing:
        losing.setattr(ray, "get", lose)
        with pytest.raises(StackError, match=r"Ray gave no answer to \w+.*\n(.|\n)*lost"):
            session.log_probs(rollout)
    assert session.log_probs(rollout)


def test_an_abort_keeps_the_tokens_so_far(session: RLSession) -> None:
    stack = session.debug.stack
    hot = SamplingSettings(temperature=50.0, max_new_tokens=480)  # noise: it seldom ends itself
    prompts = [session.debug.sampler.tokenize(row) for row in session.debug.state.stream.next(64)]
    generations = []

    def generate() -> None:
        for part in stack.generate(prompts, hot, list(range(64))):
            generations.extend(generation for _, generation in part)

    thread = threading.Thread(target=generate)
    thread.start()
    while thread.is_alive():
        stack.engines.abort()
        thread.join(0.2)
    finishes = {g.finish for g in generations}
    assert "abort" in finishes
    assert all(len(g.tokens) == len(g.log_probs) for g in generations)
    assert session.check_mismatch(session.generate()).verdict == "pass"


def test_a_checkpoint_continues_as_if_nothing_had_happened(
    session: RLSession, tmp_path: Path
) -> None:
    session.train(3, show=False)
    path = session.save(tmp_path / "three")
    expected = [_numbers(session) for _ in range(3)]
    from kit.checkpoint import checkpoint

    _, state = checkpoint.read(path)
    checkpoint.restore(session.debug.state, session.debug.stack, path, state)
    assert session.step_count == 3
    assert len(session.history) == 3
    assert [_numbers(session) for _ in range(3)] == expected


def _numbers(session: RLSession) -> dict[str, float]:
    return {k: v for k, v in session.step().metrics.items() if not k.startswith("perf/")}


def test_saving_never_overwrites_what_is_no_checkpoint(session: RLSession, tmp_path: Path) -> None:
    from kit.errors import CheckpointError

    (tmp_path / "thesis").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        session.save(tmp_path / "thesis")
    saved = session.save(tmp_path / "again")
    assert session.save(tmp_path / "again") == saved
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "thesis"]


def test_rollouts_survive_a_file(session: RLSession, tmp_path: Path) -> None:
    rollout = session.score(session.generate())
    again = Rollout.load(rollout.save(tmp_path / "rollout.jsonl"))
    assert again.samples == rollout.samples
    assert session.update(session.advantages(again)).applied
