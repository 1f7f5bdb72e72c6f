"""The GPU benchmark's formulas, rows, page and running of parts; nothing here needs a GPU."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts import floors, page, rows
from benchmarks.gpu_parts.children import NO_TIME, Part, Report, run_apart
from benchmarks.gpu_parts.floors import Rates, Samples
from benchmarks.gpu_parts.results import PartResult, Results
from benchmarks.gpu_parts.workload import CHAT_TOKENS, QWEN3_06B, Workload, reward
from kit.models.source import TINY_DIRECTORY, ModelShape

QWEN3 = ModelShape(
    parameters=596_049_920,
    layers=28,
    hidden=1024,
    intermediate=3072,
    heads=16,
    key_value_heads=8,
    head_size=128,
    vocabulary=151_936,
    tied=True,
)
RATES = Rates(copy=3e12, matrix=800e12, to_device=50e9, to_host=50e9)


def test_the_shape_written_is_the_one_that_the_formulas_are_checked_with() -> None:
    names = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "intermediate": "intermediate_size",
        "heads": "num_attention_heads",
        "key_value_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "vocabulary": "vocab_size",
        "tied": "tie_word_embeddings",
    }
    assert {ours: getattr(QWEN3, ours) for ours in names} == {
        ours: QWEN3_06B[theirs] for ours, theirs in names.items()
    }


def test_matrices_of_qwen3_06b_add_up_to_its_parameters() -> None:
    # A layer: q and o 1024 x 2048, k and v 1024 x 1024, three feed-forward ones 1024 x 3072.
    assert floors.layer_matrices(QWEN3) == 28 * 15_728_640
    assert floors.head_matrix(QWEN3) == 155_582_464
    # A layer's norms: two of 1024 and two of 128; one of 1024 after the last layer.
    norms = 28 * 2304 + 1024
    assert floors.layer_matrices(QWEN3) + floors.head_matrix(QWEN3) + norms == QWEN3.parameters


def test_operations_of_a_qwen3_06b_batch_agree_with_those_counted_by_hand() -> None:
    # One sample of 64 + 512 tokens, which look back on 288.5 tokens on average.
    layers = 576 * 2 * 440_401_920
    attention = 576 * 4 * 28 * 2048 * 288.5
    head = 512 * 2 * 155_582_464
    one = layers + attention + head
    assert floors.forward_operations(QWEN3, Samples(1, 1, 64, 512)) == one
    assert floors.training_operations(QWEN3, Samples(256, 1, 64, 512)) == 256 * 3 * one


def test_a_shared_prompt_counts_once() -> None:
    # 64 tokens less for seven of eight samples, which looked back on 32.5 tokens on average.
    spared = 7 * 64 * (2 * 440_401_920 + 4 * 28 * 2048 * 32.5)
    together = floors.forward_operations(QWEN3, Samples(1, 8, 64, 512))
    apart = floors.forward_operations(QWEN3, Samples(8, 1, 64, 512))
    assert apart - together == spared


def test_bytes_of_qwen3_06b_agree_with_those_counted_by_hand() -> None:
    assert QWEN3.key_value_bytes(2) == 114_688
    weights, cache = 595_984_384 * 2, 256 * 320.5 * 114_688
    seconds = floors.decode_step_seconds(QWEN3, RATES, 256, 320.5, 2)
    assert seconds == pytest.approx((weights + cache) / 3e12)
    assert floors.sync_bytes(QWEN3, 2) == 10 * 596_049_920
    assert floors.trainer_state_bytes(QWEN3) == 12 * 596_049_920
    assert floors.optimizer_bytes(QWEN3) == 28 * 596_049_920


def test_a_decode_step_takes_no_less_than_its_arithmetic() -> None:
    slow = replace(RATES, matrix=1e12)
    by_token = 2 * 595_984_384 + 4 * 28 * 2048 * 10
    assert floors.decode_step_seconds(QWEN3, slow, 8, 10, 2) == pytest.approx(8 * by_token / 1e12)


def test_prompts_have_the_length_that_they_are_said_to_have() -> None:
    from transformers import AutoTokenizer

    work = Workload("", prompt_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(TINY_DIRECTORY)
    for row in work.rows()[:3]:
        message = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert len(tokenizer(text)["input_ids"]) == len(row["prompt"]) + CHAT_TOKENS == 64


def test_every_group_has_rewards_that_differ() -> None:
    from kit.samples import Sample

    rewards = [reward(Sample(index=index)) for index in range(256)]
    assert all(len(set(rewards[i : i + 8])) == 2 for i in range(0, 256, 8))


# ---- rows and page -----------------------------------------------------------------------------


def results(parts: dict[str, dict[str, Any]]) -> tuple[Results, Workload]:
    work = Workload("")
    found = Results(
        card={"name": "A Card", "total": 80 << 30, "driver": "1.2"},
        versions={"torch": "2"},
        commands=["python -m benchmarks.gpu"],
        workload={**asdict(work), "small": False},
        model=asdict(QWEN3),
        parts={
            name: PartResult(state="done", measured=measured) for name, measured in parts.items()
        },
    )
    found.rows = rows.of(found, work)
    return found, work


CARD = {"copy": [3e12], "matrix": [8e14], "to_device": [5e10], "to_host": [5e10]}
STEP = {
    "perf/rollout_time": 4.0,
    "perf/actor_train_time": 2.0,
    "perf/update_weights_time": 0.04,
    "perf/step_time": 6.1,
    "wall": 6.1,
}
EVERYTHING: dict[str, dict[str, Any]] = {
    "card": CARD,
    "start": {"cold_seconds": 100.0},
    "engine": {"session": [4.0, 4.1], "stack_1": [1.0], "stack_64": [1.5], "stack_256": [3.9]},
    "log_probs": {"seconds": [0.7]},
    "iteration": {"steps": [STEP, STEP]},
    "sleep": {
        "sync": [0.04],
        "sleep_engine": [0.05],
        "wake_engine": [0.02],
        "sleep_trainer": [0.3],
        "wake_trainer": [0.2],
    },
    "memory": {"phases": [["generate", 40 << 30, 42 << 30], ["update", 20 << 30, None]]},
    "raw_engine": {
        "start_seconds": 50.0,
        "raw_1": [1.0],
        "raw_64": [1.5],
        "raw_256": [3.9],
        "raw_without": [3.5],
    },
    "training": {
        "log_probs": [0.6],
        "alternating_16384": {"seconds": [1.5, 1.6], "peak": 18 << 30},
        "none_32768": {"error": "does not fit"},
    },
    "trl": {"iterations": [[30.0, 20.0], [32.0, 22.0]]},
    "learning": {
        "before": 0.1,
        "after": 0.9,
        "rewards": [0.1, 0.9],
        "differences": [0.01],
    },
    "out_of_memory": {"error": "x: max_tokens_per_gpu", "applied_after": 1},
    "small_card": {
        "gib": 24.0,
        "steps": [20.0, 9.0, 9.0],
        "device_memory": [22 << 30, 22 << 30, 22 << 30],
    },
}


def value(found: Results, name: str, key: str) -> Any:
    return next(row[key] for row in found.rows if row["name"] == name)


def test_a_row_has_ratio_and_share_the_right_way_round() -> None:
    found, work = results(EVERYTHING)
    assert value(found, "`session.step()`", "ratio") == pytest.approx(31 / 6.1)
    assert value(found, "`session.step()`", "met") is True
    session = "`session.generate()`, 256 requests at once"
    assert value(found, session, "ratio") == pytest.approx(3.9 / 4.05)
    assert value(found, session, "met") is False
    operations = floors.training_operations(QWEN3, Samples(256, 1, 64, 512))
    shown = [row for row in found.rows if row["section"] == "Updates: MFU"]
    assert shown[0]["value"] == pytest.approx(100 * operations / 1.55 / 8e14)
    assert all(0 < row["share"] < 1 for row in found.rows if row["share"])
    assert work.samples == 256


@pytest.mark.parametrize("missing", EVERYTHING)
def test_rows_do_without_a_part_that_is_missing(missing: str) -> None:
    found, _ = results({name: part for name, part in EVERYTHING.items() if name != missing})
    assert found.rows


@pytest.mark.parametrize("only", EVERYTHING)
def test_a_part_that_was_cut_off_after_its_first_number_leaves_the_rest_alone(only: str) -> None:
    for names in range(len(EVERYTHING[only])):
        first = dict(list(EVERYTHING[only].items())[: names + 1])
        assert page.page(results({only: first})[0])


def test_the_page_renders_from_a_file_and_has_every_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = results(EVERYTHING)
    found.parts["later"] = PartResult(state="failed", message="OSError: gone\nmore")
    found.write(tmp_path / "results.json")
    gpu.main(["--page", str(tmp_path / "results.json")])
    text = capsys.readouterr().out
    assert text.startswith("# Performance\n")
    assert "A Card" in text
    assert all(f"| {row['name']} |" in text for row in found.rows)
    assert "does not fit" in text
    assert "- later: failed, OSError: gone" in text
    widths = {line.count("|") for line in text.split("## Handing over")[1].splitlines()[2:4]}
    assert len(widths) == 1


# ---- running parts -----------------------------------------------------------------------------


def works(_: Any, work: Workload, report: Report) -> None:
    report.put("answer", [work.samples])


def fails(_: Any, work: Workload, report: Report) -> None:
    report.put("before", 1)
    raise ValueError("on purpose")


def dies(_: Any, work: Workload, report: Report) -> None:
    report.put("before", 1)
    os._exit(3)


def hangs(_: Any, work: Workload, report: Report) -> None:
    report.channel.recv()


def run(parts: list[Part], file: Path, limit: float = 100.0) -> Results:
    shape = asdict(QWEN3)
    kept = Results(model=shape)
    gpu.Run(kept, Workload("", device="cpu"), file, limit, time.time()).all(parts)
    read = Results.read(file)
    assert json.loads(json.dumps(asdict(kept))) == asdict(read)
    return read


@pytest.mark.slow
def test_a_part_that_fails_or_dies_leaves_the_others_and_its_own_first_numbers(
    tmp_path: Path,
) -> None:
    parts = [Part("dies", "", 0, dies), Part("fails", "", 0, fails), Part("works", "", 0, works)]
    found = run(parts, tmp_path / "r.json").parts
    assert [found[name].state for name in ("dies", "fails", "works")] == [
        "failed",
        "failed",
        "done",
    ]
    assert "exit code 3" in found["dies"].message
    assert found["fails"].message == "ValueError: on purpose"
    assert found["dies"].measured == found["fails"].measured == {"before": 1}
    assert found["works"].measured == {"answer": [256]}


@pytest.mark.slow
def test_a_part_that_would_begin_too_late_is_skipped(tmp_path: Path) -> None:
    parts = [Part("long", "", 50, works), Part("short", "", 0, works)]
    found = run(parts, tmp_path / "r.json", limit=40.0).parts
    assert (found["long"].state, found["long"].message) == ("skipped", NO_TIME)
    assert found["short"].state == "done"


def test_a_part_that_hangs_is_ended_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_parts.children.GRACE", 0.0)
    monkeypatch.setattr("benchmarks.gpu_parts.children.FREED_WITHIN", 0.0)
    *_, last = run_apart([Part("hangs", "", 0, hangs)], Workload(""), time.time())
    assert last == ("hangs", "failed", "the time limit came first")


def test_parts_run_in_their_order_and_unknown_ones_are_refused() -> None:
    assert [part.name for part in gpu.chosen("training,card")] == ["card", "training"]
    assert gpu.chosen("") == list(gpu.PARTS)
    with pytest.raises(SystemExit, match="There is no part speed"):
        gpu.chosen("speed")


def test_all_parts_of_a_session_are_neighbours_so_that_they_share_it() -> None:
    hosts = [part.host for part in gpu.PARTS]
    runs = [host for host, _ in groupby(hosts) if host]
    assert len(runs) == len(set(runs)) == 2
