"""Speculative decoding on the real stack: the tokens of plain decoding, and a draft that learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.drafts import shorten
from kit.engine.drafts.passes import Passes
from kit.errors import ConfigError, DataError, ModelError, StackError
from kit.models.source import find
from kit.rollout.drafts import find_draft
from kit.samples import Rollout, Sample, token_values
from kit.samples.serialization import read_arrays, write_arrays
from kit.tiny import MODEL_DIR
from tests.conftest import Shared
from tests.drafting import (
    PROMPTS,
    TEMPERATURES,
    TINY,
    draft_of,
    drafting,
    outlives_its_engine,
    same,
    written,
)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    shorten(MODEL_DIR, folder, 1)
    return folder


@pytest.fixture(scope="module")
def plain(shared: Shared) -> dict[float, Rollout]:
    """What plain decoding writes, by temperature."""
    session = shared.at(seed=0)
    return {temperature: written(session, temperature) for temperature in TEMPERATURES}


@pytest.fixture(scope="module")
def running(shared: Shared, plain: Any, draft: Path) -> Iterator[RLSession]:
    """A session that trains the draft with which its engines write."""
    shared.at(seed=0).close(keep_warm=True)
    with RLSession.start(drafting(draft, train=True)) as session:
        session.snapshot("first")
        yield session


@pytest.fixture
def session(running: RLSession) -> RLSession:
    """It in its first moment."""
    running.restore("first")
    return running


def test_drafts_change_no_token(running: RLSession, plain: dict[float, Rollout]) -> None:
    for temperature, expected in plain.items():
        rollout = written(running, temperature)
        same(rollout, expected)
        counts = [s.spec_info for s in rollout if s.response_length > 1]
        assert all(c["tokens"] >= c["verify_ct"] > 0 for c in counts)
        assert sum(c["num_correct_drafts"] for c in counts) > 0
        assert sum(c["tokens"] for c in counts) == sum(s.response_length - 1 for s in rollout)
        for sample in rollout:
            places = sample.rollout_drafted or []
            # Each pass writes a run of drafted tokens, and after it one of the model's own.
            assert places[0] == 0
            assert all(b in (0, a + 1) for a, b in pairwise(places))
            passes = places[1:].count(0) + bool(places[-1])
            assert passes == sample.spec_info.get("verify_ct", 0)


def test_nothing_is_written_past_an_end_where_the_limit_is_near(
    session: RLSession, plain: dict[float, Rollout]
) -> None:
    """Of a pass that gives an end and more, what comes after the end is no part of the answer."""
    for limit in (2, 3, 4, 5, 6):
        session.restore("first")  # the next responses have the seeds of the first ones
        cut = session.generate(PROMPTS, temperature=1.0, max_tokens=limit)
        for sample, other in zip(cut, plain[1.0], strict=True):
            assert sample.response_tokens == other.response_tokens[:limit]
            assert len(sample.rollout_log_probs or ()) == sample.response_length


def test_each_sync_reaches_what_it_is_for(session: RLSession) -> None:
    stack = session.debug.stack
    policy, before = stack.checksums(), draft_of(session)
    assert not any("draft" in name for one in policy for name in one)
    report = session.step()
    m = report.metrics
    assert m["train/draft_loss"] > 0
    assert 1.0 <= m["rollout/spec_accept_length"] <= 4.0
    assert 0.0 < m["rollout/spec_accept_rate"] < 1.0
    assert stack.checksums() != policy
    assert draft_of(session) != before
    assert stack.compare_draft().require_equal() == len(before[0])
    rollout = session.generate()
    assert session.check_mismatch(rollout).verdict == "pass"
    assert session.sync(verify=True).verified  # erases the policy, and compares both

    session.restore("first")
    session.sync()
    assert draft_of(session) == before
    assert stack.checksums() == policy


def test_an_engine_that_died_gets_the_draft_that_was_learned(session: RLSession) -> None:
    outlives_its_engine(session)


def test_the_draft_is_exported_and_drafts_for_another_session(
    session: RLSession, tmp_path: Path
) -> None:
    session.step()
    folder = session.export_hf(tmp_path / "draft", draft=True)
    from safetensors.torch import load_file

    from kit.weight_sync.verify import trainer_checksums

    found = trainer_checksums(load_file(folder / "model.safetensors").items())
    there = draft_of(session)[0]
    assert all(there[name] in found[name]["float32"] for name in there)
    assert drafting(folder).engine.speculative


@pytest.mark.slow
def test_frequencies_are_those_of_the_model(running: RLSession) -> None:
    """Pairs of first tokens of 10,000 responses, against the model's own probabilities."""
    import torch
    from scipy.stats import chisquare
    from transformers import AutoModelForCausalLM

    running.restore("first")
    running.sync()
    rollout = running.generate(["27+58="], n_samples_per_prompt=10_000, temperature=2.0)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    prompt, ends = rollout[0].prompt_tokens, running.debug.stack.model.eos_token_ids
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].double().div(2).softmax(-1)
        likely = [int(t) for t in first.topk(8).indices if int(t) not in ends]
        rows = torch.tensor([[*prompt, token] for token in likely])
        second = model(rows).logits[:, -1].double().div(2).softmax(-1)
    pairs = {
        (a, b): float(first[a] * p)
        for a, of in zip(likely, second, strict=True)
        for b, p in enumerate(of.tolist())
    }
    counts: dict[tuple[int, int], int] = {}
    for sample in rollout:
        a, b = (*sample.response_tokens, -1)[:2]  # a response may end with its first token
        counts[a, b] = counts.get((a, b), 0) + 1
    cells = [pair for pair, chance in pairs.items() if chance * len(rollout) >= 10]
    seen = [counts.get(pair, 0) for pair in cells]
    expected = [pairs[pair] * len(rollout) for pair in cells]
    rest = len(rollout) - sum(expected)
    assert len(cells) > 20
    result = chisquare([*seen, len(rollout) - sum(seen)], [*expected, rest])
    assert result.pvalue > 1e-3


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine.speculative": {"algorithm": "standalone"}}, "no draft_model is named"),
        ({"engine.speculative": {"draft_model": "x"}}, "ngram drafts without a model"),
        ({"engine.speculative": {"when": "auto"}}, "only chains of standalone drafts"),
        (
            {
                "engine.speculative": {
                    "algorithm": "standalone",
                    "draft_model": "x",
                    "num_draft_tokens": 7,
                }
            },
            "num_steps 3 and eagle_topk 1 it is 4",
        ),
        ({"engine.speculative": {"algorithm": "eagle9"}}, "'eagle', 'eagle3' or 'mtp'"),
        ({"engine.extra": {"speculative_algorithm": "NGRAM"}}, "set engine.speculative instead"),
        ({"training.draft": {}}, "there is no draft to be trained"),
        (
            {"engine.speculative": {}, "training.true_on_policy": True},
            "not known to give the trainer's bits",
        ),
        (
            {"engine.speculative": {}, "model.lora": {"r": 4}, "engine.lora": "adapter"},
            "merged works",
        ),
    ],
)
def test_settings_that_cannot_be_right_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        reduce(lambda config, pair: config.replace(*pair), settings.items(), TINY)


def test_a_session_shows_what_drafts(session: RLSession) -> None:
    shown = session._repr_mimebundle_()["text/plain"]
    assert "a model, learns along: a chain of 3 tokens" in shown
    assert TINY.drafts == ""
    assert TINY.replace("engine.speculative", {}).drafts == "n-grams, 8 tokens a pass"
    tree = drafting("somewhere", eagle_topk=2)
    assert tree.drafts == "a model, frozen: a tree of 7 tokens"


def test_a_draft_is_set_for_the_whole_session(session: RLSession) -> None:
    with pytest.raises(ConfigError, match="cannot be set or taken away"):
        session.configure(draft=None)
    with pytest.raises(ConfigError, match="loss cannot change from cross_entropy to forward_kl"):
        session.configure({"training.draft.loss": "forward_kl"})
    session.configure({"training.draft.learning_rate": 0.0})
    before = draft_of(session)
    session.step()
    assert draft_of(session) == before


def test_a_draft_is_found_where_one_is_named(draft: Path) -> None:
    model = find(TINY.model)
    assert find_draft(TINY, model) is None
    assert find_draft(drafting(draft, train=True, eagle_topk=2), model)
    ngrams = TINY.replace("engine.speculative", {"algorithm": "ngram"})
    assert find_draft(ngrams, model) is None


def test_a_draft_with_other_tokens_is_refused(tmp_path: Path, draft: Path) -> None:
    import json
    import shutil

    model = find(TINY.model)
    shutil.copytree(draft, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocabulary = tree["model"]["vocab"]
    a, b = sorted(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(tree))
    with pytest.raises(ModelError, match="have different tokenizers"):
        find_draft(drafting(tmp_path / "other"), model)
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 64}))
    with pytest.raises(ModelError, match="a vocabulary of 64 tokens"):
        find_draft(drafting(tmp_path / "other"), model)


def test_a_counter_that_is_missing_is_an_error_and_not_nothing() -> None:
    with pytest.raises(StackError, match="0 of the None passes that wrote 5 tokens"):
        Passes.of({}, 5)
    with pytest.raises(StackError, match="0 of the 2 passes that wrote 5 tokens"):
        Passes.of({"spec_verify_ct": 2}, 5)
    assert Passes.of({}, 1).spec_info(1) == {}  # the prompt's pass gave it
    # One without drafts, one with one right of three, one whose fourth token is past the end.
    noted = [1, 0, 0, 20, 20, 2, 1, 3, 30, 40, 4, 3, 3, 0, 0]
    passes = Passes.of({"spec_verify_ct": 3, "spec_correct_drafts_histogram": noted}, 6)
    assert passes.spec_info(6) == {
        "passes": 3,
        "verify_ct": 2,
        "num_proposed_drafts": 6,
        "num_correct_drafts": 4,
        "tokens": 4,
        "us": 50,
        "plain_us": 60,
    }
    assert passes.drafted(6) == [0, 0, 1, 0, 1, 2]


def test_drafted_tokens_are_told_in_samples_and_strips(tmp_path: Path) -> None:
    sample = Sample(tokens=[5, 6, 7], response_length=2, rollout_log_probs=[-1.0, -2.0])
    sample = replace(sample, weight_versions=[0], rollout_drafted=[0, 1])
    longer = sample.continued([8, 9], [-0.5, -0.5], 1, drafted=[1, 0])
    assert longer.rollout_drafted == [0, 1, 1, 0]
    assert sample.continued([8], [-0.5], 1).rollout_drafted == [0, 1, 0]
    assert token_values.require(longer, "drafted") == [0.0, 1.0, 1.0, 0.0]
    drawn = longer.strip(quantity="drafted")
    assert "place in the draft" in drawn.html
    write_arrays(tmp_path / "file", [longer], {})
    assert read_arrays(tmp_path / "file")[0] == [longer]
    assert Sample.from_dict(longer.to_dict()) == longer
    assert longer.reset_response().rollout_drafted is None
    with pytest.raises(DataError, match="rollout_drafted has 1 numbers for 2 response tokens"):
        replace(sample, rollout_drafted=[1])
