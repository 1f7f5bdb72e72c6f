"""An imported nanochat on the real stack: engine, trainer and nanochat's own formula are one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kit import RLSession, SessionConfig
from kit.checkpoint.nanochat import import_nanochat
from kit.models import own
from kit.samples import Sample
from kit.trainer.probes import Samples, SamplingTransform
from tests import nanochats
from tests.checkpoint.test_export import response_log_probs

ROWS = [{"prompt": "+".join(str(a * n % 97) for n in range(60)), "label": ""} for a in range(2, 9)]
"""Longer than a short window."""
WEIGHTS = {"first": 2 + 4 * 3, "2026": 2 + 4 * 3 + 2 * 2 + 5}
"""Parameters of the engine's, which computes queries, keys and values in one."""
SETTINGS = {
    "name": "nanochat",
    "device": "cpu",
    "rollout": {"max_response_len": 40},
    "engine": {"replicas": 1},
    "training": {"rollout_batch_size": 4, "n_samples_per_prompt": 4, "learning_rate": 1e-2},
}


@pytest.fixture(scope="module", params=[pytest.param("first", marks=pytest.mark.slow), "2026"])
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def checkpoint(version: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = nanochats.make_2026 if version == "2026" else nanochats.make
    return make(tmp_path_factory.mktemp("nanochat"))


@pytest.fixture(scope="module")
def session(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RLSession]:
    """A session that has started, so the probe has seen trainer and engine agree."""
    if other := RLSession.current():
        other.close()
    model = import_nanochat(checkpoint, tmp_path_factory.mktemp("imported") / "model").path
    config = SessionConfig(**SETTINGS, model={"name": str(model)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with RLSession.start(config, data=ROWS) as started:
            yield started


def largest(pairs: list[tuple[list[float], list[float]]]) -> float:
    return max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))


def by_formula(checkpoint: Path, sample: Sample) -> list[float]:
    logp = nanochats.log_probs(checkpoint, sample.tokens)
    count = sample.response_length
    places = range(len(sample.tokens) - count, len(sample.tokens))
    return [float(logp[place - 1, sample.tokens[place]]) for place in places]


def test_engine_and_trainer_compute_nanochats_formula(session: RLSession, checkpoint: Path) -> None:
    samples = session.generate()[:8]
    assert min(len(sample.tokens) for sample in samples) > nanochats.WINDOW + 8
    expected = [by_formula(checkpoint, sample) for sample in samples]
    tokens, lengths = [s.tokens for s in samples], [s.response_length for s in samples]
    stack = session.debug.stack
    for cache in ("none", "refilled"):
        read = [row.log_probs for row in stack.rescore(tokens, lengths, cache=cache)[0]]
        assert largest(list(zip(read, expected, strict=True))) < 1e-5, cache
    written = [list(sample.rollout_log_probs or ()) for sample in samples]
    assert largest(list(zip(written, expected, strict=True))) < 1e-5
    trained = session.log_probs(samples)
    assert largest(list(zip(trained, expected, strict=True))) < 1e-5


def test_answers_end_at_nanochats_two_ends(session: RLSession) -> None:
    ends = {nanochats.encoding().encode_single_token(t) for t in ("<|assistant_end|>", "<|bos|>")}
    stopped = [s for s in session.generate() if s.status == "completed"]
    assert all(s.tokens[-1] in ends for s in stopped)
    for sample in session.generate():
        assert not ends & set(sample.tokens[len(sample.tokens) - sample.response_length : -1])


def test_it_trains_reaches_the_engine_and_comes_back_from_an_export(
    session: RLSession, version: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    rollout = session.score(session.generate(), reward=lambda sample: float(sample.index % 2))
    before = session.log_probs(rollout[:4])
    session.update(session.advantages(rollout))
    report = session.sync(verify=True)
    assert report.verified == len(session.debug.stack.checksums()[0]) == WEIGHTS[version]
    assert session.check_mismatch(session.generate()).verdict == "pass"
    after = session.log_probs(rollout[:4])
    assert largest(list(zip(before, after, strict=True))) > 1e-2
    exported = session.export_hf(tmp_path / "model")
    own.register(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    for sample, expected in zip(rollout[:4], after, strict=True):
        found = response_log_probs(model, sample.tokens, sample.response_length)
        assert found == pytest.approx(expected, rel=0, abs=1e-5)


def test_probes_of_sampling_compute_capped_logits_too(session: RLSession) -> None:
    samples = session.generate()[:4]
    asked = Samples([s.tokens for s in samples], [s.response_length for s in samples])
    (found,) = session.debug.stack.probe("sampled", asked, [SamplingTransform(1.0)])
    assert largest(list(zip(found, session.log_probs(samples), strict=True))) < 1e-5


@pytest.mark.slow
def test_adapters_of_the_first_are_those_of_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if other := RLSession.current():
        other.close()
    model = import_nanochat(nanochats.make(tmp_path), tmp_path / "model").path
    config = SessionConfig(**SETTINGS, model={"name": str(model), "lora": {"r": 4}})
    with RLSession.start(config, data=ROWS) as session:
        for _ in range(2):  # the first changes one half of each adapter only
            rollout = session.score(session.generate(), reward=lambda s: float(s.index % 2))
            session.update(session.advantages(rollout))
            assert session.sync(verify=True).verified == 2 + 4 * 3
        report = session.check_mismatch(session.generate())
        assert (report.verdict, report.mean_abs_diff < 1e-5) == ("pass", True)
        samples = rollout[:4]
        trained = session.log_probs(samples)
        folders = tmp_path / "adapter", tmp_path / "merged"
        exports = session.export_hf(folders[0], adapter=True), session.export_hf(folders[1])
    plain = AutoModelForCausalLM.from_pretrained(model)
    without = [response_log_probs(plain, s.tokens, s.response_length) for s in samples]
    assert largest(list(zip(without, trained, strict=True))) > 1e-2
    adapted = PeftModel.from_pretrained(plain, str(exports[0]))
    for one in (adapted, AutoModelForCausalLM.from_pretrained(exports[1])):
        found = [response_log_probs(one, s.tokens, s.response_length) for s in samples]
        assert largest(list(zip(found, trained, strict=True))) < 2e-5
