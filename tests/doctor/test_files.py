"""Weights and prompts: whole, incomplete or missing, in folders and caches as they really are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.config import SessionConfig
from kit.doctor import files
from kit.models.source import find
from kit.reports.diagnostics import Finding
from kit.tiny import MODEL_DIR
from tests.hub import drop, put
from tests.small_models import make_model

NAME = "somebody/Qwen3-0.5B"


def shards(folder: Path) -> None:
    """The tiny model in several files with an index, as larger ones come."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        part = {name: weights[name] for name in names[number::3]}
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory of several files."""
    folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "copy"))
    shards(folder)
    return folder


HUB = {"model": {"name": NAME}, "data": {"source": "tiny:addition"}}


@pytest.mark.slow
def test_a_model_in_the_cache_is_whole(kit_doctor: Any, home: Path, model: Path) -> None:
    snapshot = put(home, NAME, model)
    said = kit_doctor(HUB)
    assert said.level("model") == "ok"
    assert f"3.6 MB; whole, in {snapshot}" in said.words


def test_shards_that_a_cache_lacks_are_named_with_the_command_that_fetches_them(
    kit_doctor: Any, home: Path, model: Path
) -> None:
    snapshot = put(home, NAME, model)
    (snapshot / "model-00003-of-00003.safetensors").unlink()  # not yet downloaded
    drop(snapshot, "model-00002-of-00003.safetensors")  # copied without its blob
    said = kit_doctor(HUB)
    assert said.code == 1
    assert said.level("model") == "problem"
    assert "model-00002-of-00003.safetensors is a link to a file that is gone" in said.words
    assert "model-00003-of-00003.safetensors is missing" in said.words
    assert "model-00001" not in said.text
    assert re.search(rf"\$ (\S+/)?hf download {NAME}$", said.text, re.M)
    assert "copy all of models--somebody--Qwen3-0.5B" in said.words


def test_a_directory_whose_copy_was_cut_off_is_a_problem(kit_doctor: Any, model: Path) -> None:
    file = model / "model-00001-of-00003.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    said = kit_doctor({"model": {"name": str(model)}, "data": {"source": "tiny:addition"}})
    assert said.level("model") == "problem"
    assert f"is cut off: {size - 100:,} of {size:,} bytes are there" in said.words


@pytest.mark.slow
def test_pointers_of_git_lfs_are_no_weights(kit_doctor: Any, model: Path) -> None:
    for file in model.glob("*.safetensors"):
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    said = kit_doctor({"model": {"name": str(model)}, "data": {"source": "tiny:addition"}})
    assert "no safetensors file" in said.words


@pytest.mark.slow
def test_a_directory_that_is_not_there_is_a_problem(kit_doctor: Any, tmp_path: Path) -> None:
    gone = tmp_path / "some" / "model"
    said = kit_doctor({"model": {"name": str(gone)}, "data": {"source": "tiny:addition"}})
    assert said.level("model") == "problem"
    assert str(gone) in said.text


@pytest.mark.slow
def test_a_directory_without_tokenizer_or_chat_template_is_told(
    kit_doctor: Any, model: Path
) -> None:
    config = {"model": {"name": str(model)}, "data": {"source": "tiny:addition"}}
    (model / "chat_template.jinja").unlink()
    assert kit_doctor(config).level("chat template") == "problem"
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "there is no tokenizer" in kit_doctor(config).words


@pytest.mark.slow
def test_a_file_of_prompts_that_is_missing_or_malformed_is_told_with_its_row(
    kit_doctor: Any, tmp_path: Path
) -> None:
    config = {"data": {"source": "train.jsonl", "eval_source": "test.jsonl"}}
    said = kit_doctor(config)
    assert said.code == 1
    assert said.level("prompts") == said.level("held-out prompts") == "problem"
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n{"question": "x"}\n')
    said = kit_doctor(config)
    assert "line 2: there is no field 'prompt'" in said.words
    rows = [{"question": "1 + 1?", "answer": "1 + 1 is 2.\n#### 2"}]
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) for row in rows))
    keys = {"input_key": "question", "label_key": "answer"}
    said = kit_doctor({"data": config["data"] | keys})
    assert said.code == 0, said.text
    assert "1 rows of train.jsonl" in said.words
    assert re.search(r"^✓ ok +reward +gsm8k$", said.text, re.M)


@pytest.mark.slow
def test_evaluating_every_few_steps_without_held_out_prompts_is_a_problem(
    kit_doctor: Any, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    config: dict[str, Any] = {"data": {"source": "train.jsonl"}}
    assert kit_doctor(config).level("held-out prompts") == "note"
    config["evaluation"] = {"interval": 5}
    assert kit_doctor(config).level("held-out prompts") == "problem"


SUMS = {
    "source": "somebody/sums:main",
    "eval_source": "somebody/sums:main",
    "input_key": "question",
    "label_key": "answer",
}
PREPARE = """
import sys
from datasets import load_dataset_builder
files = {split: f"{sys.argv[1]}/{split}.jsonl" for split in ("train", "test")}
builder = load_dataset_builder("json", "main", data_files=files)
builder.dataset_name, builder.repo_id, builder.config_id = "sums", "somebody/sums", "main"
builder._output_dir = builder._cache_dir = builder._build_cache_dir()
builder.download_and_prepare()
"""
READ = """
import sys
from kit.config import DataConfig
from kit.data import load_prompts
config = DataConfig(source=sys.argv[1], eval_source=sys.argv[1], input_key="question",
                    label_key="answer")
for split in ("train", "eval"):
    prompts = load_prompts(config, split=split, model_name="any")
    print(len(prompts), prompts.default_reward, prompts[0].label.splitlines()[-1])
"""


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A dataset with the fields and splits of GSM8K, one row and two."""
    folder = tmp_path / "sums" / "main"
    folder.mkdir(parents=True)
    row = json.dumps({"question": "What is 1 + 1?", "answer": "1 + 1 is 2.\n#### 2"})
    (folder / "train.jsonl").write_text(f"{row}\n{row}\n")
    (folder / "test.jsonl").write_text(row)
    return folder


def offline(home: Path, code: str, argument: object) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(argument)],
        env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_dataset_that_was_loaded_before_is_found_and_can_be_read_without_a_network(
    kit_doctor: Any, home: Path, sums: Path
) -> None:
    config = {"data": SUMS}
    assert kit_doctor(config).level("prompts") == "problem"
    offline(home, PREPARE, sums)
    said = kit_doctor(config)
    assert said.level("prompts") == said.level("held-out prompts") == "ok"
    read = offline(home, READ, "somebody/sums:main").splitlines()[-2:]
    assert read == ["2 gsm8k #### 2", "1 gsm8k #### 2"]


@pytest.mark.slow
def test_a_dataset_that_is_only_downloaded_is_named_by_the_folder_that_can_be_read(
    kit_doctor: Any, home: Path, sums: Path
) -> None:
    snapshot = put(home, "somebody/sums", sums.parent, repo_type="dataset")
    said = kit_doctor({"data": SUMS})
    assert said.level("prompts") == said.level("held-out prompts") == "note"
    folder = snapshot / "main"
    assert f"set data.source and data.eval_source to {folder}" in said.words
    said = kit_doctor({"data": SUMS | {"source": str(folder), "eval_source": str(folder)}})
    assert said.level("prompts") == said.level("held-out prompts") == "ok"
    assert offline(home, READ, folder).splitlines() == ["2 gsm8k #### 2", "1 gsm8k #### 2"]


def test_what_is_quantised_is_said_or_why_it_cannot_be() -> None:
    def found(device: str, **settings: Any) -> Finding:
        config = SessionConfig(**settings)
        return files.quantization(config, find(config.model), device)

    fp8 = {"engine": {"quantization": "fp8"}}
    assert found("cpu", **fp8).level == "ok"
    assert "training.use_tis corrects" in found("cpu", **fp8).found
    assert found("cuda", **fp8).level == "problem"
    assert "on a GPU blocks of FP8 are 128 x 128" in found("cuda", **fp8).found
    assert "448 numbers a row" in found("cpu", model={"quantization": "int4"}).found


def test_a_draft_is_looked_at_before_anything_starts(tmp_path: Path) -> None:
    def found(**speculative: Any) -> Finding:
        config = SessionConfig(engine={"speculative": speculative})
        return files.draft(config, find(config.model))

    assert "8 tokens at once" in found(algorithm="ngram").found
    alone = {"algorithm": "standalone", "draft_model": str(MODEL_DIR)}
    assert "it stays as it is" in found(**alone).found
    no_head = found(**alone | {"algorithm": "eagle"})
    assert (no_head.level, "and not LlamaForCausalLMEagle" in no_head.found) == ("problem", True)
    missing = found(**alone | {"draft_model": "nobody/no-such-draft"})
    assert (missing.name, missing.level) == ("draft", "problem")
    no_layer = found(algorithm="mtp")
    assert "mtp was not tried with Qwen3ForCausalLM" in no_layer.found
    mimo = {"model": {"name": str(make_model(tmp_path / "mimo", "MiMo"))}}
    own = SessionConfig(**mimo, engine={"speculative": {"algorithm": "mtp"}})
    tree = own.replace("engine.speculative.eagle_topk", 2)
    assert files.draft(tree, find(own.model)).level == "ok"
    words = files.draft(own, find(own.model)).found
    assert words == "a layer of the model's own, MiMoMTP, 182.0 kB; it stays as it is"
    assert "set engine.speculative.draft_model to its path" in missing.fix
    assert found(**alone | {"draft_model": str(tmp_path)}).level == "problem"


def test_a_family_is_refused_or_named_before_anything_starts(tmp_path: Path) -> None:
    def found(architecture: str, device: str = "cpu", **settings: Any) -> list[Finding]:
        folder = Path(shutil.copytree(MODEL_DIR, tmp_path / architecture, dirs_exist_ok=True))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
        session = SessionConfig(**{"model": {"name": str(folder)} | settings})
        return list(files.family(session, find(session.model), device))

    assert found("Qwen3ForCausalLM") == []
    (told,) = found("NobodyKnowsForCausalLM")
    assert (told.name, told.level) == ("family", "ok")
    assert "NobodyKnowsForCausalLM was not tried" in told.found
    (told,) = found("NobodyKnowsForCausalLM", lora={})
    assert told.level == "problem"
    assert "model.lora was not tried" in told.found
    (told,) = found("StableLmForCausalLM")
    assert told.level == "problem"
