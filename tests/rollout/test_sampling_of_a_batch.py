"""Only samples of the distribution that the trainer computes are trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kit import RLSession, SessionConfig
from kit.errors import SessionError
from kit.rollout.batch import check_sampling, refuse_cut
from kit.samples import Rollout, Sample


def checked(sample: Sample, **settings: object) -> None:
    config = SessionConfig(**settings)
    check_sampling([Sample(), sample], config.rollout, config.training)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_samples_of_the_trainers_temperature_are_taken(temperature: float | None) -> None:
    checked(Sample(temperature=temperature))


@pytest.mark.parametrize("temperature", [0.4, 0.0, 1.5])
def test_samples_of_another_temperature_are_refused(temperature: float) -> None:
    with pytest.raises(SessionError, match=rf"1 of 2 samples.*temperature {temperature:g},.* at 1"):
        checked(Sample(temperature=temperature))
    checked(Sample(temperature=temperature or 0.7), rollout={"temperature": temperature or 0.7})


@pytest.mark.parametrize(
    "training",
    [{"use_tis": True}, {"use_rollout_logprobs": True}, {"mis": {"level": "token"}}],
)
def test_a_correction_weighs_another_temperature_but_no_greedy_response(
    training: dict[str, object],
) -> None:
    checked(Sample(temperature=0.4), training=training)
    with pytest.raises(SessionError, match="greedy"):
        checked(Sample(temperature=0.0), training=training)


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 20}])
def test_samples_of_a_part_of_the_vocabulary_are_refused(cut: dict[str, float]) -> None:
    with pytest.raises(SessionError, match=rf"rollout\.{next(iter(cut))}"):
        checked(Sample(**cut), training={"use_tis": True})
    with pytest.raises(SessionError, match=r"rollout\.top_p: 1\.0 and rollout\.top_k: -1"):
        refuse_cut(SessionConfig(rollout=cut).rollout)
    refuse_cut(SessionConfig().rollout)


def test_samples_know_how_they_were_drawn_and_an_update_looks(session: RLSession) -> None:
    def batch(rollout: Rollout) -> object:
        scored = session.score(rollout, reward=lambda sample: float(sample.index % 2))
        return session.advantages(scored)

    cold = session.generate(temperature=0.4)
    assert {s.temperature for s in cold} == {0.4}
    before = session.weight_version
    with pytest.raises(SessionError, match=r"temperature 0\.4"):
        session.update(batch(cold))
    assert session.weight_version == before
    assert session.update(batch(session.generate())).applied
    cut = replace(cold[0], temperature=1.0, top_k=5)
    with pytest.raises(SessionError, match="top_k 5"):
        session.update(batch(Rollout([cut, replace(cut, index=1)])))


def test_ids_that_the_tokenizer_lacks_are_told(session: RLSession) -> None:
    reader = session.debug.sampler.reader
    size = len(session.tokenizer)
    padded = replace(reader, vocabulary=size + 10)
    odd = Sample(tokens=[1, size + 3], response_length=1)
    (words,) = padded.notes([odd, Sample(tokens=[1, 2], response_length=1)])
    assert words.startswith("1 of 2 responses hold token ids that the tokenizer does not have")
    assert f"such as {size + 3}: it has {size}" in words
    assert reader.notes(session.generate()) == ()
