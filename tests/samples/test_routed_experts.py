"""The engine's experts in the samples: through every cut, every continuation and every file."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.data.buffer import RolloutBuffer
from kit.engine.routing import routed_experts
from kit.errors import DataError, StackError
from kit.models.source import ExpertLayout
from kit.samples import Batch, Rollout, Sample
from kit.samples.experts import RoutedExperts, dtype_for
from kit.samples.serialization import (
    read_arrays,
    read_batch,
    read_rollout,
    write_arrays,
    write_batch,
    write_rollout,
)

LAYOUT = ExpertLayout(layers=(1, 3), count=8, top_k=2, model_layers=4)
"""Layers 0 and 2 are dense."""


def table(rows: int, seed: int = 0) -> np.ndarray:
    """Two different experts of eight for each row and layer."""
    draw = np.random.default_rng(seed)
    return np.argsort(draw.random((rows, 2, 8)), axis=-1)[..., :2].astype(np.uint8)


def of_sglang(chosen: np.ndarray, **meta: Any) -> dict[str, Any]:
    """A record as SGLang sends it: int32 of all layers, zeros for dense ones."""
    whole = np.zeros((len(chosen), 4, 2), np.int32)
    whole[:, [1, 3]] = chosen
    return {"routed_experts": base64.b64encode(whole.tobytes()).decode(), "id": "r1", **meta}


def written(prompt: int = 3, response: int = 4, seed: int = 0) -> Sample:
    """A sample with a record."""
    tokens = list(range(10, 10 + prompt))
    record = RoutedExperts(table(prompt + response - 1, seed), (1, 3), 8)
    return Sample(tokens=tokens).continued([7] * response, [-1.0] * response, 0, record)


def array(sample: Sample) -> np.ndarray:
    record = sample.rollout_routed_experts
    assert record is not None
    return record.array


# What SGLang reports


def test_a_record_holds_the_layers_with_experts_in_the_smallest_dtype() -> None:
    chosen = table(6)
    got = routed_experts(of_sglang(chosen, prompt_tokens=3), 4, LAYOUT)
    assert got is not None
    assert got.dtype == np.uint8
    assert np.array_equal(got, chosen)
    assert dtype_for(255) == np.uint8
    assert dtype_for(256) == np.uint16  # 255 is an expert of theirs


def test_one_row_too_many_is_cut_and_other_lengths_are_refused() -> None:
    chosen = table(7)
    got = routed_experts(of_sglang(chosen, prompt_tokens=3), 4, LAYOUT)
    assert np.array_equal(got, chosen[:6])  # type: ignore[arg-type]
    for rows in (5, 8):
        with pytest.raises(StackError, match=f"experts of {rows} tokens for a request of 7"):
            routed_experts(of_sglang(table(rows), prompt_tokens=3), 4, LAYOUT)


def test_a_request_that_was_never_read_has_no_record() -> None:
    assert routed_experts({"prompt_tokens": 3}, 0, LAYOUT) is None


def test_after_a_retraction_the_rows_of_the_response_are_not_vouched_for() -> None:
    meta = of_sglang(table(6), prompt_tokens=3, num_retractions=1)
    got = routed_experts(meta, 4, LAYOUT)
    assert got is not None
    record = RoutedExperts(got, (1, 3), 8)
    assert record.known.tolist() == [True, True, False, False, False, False]


def test_rows_that_nothing_was_written_to_are_unknown_and_a_whole_record_of_them_is_refused() -> (
    None
):
    chosen = table(6)
    chosen[2] = 0
    got = routed_experts(of_sglang(chosen, prompt_tokens=3), 4, LAYOUT)
    assert got is not None
    assert RoutedExperts(got, (1, 3), 8).known.tolist() == [True, True, False, True, True, True]
    with pytest.raises(StackError, match="recorded no experts"):
        routed_experts(of_sglang(np.zeros_like(chosen), prompt_tokens=3), 4, LAYOUT)
    with pytest.raises(StackError, match="experts 0 to 9; a layer has 8"):
        routed_experts(of_sglang(chosen + (chosen == 7) * 2, prompt_tokens=3), 4, LAYOUT)


# Through cuts and continuations


def test_a_sample_has_a_row_for_every_token_but_the_last() -> None:
    sample = written()
    assert array(sample).shape == (6, 2, 2)
    with pytest.raises(DataError, match="6 rows for 8 tokens"):
        replace(sample, tokens=[*sample.tokens, 5], response_length=5)


def test_a_cut_response_cuts_the_record() -> None:
    record = RoutedExperts(table(6), (1, 3), 8)
    sample = Sample(tokens=[1, 2, 3]).continued([7, 7], [-1.0, -1.0], 0, record)
    assert np.array_equal(array(sample), table(6)[:4])


def test_a_continued_sample_keeps_the_rows_of_the_pass_that_wrote_each_token() -> None:
    first = written(3, 4)
    later = RoutedExperts(table(9, seed=1), (1, 3), 8)  # reads the first seven tokens again
    whole = first.continued([8, 8, 8], [-1.0] * 3, 1, later)
    assert np.array_equal(array(whole)[:6], table(6))
    assert np.array_equal(array(whole)[6:], table(9, seed=1)[6:])
    assert whole.version_lengths == [4, 3]


@pytest.mark.parametrize("first", [True, False])
def test_tokens_written_without_a_record_are_unknown_in_a_continued_sample(first: bool) -> None:
    record, longer = (RoutedExperts(table(n), (1, 3), 8) for n in (6, 9))
    begun = Sample(tokens=[1, 2, 3]).continued([7] * 4, [-1.0] * 4, 0, record if first else None)
    whole = begun.continued([8] * 3, [-1.0] * 3, 1, None if first else longer)
    known = whole.rollout_routed_experts.known.tolist()  # type: ignore[union-attr]
    assert known == [first] * 6 + [not first] * 3


def test_a_reset_response_loses_its_record() -> None:
    assert written().reset_response().rollout_routed_experts is None


def test_records_of_two_models_are_not_joined() -> None:
    other = RoutedExperts(table(9), (0, 1), 8)
    with pytest.raises(DataError, match=r"layers \[1, 3\], and of 2 in the layers \[0, 1\]"):
        written().continued([8] * 3, [-1.0] * 3, 1, other)


# Through files

SAMPLES = [written(seed=1), Sample(tokens=[1, 2], response_length=1), written(5, 2, seed=2)]


def test_rollouts_batches_buffers_and_arrays_come_back_with_their_records(tmp_path: Path) -> None:
    rollout = Rollout(SAMPLES, 3)
    write_rollout(rollout, tmp_path / "rollout.jsonl")
    assert read_rollout(tmp_path / "rollout.jsonl") == rollout
    batch = Batch(tuple(SAMPLES), (1.0, 0.0, -1.0), 3)
    write_batch(batch, tmp_path / "batch.json")
    assert read_batch(tmp_path / "batch.json") == batch
    write_arrays(tmp_path / "a.safetensors", SAMPLES, {"step": 3})
    assert read_arrays(tmp_path / "a.safetensors") == (SAMPLES, {"step": 3})
    buffer, again = RolloutBuffer(), RolloutBuffer()
    buffer.put([tuple(SAMPLES)])
    again.load_state(json.loads(json.dumps(buffer.state())))
    assert again.take(1) == buffer.take(1)


def test_wide_records_come_back_too(tmp_path: Path) -> None:
    wide = RoutedExperts(table(6).astype(np.uint16) * 100, (1, 3), 8)
    mixed = [*SAMPLES, replace(SAMPLES[0], rollout_routed_experts=wide)]
    write_arrays(tmp_path / "a.safetensors", mixed, {})
    assert read_arrays(tmp_path / "a.safetensors")[0] == mixed
    assert Sample.from_dict(json.loads(json.dumps(mixed[3].to_dict()))) == mixed[3]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"dtype": "O"},
        {"shape": [6, 2, 3]},
        {"shape": [-1, 2, 2]},
        {"layers": ["1", 3]},
        {"experts": "8"},
        {"base64": "no"},
        {"base64": 5},
    ],
)
def test_a_damaged_record_is_refused(change: dict[str, Any]) -> None:
    row = SAMPLES[0].to_dict()
    row["rollout_routed_experts"] |= change
    with pytest.raises(DataError, match="no record of experts"):
        Sample.from_dict(row)


def test_a_record_is_an_array_for_numpy_and_cannot_be_written_to() -> None:
    record = SAMPLES[0].rollout_routed_experts
    assert record is not None
    assert np.asarray(record).shape == record.shape == (6, 2, 2)
    with pytest.raises(ValueError, match="read-only"):
        record.array[0] = 0
