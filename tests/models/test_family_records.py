"""Records of families say what is there, and refuse what was not tried, before anything starts."""

from __future__ import annotations

import json
import runpy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kit.engine.families as mended
from kit import SessionConfig
from kit.errors import ConfigError, ModelError
from kit.models.families import MODULES, Family, all_families, check_rotation, find
from tests.small_models import FAMILIES

DOCS = Path(__file__).parents[2] / "docs"
MENDS = Path(mended.__file__).parent
NO_MENDS = {"__init__", "making"}
OWN = {"MiMoForCausalLM", "NanoChat2026ForCausalLM"}
"""Models that Transformers lacks, of classes of the kit's."""


def config(**settings: Any) -> SessionConfig:
    return SessionConfig(**{"model": {"name": "tiny"}} | settings)


def test_each_architecture_has_one_record_and_is_a_class_of_transformers() -> None:
    names = [family.architecture for family in all_families()]
    assert len(names) == len(set(names))
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *OWN}
    assert set(names) <= known, set(names) - known
    files = {
        file.stem
        for file in Path(import_module(Family.__module__).__file__ or "").parent.glob("*.py")
    }
    assert files == {*MODULES, "__init__", "exact", "record"}


def test_each_family_that_is_tested_has_a_record() -> None:
    tested = {f"{family.partition(',')[0]}ForCausalLM" for family in FAMILIES}
    recorded = {family.architecture for family in all_families()}
    assert tested <= recorded
    refused = {family.architecture for family in all_families() if family.refused}
    assert recorded - tested <= refused | OWN


def test_each_mend_is_there_and_is_asked_for() -> None:
    asked = {name for family in all_families() for name in family.mends}
    assert asked == {file.stem for file in MENDS.glob("*.py")} - NO_MENDS
    for name in asked:
        assert callable(import_module(f"kit.engine.families.{name}").register)


def test_layers_that_carry_a_state_are_those_of_transformers() -> None:
    for family in all_families():
        for name in family.carries_state:
            kind = getattr(transformers, family.architecture)
            assert hasattr(import_module(kind.__module__), name), name


def test_a_family_that_nobody_has_recorded_is_tried_without_adapters_and_replay() -> None:
    unknown = find("NobodyKnowsForCausalLM")
    unknown.check(config(), "nowhere", "cpu")
    unknown.check(config(), "nowhere", "cuda")
    with pytest.raises(ConfigError, match=r"(?s)model.lora was not tried.*docs/models.md"):
        unknown.check(config(model={"name": "tiny", "lora": {}}), "nowhere", "cpu")
    replayed = config(training={"use_rollout_routing_replay": True})
    with pytest.raises(ConfigError, match="use_rollout_routing_replay was not tried"):
        unknown.check(replayed, "nowhere", "cpu")
    replayed = config(training={"use_routing_replay": True})
    with pytest.raises(ConfigError, match=r"training\.use_routing_replay was not tried"):
        unknown.check(replayed, "nowhere", "cpu")


def test_adapters_of_sglangs_own_take_a_flag_of_their_own() -> None:
    merged, own = (
        config(model={"name": "tiny", "lora": {}}, engine={"lora": way})
        for way in ("merged", "adapter")
    )
    family = Family("SomeForCausalLM", adapts=True)
    family.check(merged, "nowhere", "cpu")
    with pytest.raises(ConfigError, match="set it merged"):
        family.check(own, "nowhere", "cpu")
    Family("SomeForCausalLM", adapts=True, engine_adapts=True).check(own, "nowhere", "cpu")


def test_refusals_come_with_their_reason_by_family_device_and_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gate_up_proj"):
        find("Llama4ForCausalLM").check(config(), "nowhere", "cpu")
    on_gpu = Family("SomeForCausalLM", refused_on={"cuda": "no kernel"})
    on_gpu.check(config(), "nowhere", "cpu")
    with pytest.raises(ModelError, match=r"(?s)on cuda.*no kernel"):
        on_gpu.check(config(), "nowhere", "cuda")
    cohere = find("CohereForCausalLM")
    for tied in (True, False):
        (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        if tied:
            cohere.check(config(), str(tmp_path), "cpu")
        else:
            with pytest.raises(ModelError, match="output layer"):
                cohere.check(config(), str(tmp_path), "cpu")


def test_quantised_files_are_refused_where_families_are_published_so(tmp_path: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    path = described(tmp_path, "GptOssForCausalLM", **quantised)
    with pytest.raises(ModelError, match=r"quantised weights \(mxfp4\)"):
        find("GptOssForCausalLM").check(config(), path, "cpu")
    find("GptOssForCausalLM").check(config(), described(tmp_path, "GptOssForCausalLM"), "cpu")


def test_layers_of_full_attention_come_as_regularly_as_sglang_has_them(tmp_path: Path) -> None:
    linear, full = "linear_attention", "full_attention"
    found = []
    for kinds in ([linear, full] * 2, [linear] * 3 + [full], [full, linear, linear]):
        path = described(tmp_path, "Qwen3NextForCausalLM", layer_types=kinds)
        told = json.loads(mended.server_arguments(path, "cpu")["json_model_override_args"])
        found.append(told["full_attention_interval"])
    assert found == [2, 4, 0]
    with pytest.raises(ModelError, match="layer_types differ"):
        find("Qwen3NextForCausalLM").check(config(), path, "cpu")


def described(folder: Path, architecture: str, **settings: Any) -> str:
    text = json.dumps({"architectures": [architecture]} | settings)
    (folder / "config.json").write_text(text)
    return str(folder)


def test_sglang_is_told_what_its_reading_of_the_files_lacks(tmp_path: Path) -> None:
    path = described(tmp_path, "Gemma2ForCausalLM", hidden_activation="gelu_pytorch_tanh")
    told = json.loads(mended.server_arguments(path, "cpu")["json_model_override_args"])
    assert told["hidden_act"] == "gelu_pytorch_tanh"
    path = described(tmp_path, "GptOssForCausalLM")
    assert mended.server_arguments(path, "cpu")["attention_backend"] == "triton"
    assert "attention_backend" not in mended.server_arguments(path, "cuda")
    rotation = {"rope_type": "default", "rope_theta": 5e4}
    path = described(
        tmp_path, "Exaone4ForCausalLM", sliding_window_pattern=4, rope_parameters=rotation
    )
    told = json.loads(mended.server_arguments(path, "cpu")["json_model_override_args"])
    assert told == {"sliding_window_pattern": "LLLG", "rope_theta": 5e4}
    assert mended.server_arguments(described(tmp_path, "LlamaForCausalLM"), "cpu") == {}
    assert mended.server_arguments(str(tmp_path / "nowhere"), "cpu") == {}


def test_windows_are_those_of_transformers_by_layer() -> None:
    from kit.engine.families.windows import windows

    common = {"num_hidden_layers": 3, "sliding_window": 8}
    mistral = transformers.MistralConfig(**common)
    assert windows(mistral, "MistralForCausalLM") == [8, 8, 8]
    mistral = transformers.MistralConfig(**common | {"sliding_window": None})
    assert windows(mistral, "MistralForCausalLM") == [0, 0, 0]
    qwen = transformers.Qwen2Config(**common, use_sliding_window=True, max_window_layers=1)
    assert windows(qwen, "Qwen2ForCausalLM") == [0, 8, 8]
    qwen = transformers.Qwen2Config(**common, use_sliding_window=False)
    assert windows(qwen, "Qwen2ForCausalLM") == [0, 0, 0]
    qwen = transformers.Qwen3MoeConfig(**common, use_sliding_window=True)
    assert windows(qwen, "Qwen3MoeForCausalLM") == [8, 8, 8]
    assert windows(transformers.LlamaConfig(num_hidden_layers=2), "LlamaForCausalLM") == [0, 0]


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        (
            {"rope_parameters": {"rope_type": "longrope"}, "original_max_position_embeddings": 64},
            64,
        ),
        ({"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 64}, 64),
        (
            {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}},
            32,
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 128),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, 128),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 32}}, None),
        ({"rope_scaling": None}, None),
    ],
)
def test_a_rotation_that_depends_on_the_batch_is_refused_where_a_session_can_meet_it(
    tmp_path: Path, settings: dict[str, Any], limit: int | None
) -> None:
    path = described(tmp_path, "Phi3ForCausalLM", max_position_embeddings=128, **settings)
    check_rotation(path, limit or 10_000)
    if limit:
        with pytest.raises(ModelError, match=rf"set model\.context_length: {limit}\."):
            check_rotation(path, limit + 1)


WAYS = {
    "adapts": "merged",
    "engine_adapts": "adapter",
    "replays": "replay",
    "drafts": "drafts",
    "exact": "exact",
}
"""Flag of a record, and the way in which docs/make_models.py measures what it says."""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    results: dict[str, Any] = json.loads((DOCS / "models.json").read_text())
    return results


def test_every_tiny_model_was_measured_and_is_refused_where_the_tests_expect_it(
    measured: dict[str, Any],
) -> None:
    from tests.diagnostics.test_agreement import REFUSED

    assert set(measured) == set(FAMILIES)
    assert {name for name, own in measured.items() if "refused" in own["plain"]} == set(REFUSED)


@pytest.mark.parametrize("flag", WAYS)
def test_a_record_says_of_a_family_what_was_measured(measured: dict[str, Any], flag: str) -> None:
    for family in all_families():
        if family.architecture in OWN:
            continue
        kind = family.architecture.removesuffix("ForCausalLM")
        tried = [
            own[WAYS[flag]]
            for name, own in measured.items()
            if name.partition(",")[0] == kind and WAYS[flag] in own
        ]
        right = [one for one in tried if one.get("updated", 1.0) <= 1e-4 >= one["mismatch"]]
        assert getattr(family, flag) == bool(tried and len(right) == len(tried)), kind


def test_the_page_has_the_table_of_what_was_measured(measured: dict[str, Any]) -> None:
    made = runpy.run_path(str(DOCS / "make_models.py"))
    rows = made["table"](measured)
    assert f"{made['BEGIN']}\n{rows}{made['END']}" in (DOCS / "models.md").read_text("utf-8")
