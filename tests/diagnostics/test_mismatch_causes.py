"""Causes of a mismatch, each made on purpose in the running session, and the check of its start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kit import RLSession, Rollout, Sample
from kit.reports import MismatchReport
from kit.tiny import MODEL_DIR


def evidence(report: MismatchReport) -> str:
    return "\n".join(report.evidence)


def test_a_check_that_passes_looks_no_further(session: RLSession) -> None:
    report = session.check_mismatch()
    assert (report.verdict, report.cause_kind, report.evidence) == ("pass", "none", ())
    assert report.effective_sample_size == pytest.approx(1.0, abs=1e-6)
    assert report.ratio_range == pytest.approx((1.0, 1.0), abs=1e-4)
    assert abs(report.kl_k1) < 1e-6
    assert sum(p.tokens for p in report.by_position) == report.tokens
    assert sum(p.tokens for p in report.by_probability) == report.tokens


def test_a_deep_check_of_sides_that_agree_passes_with_all_probes(session: RLSession) -> None:
    report = session.check_mismatch(deep=True)
    assert (report.verdict, report.cause_kind) == ("pass", "none")
    for looked_at in ("checksums of 34 parameters: 0 differ", "prefix cache", "training mode"):
        assert looked_at in evidence(report)


def test_weights_that_changed_under_the_same_version_are_found_by_checksum(
    session: RLSession,
) -> None:
    session.update(session.advantages(session.score(session.generate())))
    session.debug.stack.trainers.version = (
        0  # as if nothing had been trained: the stamps agree, the weights do not
    )
    report = session.check_mismatch(session.generate())
    assert (report.verdict, report.cause_kind) == ("fail", "stale_weights")
    assert "both sides claim version 0" in report.cause
    assert "34 of 34 parameters differ" in report.cause
    health = session.check()
    assert not health.healthy
    broken = {i.name for i in health.invariants if i.holds is False}
    assert broken == {
        "mean |trainer - rollout| log-prob",
        "parameters changed by two syncs in a row",
    }


def test_old_version_stamps_are_named_with_both_sides_checksums(session: RLSession) -> None:
    session.update(session.advantages(session.score(session.generate())))
    report = session.check_mismatch(session.generate())
    assert report.cause_kind == "stale_weights"
    assert "weight versions: rollout 0, engine 0, trainer 1" in evidence(report)
    assert "checksums of 34 parameters: 34 differ" in evidence(report)


def test_another_sampling_temperature_is_found_with_its_value(session: RLSession) -> None:
    report = session.check_mismatch(session.generate(temperature=0.6))
    assert (report.verdict, report.cause_kind) == ("fail", "temperature")
    assert "fit temperature 0.6 " in report.cause
    assert "the trainer computes at 1." in report.cause


def test_text_encoded_again_is_found_by_its_missing_tokens(session: RLSession) -> None:
    rollout = session.generate()
    tokenizer = session.debug.sampler.tokenizer

    def again(sample: Sample) -> Sample:
        ids = tokenizer.encode(sample.response, add_special_tokens=False)
        return replace(sample, tokens=sample.prompt_tokens + ids, response_length=len(ids))

    report = session.check_mismatch(Rollout(map(again, rollout)))
    assert (report.verdict, report.cause_kind) == ("fail", "tokenization")
    assert "16 samples have another number of the one than of the other" in evidence(report)
    (repaired,) = [line for line in report.evidence if "as they were written" in line]
    assert float(repaired.rsplit(" ", 1)[1]) < 1e-5


def test_tokens_of_other_text_are_found_by_what_they_say(session: RLSession) -> None:
    rollout = session.generate()

    def other_digits(sample: Sample) -> Sample:
        swapped = {ord(a): ord(b) for a, b in zip("123", "231", strict=True)}
        text = sample.response.translate(swapped)
        ids = session.debug.sampler.tokenizer.encode(text, add_special_tokens=False)
        return replace(
            sample, tokens=sample.prompt_tokens + ids + sample.response_tokens[len(ids) :]
        )

    report = session.check_mismatch(Rollout(map(other_digits, rollout)))
    assert (report.verdict, report.cause_kind) == ("fail", "tokenization")
    assert "0 samples have another number of the one than of the other" in evidence(report)


def test_a_prompt_without_the_chat_template_is_found_by_rendering_it_anew(
    session: RLSession,
) -> None:
    tokenizer = session.debug.sampler.tokenizer
    bare = [
        replace(s, tokens=tokenizer.encode(s.prompt) + s.response_tokens)
        for s in session.generate()
    ]
    report = session.check_mismatch(Rollout(bare))
    assert (report.verdict, report.cause_kind) == ("fail", "chat_template")
    assert "16 of 16 prompts are not what the session's template makes of them" in report.cause


def test_log_probs_after_top_k_are_found_by_cutting_the_trainers(session: RLSession) -> None:
    """Transformers' own sampler hands out the scores that it draws from."""
    report = session.check_mismatch(_written_by_transformers(session, top_k=5))
    assert report.cause_kind == "processed_log_probs"
    assert "after top_k 5 and renormalisation" in report.cause
    assert session.check_mismatch(_written_by_transformers(session, top_k=0)).verdict == "pass"


def _written_by_transformers(session: RLSession, top_k: int) -> Rollout:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    torch.manual_seed(0)
    samples = []
    for index, row in enumerate(session.debug.state.stream.next(8)):
        prompt = session.debug.sampler.tokenize(row)
        out = model.generate(
            torch.tensor([prompt]), do_sample=True, temperature=1.0, top_k=top_k, top_p=1.0,
            max_new_tokens=6, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        written = out.sequences[0, len(prompt) :].tolist()
        scores = torch.stack(out.scores)[:, 0].log_softmax(-1)
        log_probs = [float(row[token]) for row, token in zip(scores, written, strict=True)]
        samples.append(
            Sample(
                index=index,
                prompt=row.prompt,
                tokens=prompt + written,
                response_length=len(written),
                rollout_log_probs=log_probs,
                weight_versions=[0],
            )
        )
    return Rollout(samples)


@pytest.mark.slow
def test_a_threshold_below_what_the_dtype_can_do_is_blamed_on_precision(
    session: RLSession,
) -> None:
    session.configure({"mismatch.warn_above": 1e-9})
    report = session.check_mismatch()
    assert (report.verdict, report.cause_kind) == ("warn", "precision")
    assert "rounding to float32" in report.cause


@pytest.mark.slow
def test_log_probs_that_nothing_explains_are_called_unknown(session: RLSession) -> None:
    spoiled = [
        replace(s, rollout_log_probs=[x - 0.3 * (i % 2) for i, x in enumerate(s.rollout_log_probs)])
        for s in session.generate()
    ]
    report = session.check_mismatch(Rollout(spoiled))
    assert (report.verdict, report.cause_kind) == ("fail", "unknown")
    assert len(report.evidence) > 10


def test_the_worst_tokens_stand_between_their_neighbours(session: RLSession) -> None:
    sample = session.generate(["12+34="])[0]
    wrong = [x - 1.0 * (i == 1) for i, x in enumerate(sample.rollout_log_probs)]
    report = session.check_mismatch(Rollout([replace(sample, rollout_log_probs=wrong)]))
    worst = report.worst[0]
    texts = sample.metadata["token_texts"]
    assert (worst.position, worst.token) == (1, texts[1])
    assert worst.before.endswith("34=<|end|><|assistant|>" + texts[0])
    assert worst.after == "".join(texts[2:8])


# ---- session.check() -----------------------------------------------------------------------------


def test_a_fresh_session_is_healthy(session: RLSession) -> None:
    report = session.check()
    assert report.healthy
    values = {i.name: (i.value, i.holds) for i in report.invariants}
    assert values.pop("entropy, nats a token")[0] > 0.01
    assert values.pop("mean |trainer - rollout| log-prob")[0] < 1e-5
    assert values == {
        "ppo_kl at the first step": (0.0, True),
        "clip fraction at the first step": (0.0, True),
        "|actor - reference| log-prob, largest": (0.0, True),
        "weights changed by learning rate 0": (0.0, True),
        "parameters changed by two syncs in a row": (0.0, True),
    }


def test_a_check_leaves_the_session_as_it_was(
    reseeded: Callable[[int], RLSession], tmp_path: Path
) -> None:
    def run(folder: str, checks: bool) -> tuple[list[list[int]], dict[str, bytes], list[float]]:
        session = reseeded(5)
        session.step()
        kept = session.last_rollout
        if checks:
            session.check()
        assert session.last_rollout is kept
        saved = session.save(tmp_path / folder)
        (file,) = (saved / "trainer").glob("*.safetensors")
        files = {name: value.numpy().tobytes() for name, value in load_file(file).items()}
        after = session.step()
        numbers = [v for k, v in after.metrics.items() if not k.startswith("perf/")]
        return [s.tokens for s in after.rollout], files, numbers

    assert run("checked", checks=True) == run("plain", checks=False)


def test_a_trained_actor_is_not_held_against_its_reference(session: RLSession) -> None:
    session.step()
    report = session.check()
    (reference,) = [i for i in report.invariants if "reference" in i.name]
    assert reference.holds is None
    assert "has been trained" in reference.note
    assert report.healthy


def test_an_engine_that_waits_for_a_sync_is_not_synced_by_a_check(session: RLSession) -> None:
    session.update(session.advantages(session.score(session.generate())))
    report = session.check()
    (hand_over,) = [i for i in report.invariants if "syncs" in i.name]
    assert hand_over.holds is None
    assert "call session.sync() first" in hand_over.note
    assert session.engine_version == 0
    assert report.mismatch.cause_kind == "stale_weights"
