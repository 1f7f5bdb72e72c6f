"""Which of SGLang's models are imported."""

import json
import os
from pathlib import Path

import pytest

from kit.engine.patches import DISABLED, EXTERNAL, OWN_MODELS, import_only
from kit.models.source import TINY_DIRECTORY


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DISABLED, EXTERNAL):
        monkeypatch.setenv(name, "")


def left_out() -> list[str]:
    return os.environ[DISABLED].split(",")


def test_all_models_but_the_one_of_this_architecture_are_left_out() -> None:
    import_only(str(TINY_DIRECTORY))
    assert {"llama", "gemma3n_audio", "qwen2"} <= set(left_out())
    assert "qwen3" not in left_out()
    assert len(left_out()) > 150


@pytest.mark.parametrize("architectures", [["NobodyKnowsForCausalLM"], [], None])
def test_an_architecture_that_sglang_does_not_have_leaves_none_out(
    tmp_path: Path, architectures: list[str] | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    import_only(str(tmp_path))
    assert os.environ[DISABLED] == ""


def model_of(folder: Path, architecture: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return str(folder)


def test_a_model_that_only_the_kit_has_is_told_of_and_all_of_sglangs_are_left_out(
    tmp_path: Path,
) -> None:
    import_only(model_of(tmp_path / "own", "NanoChatForCausalLM"))
    assert os.environ[EXTERNAL] == OWN_MODELS
    assert {"llama", "qwen3"} <= set(left_out())


def test_beside_a_model_of_the_kit_one_of_sglangs_stays(tmp_path: Path) -> None:
    import_only(model_of(tmp_path / "own", "NanoChatForCausalLM"), str(TINY_DIRECTORY))
    assert os.environ[EXTERNAL] == OWN_MODELS
    assert "llama" in left_out()
    assert "qwen3" not in left_out()


def test_for_sglangs_models_there_are_none_of_the_kit() -> None:
    import_only(str(TINY_DIRECTORY))
    assert os.environ[EXTERNAL] == ""


@pytest.mark.parametrize("name", [DISABLED, EXTERNAL])
def test_what_the_environment_says_of_it_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "mine")
    import_only(str(TINY_DIRECTORY))
    assert os.environ[DISABLED] == ("mine" if name == DISABLED else "")


@pytest.mark.in_sglang
def test_sglang_still_has_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLED, "")
    import_only(str(TINY_DIRECTORY))
    from sglang.srt.models.registry import import_model_classes

    found = import_model_classes("sglang.srt.models")
    assert "Qwen3ForCausalLM" in found
    assert "LlamaForCausalLM" not in found


@pytest.mark.in_sglang
def test_sglang_finds_the_kits_models() -> None:
    from sglang.srt.models.registry import import_model_classes

    assert "NanoChatForCausalLM" in import_model_classes(OWN_MODELS, strict=True)
