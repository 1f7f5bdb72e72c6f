"""A model that was trained here, loaded by Transformers: the same tokenizer, the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kit import RLSession
from kit.checkpoint.export import copy_beside
from kit.errors import CheckpointError, SessionError
from kit.models.source import INDEX
from kit.trainer import hf_export
from tests.small_models import mixture_of_experts
from tests.trainer.trainers import Make, batch, make

__all__ = ["make"]  # a fixture


def response_log_probs(
    model: Any, tokens: list[int], count: int, temperature: float = 1.0
) -> list[float]:
    with torch.no_grad():
        logp = (model(torch.tensor([tokens])).logits[0] / temperature).log_softmax(-1)
    places = range(len(tokens) - count, len(tokens))
    return [float(logp[place - 1, tokens[place]]) for place in places]


def test_transformers_loads_an_export_and_gives_the_trainers_log_probs(
    session: RLSession, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    session.train(2, show=False)
    path = session.export_hf(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    samples = [s for s in session.generate() if s.response_length][:8]
    for sample, expected in zip(samples, session.log_probs(samples), strict=True):
        found = response_log_probs(model, sample.tokens, sample.response_length)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template == session.tokenizer.chat_template
    text = samples[0].prompt_text
    assert tokenizer(text)["input_ids"] == session.tokenizer(text)["input_ids"]
    assert model.generation_config.eos_token_id is not None
    assert json.loads((path / "manifest.json").read_text())["step"] == 2


def test_an_export_in_bfloat16_is_half_as_large(session: RLSession, tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        path = session.export_hf(tmp_path / "model", dtype=dtype)  # takes the other one's place
        sizes[dtype] = (path / "model.safetensors").stat().st_size
        assert json.loads((path / "config.json").read_text())["dtype"] == dtype
    assert sizes["bfloat16"] == pytest.approx(sizes["float32"] / 2, rel=0.05)
    with pytest.raises(SessionError, match="no dtype 'bfloat'"):
        session.export_hf(tmp_path / "other", dtype="bfloat")  # type: ignore[arg-type]
    with pytest.raises(SessionError, match="no adapter to export"):
        session.export_hf(tmp_path / "other", adapter=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("names_it", ["config.json", "tokenizer_config.json", None])
def test_an_export_has_the_code_that_its_model_brings_along_and_no_other(
    tmp_path: Path, names_it: str | None
) -> None:
    model, folder = tmp_path / "model", tmp_path / "exported"
    for each in (model, folder):
        each.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        code = {"auto_map": {"Auto": "own.Model"}} if name == names_it else {}
        (model / name).write_text(json.dumps({"torch_dtype": "float32"} | code))
    names = ("own.py", "own_parts.py", "own.tiktoken", "tokenizer.json")
    for name in names:
        (model / name).write_text("raise SystemExit")
    (model / "train.log").write_text("")
    copy_beside(model, folder, dtype="bfloat16")
    copied = {file.name for file in folder.iterdir()} - {"config.json", "tokenizer_config.json"}
    assert copied == {name for name in names if names_it or not name.endswith(".py")}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_overwrites_nothing_else_and_is_no_checkpoint(
    session: RLSession, tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    saved = session.save(tmp_path / "saved")
    for there in (tmp_path / "thesis", saved):
        with pytest.raises(CheckpointError, match="is no export"):
            session.export_hf(there)
    path = session.export_hf(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        session.save(path)
    with pytest.raises(CheckpointError, match="is a model for Transformers"):
        RLSession.load(path)


@pytest.mark.parametrize("file_bytes", [hf_export.FILE_BYTES, 60_000])
def test_experts_and_files_of_bounded_size_are_loaded_as_they_were(
    make: Make, tmp_path: Path, file_bytes: int
) -> None:
    from transformers import AutoModelForCausalLM

    trainer = make(mixture_of_experts(tmp_path / "moe"), learning_rate=1e-2)
    trainer.update(batch(), "a")
    folder = tmp_path / "export"
    folder.mkdir()
    size = hf_export.export(trainer.backend, str(folder), "float32", file_bytes=file_bytes)
    (folder / "config.json").write_bytes((tmp_path / "moe" / "config.json").read_bytes())
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (file_bytes < size)
    assert ((folder / INDEX).is_file()) == (len(files) > 1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = batch()
    rows = trainer.log_probs(given.tokens, given.response_lengths)
    model_rows = [
        response_log_probs(model, tokens, count, trainer.settings.temperature)
        for tokens, count in zip(given.tokens, given.response_lengths, strict=True)
    ]
    for row, expected in zip(model_rows, rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
