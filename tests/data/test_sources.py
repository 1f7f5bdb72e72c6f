"""Every notation of `data.source`, and what a person is told where one is wrong."""

import gzip
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from kit.config import DataConfig
from kit.data import PromptSet, load_prompts
from kit.data.reasoning_gym import GymRows
from kit.errors import DataError
from kit.rewards import score_samples
from kit.samples import Sample

ROWS = [{"prompt": f"{n}+{n}=", "label": str(2 * n), "metadata": {"n": n}} for n in range(5)]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(source: object, **settings: object) -> PromptSet:
    return load_prompts(DataConfig(source=str(source), **settings), split="train")


def numbers(prompts: PromptSet) -> list[int]:
    return [row.number for row in prompts]


def test_a_jsonl_file_gives_its_rows_with_their_line_numbers(tmp_path: Path) -> None:
    prompts = train(write_jsonl(tmp_path / "sums.jsonl", ROWS))
    assert prompts.name == "sums"
    assert len(prompts) == 5
    assert prompts[3].prompt == "3+3="
    assert prompts[3].label == "6"
    assert prompts[3].metadata == {"n": 3}
    assert numbers(prompts) == [1, 2, 3, 4, 5]


def test_blank_lines_are_skipped_and_still_counted(tmp_path: Path) -> None:
    file = tmp_path / "gaps.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n\n')
    assert numbers(train(file)) == [1, 3]


def test_each_row_keeps_its_own_metadata(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "metadata": {"x": 1}}, {"prompt": "b", "metadata": {"y": [1, "two"]}}]
    prompts = train(write_jsonl(tmp_path / "mixed.jsonl", rows))
    assert [row.metadata for row in prompts] == [{"x": 1}, {"y": [1, "two"]}]


def test_every_file_kind_gives_the_same_prompts_and_labels(tmp_path: Path) -> None:
    import pandas as pd

    files = [write_jsonl(tmp_path / "rows.jsonl", ROWS), tmp_path / "rows.json"]
    files[1].write_text(json.dumps(ROWS))
    table = pd.DataFrame(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.assign(metadata=table["metadata"].map(json.dumps)).to_csv(
        tmp_path / "rows.csv", index=False
    )
    for file in [*files, tmp_path / "rows.parquet", tmp_path / "rows.csv"]:
        prompts = train(file)
        seen = [(row.prompt, row.label, row.metadata) for row in prompts]
        assert seen == [(r["prompt"], r["label"], r["metadata"]) for r in ROWS], file.suffix


def test_csv_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,label\na,007\nb,NA\nc,\n"two\nlines",1.50\n')
    prompts = train(file)
    assert [row.label for row in prompts] == ["007", "NA", None, "1.50"]
    assert prompts[3].prompt == "two\nlines"


def test_a_directory_saved_by_datasets_gives_its_rows_and_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {"train": Dataset.from_list(ROWS[:3]), "test": Dataset.from_list(ROWS[3:])}
    splits["train"].save_to_disk(tmp_path / "one")
    DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert len(train(tmp_path / "one")) == 3
    config = DataConfig(source=str(tmp_path / "two"), eval_source=str(tmp_path / "two"))
    assert len(load_prompts(config, split="train")) == 3
    held_out = load_prompts(config, split="eval")
    assert [row.label for row in held_out] == ["6", "8"]
    assert held_out.name == "two"


def test_a_directory_of_files_is_one_set_of_the_split_that_its_names_say(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-0.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "train-1.jsonl", ROWS[2:4])
    write_jsonl(tmp_path / "test.jsonl", ROWS[4:])
    config = DataConfig(source=str(tmp_path), eval_source=str(tmp_path))
    assert len(load_prompts(config, split="train")) == 4
    assert [r.label for r in load_prompts(config, split="eval")] == ["8"]


def test_rows_in_memory_take_the_place_of_the_source() -> None:
    from datasets import Dataset

    config = DataConfig(source="nowhere.jsonl")
    for rows in (ROWS, Dataset.from_list(ROWS)):
        prompts = load_prompts(config, split="train", override=rows)
        assert [row.label for row in prompts] == ["0", "2", "4", "6", "8"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1:3]", [2, 3]),
        ("[:2]", [1, 2]),
        ("[3:]", [4, 5]),
        ("[-2:]", [4, 5]),
        ("[:-3]", [1, 2]),
        ("[:]", [1, 2, 3, 4, 5]),
        ("[2:100]", [3, 4, 5]),
    ],
)
def test_slices_mean_what_python_slices_mean(
    tmp_path: Path, text: str, expected: list[int]
) -> None:
    from datasets import Dataset

    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert numbers(train(f"{file}@{text}")) == expected
    assert numbers(train(f"{tmp_path / 'saved'}@{text}")) == expected


def test_slices_work_on_tasks_too() -> None:
    assert numbers(train("tiny:addition@[:3]")) == [1, 2, 3]
    assert numbers(train("tiny:addition@[-3:-1]")) == numbers(train("tiny:addition"))[-3:-1]


def test_an_empty_or_unreadable_slice_is_an_error(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for text in ("[5:9]", "[3:3]"):
        with pytest.raises(DataError, match="empty"):
            train(f"{file}@{text}")
    for text in ("[0-3]", "[0:3:1]", "[a:b]", "[0:3"):
        with pytest.raises(DataError, match="cannot be read"):
            train(f"{file}@{text}")


def test_a_broken_line_outside_the_slice_does_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\nnot json\n')
    assert len(train(f"{file}@[:1]")) == 1


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"label": "1"}, ["no field 'prompt'", "label"]),
        ({"promt": "1"}, ["Did you mean 'promt'", "data.input_key"]),
        ({"prompt": 3}, ["'prompt'", "3", "int"]),
        ({"prompt": ""}, ["'prompt'", "empty"]),
        ({"prompt": []}, ["'prompt'"]),
        ({"prompt": ["hi"]}, ["'prompt'", "message 1"]),
        ({"prompt": [{"role": "user", "text": "hi"}]}, ["'content'", "role, text"]),
        ({"prompt": [{"role": "user", "content": 5}]}, ["message 1", "'content'", "5"]),
        ({"prompt": "a", "metadata": "b"}, ["'metadata'", "mapping"]),
        (["prompt", "a"], ["list"]),
    ],
)
def test_a_malformed_row_is_named_by_its_number(
    tmp_path: Path, row: object, named: list[str]
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "fine"}, row, {"prompt": "fine"}])
    with pytest.raises(DataError) as caught:
        train(file)
    for words in [f"{file}, line 2", *named]:
        assert words in str(caught.value)
    with pytest.raises(DataError, match=r"row 2 \(index 1\)"):
        load_prompts(DataConfig(), split="train", override=[{"prompt": "fine"}, row])


def test_a_line_that_is_not_json_is_named_by_file_and_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not JSON"):
        train(file)


def test_numbers_as_labels_become_text_and_missing_ones_none() -> None:
    rows = [{"prompt": "a", "label": value} for value in (3, 2.5, None, "x")] + [{"prompt": "a"}]
    prompts = load_prompts(DataConfig(), split="train", override=rows)
    assert [row.label for row in prompts] == ["3", "2.5", None, "x", None]
    with pytest.raises(DataError, match="'label' is nan"):
        load_prompts(DataConfig(), split="train", override=[{"prompt": "a", "label": float("nan")}])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (72.0, "72"),
        (-0.0, "0"),
        (np.float64(72), "72"),
        (np.int64(72), "72"),
        (0.1 + 0.2, "0.3"),
        (1e22, "10000000000000000000000"),
        (1e-7, "0.0000001"),
        (1.5e300, "1.5e+300"),
        (Decimal("72.00"), "72"),
        (Decimal("72.50"), "72.50"),
        (123456789012345, "123456789012345"),
        ("72.0", "72.0"),
        ("007", "007"),
    ],
)
def test_a_number_is_a_label_as_a_person_writes_it(given: object, text: str) -> None:
    rows = [{"prompt": "a", "label": given}]
    assert load_prompts(DataConfig(), split="train", override=rows)[0].label == text


def test_whole_numbers_beside_a_gap_stay_whole_in_every_kind_of_table(tmp_path: Path) -> None:
    table = pd.DataFrame({"prompt": ["a", "b"], "label": [72, None]})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    assert "72.0" in (tmp_path / "a.csv").read_text()
    for kind in ("parquet", "csv", "jsonl"):
        assert [row.label for row in train(tmp_path / f"a.{kind}")] == ["72", None], kind
    rows = load_prompts(DataConfig(), split="train", override=table)
    assert [row.label for row in rows] == ["72", None]


def test_lists_mappings_and_truth_values_are_kept_for_a_reward_of_ones_own() -> None:
    labels = [["72", "seventy-two"], {"target": 72, "numbers": [1, 2]}, True]
    rows = [{"prompt": "a", "label": label} for label in labels]
    found = load_prompts(DataConfig(), split="train", override=rows)
    assert [row.label for row in found] == labels
    sample = Sample(response="72", label=labels[0])
    assert score_samples([sample], lambda s: float(s.response in s.label))[0].reward == 1.0
    failed = score_samples([sample], "exact")[0]
    assert "the label is a list" in str(failed.error)
    assert sample.label_text == '["72", "seventy-two"]'


def test_fields_inside_others_are_named_with_a_dot(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 7, "note": {"level": 3}},
    }
    keys = {"label_key": "reward_model.ground_truth", "metadata_key": "extra_info.note"}
    as_text = row | {"reward_model": json.dumps(row["reward_model"])}
    pd.DataFrame([row]).to_parquet(tmp_path / "verl.parquet")
    for found in (
        train(write_jsonl(tmp_path / "a.jsonl", [row]), **keys)[0],
        train(write_jsonl(tmp_path / "b.jsonl", [as_text]), **keys)[0],
        train(tmp_path / "verl.parquet", **keys)[0],
        load_prompts(
            DataConfig(**keys), split="train", override=pd.read_parquet(tmp_path / "verl.parquet")
        )[0],
    ):
        assert (found.label, found.metadata) == ("2", {"level": 3})
        assert found.prompt == row["prompt"]
    with pytest.raises(DataError, match=r"'reward_model\.truth', but none of the 1 rows"):
        train(tmp_path / "a.jsonl", label_key="reward_model.truth")


class Indexed:
    """As torch's own datasets are."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def test_every_table_in_memory_gives_the_same_rows() -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "1+1?"}], "label": "2", "metadata": {"level": 1}},
        {"prompt": [{"role": "user", "content": "1+2?"}], "label": "3", "metadata": {"level": 2}},
    ]
    frame = pd.DataFrame(rows)
    dataset = Dataset.from_list(rows)
    tables = {
        "pandas": frame,
        "records of pandas": frame.to_dict("records"),
        "columns": frame.to_dict("list"),
        "anything with length and index": Indexed(rows),
        "arrow": pa.Table.from_pylist(rows),
        "batch": pa.RecordBatch.from_pylist(rows),
        "numpy": dataset.with_format("numpy"),
        "torch": dataset.with_format("torch"),
        "arrays": [r | {"prompt": np.array(r["prompt"], dtype=object)} for r in rows],
        "splits": DatasetDict({"train": dataset, "test": dataset.select([0])}),
    }
    plain = load_prompts(DataConfig(), split="train", override=rows)
    for name, table in tables.items():
        found = load_prompts(DataConfig(), split="train", override=table)
        assert list(found) == list(plain), name


def test_a_map_of_arrow_is_a_mapping(tmp_path: Path) -> None:
    kind = pa.schema([("prompt", pa.string()), ("metadata", pa.map_(pa.string(), pa.int64()))])
    table = pa.table({"prompt": ["a"], "metadata": [[("level", 1)]]}, schema=kind)
    pq.write_table(table, tmp_path / "map.parquet")
    assert train(tmp_path / "map.parquet")[0].metadata == {"level": 1}
    found = load_prompts(DataConfig(), split="train", override=table)
    assert found[0].metadata == {"level": 1}


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="'prompt': 2, 'label': 1"):
        load_prompts(DataConfig(), split="train", override={"prompt": ["a", "b"], "label": ["1"]})


def test_what_has_no_end_says_how_to_take_the_first() -> None:
    with pytest.raises(DataError, match="islice"):
        load_prompts(DataConfig(), split="train", override=({"prompt": "a"} for _ in range(2)))


def test_files_are_read_under_all_their_usual_names(tmp_path: Path) -> None:
    line = b'{"prompt": "a", "label": "1"}\n'
    files = {
        "a.ndjson": line,
        "A.JSONL": line,
        "a.jsonl.gz": gzip.compress(line),
        "lines.json": line + line,
        "data.json": b'{"data": [' + line + b"]}",
        "a.tsv": b"prompt\tlabel\na\t1\n",
        "a.CSV": b"prompt,label\r\na,1\r\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        row = train(tmp_path / name)[0]
        assert (row.prompt, row.label) == ("a", "1"), name
    (tmp_path / "long.csv").write_text('prompt,label\n"' + "x" * 200_000 + '",1\n')
    assert len(train(tmp_path / "long.csv")[0].prompt) == 200_000


def test_chat_messages_are_kept_as_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert train(write_jsonl(tmp_path / "chat.jsonl", [{"prompt": messages}]))[0].prompt == messages


def test_other_fields_can_hold_prompt_label_and_metadata(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "qa.jsonl", [{"question": "1+1", "answer": 2, "info": {"a": 1}}])
    keys = {"input_key": "question", "label_key": "answer", "metadata_key": "info"}
    row = train(file, **keys)[0]
    assert (row.prompt, row.label, row.metadata) == ("1+1", "2", {"a": 1})
    with pytest.raises(DataError, match=r"data\.label_key is 'anwser'.*\n.*Did you mean 'answer'"):
        train(file, **keys | {"label_key": "anwser"})


def test_a_missing_file_is_named_with_its_whole_path_and_near_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    with pytest.raises(DataError) as caught:
        train(tmp_path / "promts.jsonl")
    assert str(tmp_path / "promts.jsonl") in str(caught.value)
    assert "'prompts.jsonl'" in str(caught.value)
    with pytest.raises(DataError, match="does not exist either"):
        train(tmp_path / "nowhere" / "prompts.jsonl")


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    contents = {
        "table.txt": (b"prompt", r"cannot be read: \.txt"),
        "empty.jsonl": (b"\n", "has no rows"),
        "object.json": (b'{"prompt": "a"}', "a dict, not a list"),
        "lines.json": (b'{"prompt": "a"}\n{"prompt": "b"', r"line 2: not JSON"),
        "semicolons.csv": (b"prompt;label\na;1\n", "separated by ';'"),
        "twice.csv": (b"prompt,label,label\na,1,2\n", "'label' more than once"),
        "cut.jsonl.gz": (b"\x1f\x8b\x08", "cannot be read"),
        "strings.json": (b'["{}"]', "not a mapping"),
        "latin.jsonl": ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8 text: byte 12"),
        "broken.parquet": (b"PAR1", "cannot be read as Parquet"),
    }
    for name, (content, words) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=words):
            train(tmp_path / name)
    with pytest.raises(DataError, match=r"\.jsonl, \.ndjson, \.json, \.csv, .*\.gz"):
        train(tmp_path / "table.txt")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no dataset"):
        train(tmp_path / "bare")
    with pytest.raises(DataError, match="empty"):
        load_prompts(DataConfig(), split="train", override=[])


def test_a_hub_dataset_that_cannot_be_reached_says_how_to_use_a_local_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Both libraries read the variable once, when they are imported.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        train("nobody-at-all/no-such-data:main")
    for words in ("'nobody-at-all/no-such-data:main'", "hf download", "data.source"):
        assert words in str(caught.value)


def test_the_source_follows_the_model_where_none_is_set() -> None:
    tiny = load_prompts(DataConfig(), split="train", model_name="tiny")
    assert (tiny.name, tiny.default_reward) == ("addition", "exact")
    assert tiny.max_response_len
    other = load_prompts(DataConfig(), split="train", model_name="Qwen/Qwen3-0.6B")
    assert (other.name, other.default_reward) == ("gsm_symbolic", "reasoning_gym")
    assert other.max_response_len is None


def test_a_task_brings_its_held_out_split_and_a_file_brings_none(tmp_path: Path) -> None:
    for task in ("tiny:addition", "tiny:chain", "reasoning_gym:gsm_symbolic"):
        config = DataConfig(source=f"{task}@[:300]", size=500, eval_size=200)
        asked = {row.prompt for row in load_prompts(config, split="train")}
        held_out = load_prompts(config, split="eval")
        assert held_out.name == task.partition(":")[2]
        assert len(held_out) >= 200
        assert asked.isdisjoint(row.prompt for row in held_out)
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    assert load_prompts(DataConfig(source=str(file)), split="eval") is None
    config = DataConfig(source=str(file), eval_source="tiny:chain")
    assert load_prompts(config, split="eval").name == "chain"


def test_generated_rows_follow_the_seed_and_held_out_ones_do_not() -> None:
    config = DataConfig(source="reasoning_gym:leg_counting", size=20, eval_size=20)

    def prompts(split: str, seed: int) -> list[object]:
        return [row.prompt for row in load_prompts(config, split=split, seed=seed)]

    assert prompts("train", 1) == prompts("train", 1)
    assert set(prompts("train", 1)).isdisjoint(prompts("train", 2))
    assert prompts("eval", 1) == prompts("eval", 2)


def test_splits_stay_disjoint_where_a_task_has_few_questions() -> None:
    asked, held_out = (
        {row.prompt for row in GymRows("coin_flip", split, 60, 0)} for split in ("train", "eval")
    )
    assert asked
    assert held_out
    assert asked.isdisjoint(held_out)


def test_generated_rows_know_their_place_in_a_slice() -> None:
    whole = train("reasoning_gym:chain_sum", size=10)
    part = train("reasoning_gym:chain_sum@[-3:]", size=10)
    assert [row.prompt for row in part] == [row.prompt for row in whole[-3:]]
    assert numbers(part) == [8, 9, 10]


def test_labels_that_are_gsm8k_solutions_are_graded_as_such(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "label": "One and one.\n#### 2"}]
    assert train(write_jsonl(tmp_path / "gsm.jsonl", rows)).default_reward == "gsm8k"
    assert train(write_jsonl(tmp_path / "plain.jsonl", ROWS)).default_reward == "exact"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tiny:adition", "Did you mean 'addition'"),
        ("reasoning_gym:gsm_symbolik", "Did you mean 'gsm_symbolic'"),
        ("reasoninggym:gsm_symbolic", "Did you mean 'reasoning_gym'"),
        ("chain", "'tiny:chain'"),
    ],
)
def test_a_misspelt_task_gets_a_suggestion(source: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        train(source)


def test_importing_data_and_rewards_is_light() -> None:
    heavy = "torch transformers datasets reasoning_gym math_verify sympy ray pyarrow numpy"
    code = f"import sys, kit.data, kit.rewards; print(set('{heavy}'.split()) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
