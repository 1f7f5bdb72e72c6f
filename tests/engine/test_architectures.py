"""Which of SGLang's models are imported."""

import json
import os
from pathlib import Path

import pytest

from kit.engine.patches import DISABLED, EXTERNAL, import_only
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
