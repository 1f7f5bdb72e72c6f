"""`session.export_hf`: writes the model in the Hugging Face format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from kit.checkpoint import manifest
from kit.checkpoint.checkpoint import own_folder
from kit.config import QuantizationConfig
from kit.errors import SessionError, did_you_mean
from kit.models.adapters import IN_4_BITS
from kit.models.source import is_hub_name, mtp_weights
from kit.utils.interrupts import held
from kit.utils.reading import read_json

if TYPE_CHECKING:
    from kit.config import SessionConfig
    from kit.models.source import ModelSource
    from kit.stack.stack import Stack


Dtype = Literal["float32", "bfloat16"]
Method = Literal["fp8", "int4"]
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)
"""Files of a model directory that make its tokenizer."""
BESIDE = ("config.json", "generation_config.json", *TOKENIZER)
"""Files of a model directory that training does not change."""
CODE = "*.py"
"""Python code that a model brings along, without which nothing could load it. It is not run."""
NAME_CODE = ("config.json", "tokenizer_config.json")
"""Files that say in `auto_map` which code is a model's."""


def export_hf(
    stack: Stack,
    config: SessionConfig,
    step: int,
    path: str | Path | None,
    dtype: Dtype | None,
    *,
    adapter: bool = False,
    quantization: Method | None = None,
    draft: bool = False,
) -> Path:
    """Write the directory and return its path; see `RLSession.export_hf`.

    Raises:
        CheckpointError: it cannot be written.
        SessionError: there is no such dtype, no adapter, no draft that was trained, or adapters or
            a draft are to be quantised.
        ModelError: the model cannot be quantised so.
    """
    quantized = _quantized(config, stack.model, quantization)
    _check(config, dtype, adapter=adapter, quantized=quantized is not None, draft=draft)
    kind = "adapter" if adapter else "draft" if draft else "hf"
    name = f"{config.name}-step-{step:06d}-{kind}"
    target = (Path(path) if path is not None else own_folder(None) / name).absolute()
    with manifest.new_folder(target, "export") as folder:
        wanted = dtype or ("float32" if adapter else stack.dtype)
        model, named = Path(stack.model.path), config.model.name
        if draft and stack.settings.draft and config.engine.speculative:
            model = Path(stack.settings.draft.path)
            named = config.engine.speculative.draft_model or ""
        base = (named if is_hub_name(named) else str(model)) if adapter else None
        with held():  # trainers that nobody waits for would write on into a folder that goes away
            of = "draft" if draft else "policy"
            stack.export_hf(str(folder), wanted, base, quantized, of)
        if adapter:
            copy_tokenizer(model, folder)
        else:
            copy_beside(model, folder, dtype=wanted, quantized=quantized)
        facts = {
            "session": config.name,
            "step": step,
            "weight_version": stack.trainers.version,
            "made_from": named,
            "dtype": wanted,
        }
        if config.model.lora and config.model.lora.load_in_4bit:
            facts |= IN_4_BITS
        if quantized:
            facts["quantization"] = quantized.model_dump(exclude_none=True)
        manifest.seal(folder, "export", facts)
    return target


def _check(
    config: SessionConfig, dtype: Dtype | None, *, adapter: bool, quantized: bool, draft: bool
) -> None:
    """Raise SessionError for what a session does not have, or cannot write."""
    if draft and (adapter or quantized):
        raise SessionError(
            "A draft has no adapter, and is not quantised.", fix="export one after the other."
        )
    own = config.engine.speculative
    if draft and own and own.algorithm == "mtp":
        raise SessionError(
            "There is no draft to export: what drafts is a layer of the model.",
            fix="call session.export_hf() without draft, which writes that layer, too.",
        )
    if draft and config.training.draft is None:
        raise SessionError(
            "There is no draft to export: this session trains none.",
            fix="start one with training.draft; a draft that is not trained is where "
            "engine.speculative.draft_model says.",
        )
    if adapter and config.model.lora is None:
        raise SessionError(
            "There is no adapter to export: this session trains all weights.",
            fix="call session.export_hf() without adapter, or start a session with model.lora.",
        )
    if dtype is not None and dtype not in (known := get_args(Dtype)):
        raise SessionError(f"There is no dtype {dtype!r}.", fix=did_you_mean(dtype, known))


def copy_tokenizer(model: Path, folder: Path) -> None:
    """Copy a model's tokenizer and chat template."""
    _copy(model, folder, TOKENIZER)


def _copy(model: Path, folder: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for file in model.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def copy_beside(
    model: Path,
    folder: Path,
    *,
    dtype: str | None = None,
    quantized: QuantizationConfig | None = None,
) -> None:
    """Copy what a model's directory holds beside its weights; config.json says what has changed.

    Args:
        model: the directory.
        folder: where to.
        dtype: of the weights there; None leaves what config.json says.
        quantized: how linear layers are quantised there.
    """
    _copy(model, folder, (*BESIDE, *((CODE,) if _brings_code(model) else ())))
    config = read_json(folder / "config.json", unique=False)
    if dtype is not None:
        config.pop("torch_dtype", None)  # the older name
        config["dtype"] = dtype
    if quantized:
        from kit.models.low_precision import config_entry

        config["quantization_config"] = config_entry(quantized)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _quantized(
    config: SessionConfig, model: ModelSource, method: Method | None
) -> QuantizationConfig | None:
    """How an export is quantised: as the session, where it is by this method."""
    if method is None:
        return None
    if config.model.lora is not None:
        raise SessionError(
            "A model with adapters is not exported quantised: nobody has compared what comes out.",
            fix="export it merged, and quantise that directory: kit quantize MODEL OUT.",
        )
    if method not in (known := get_args(Method)):
        raise SessionError(f"There is no quantization {method!r}.", fix=did_you_mean(method, known))
    from kit.models.low_precision import check_model

    own = config.quantization
    quantized = own if own and own.method == method else QuantizationConfig(method=method)
    check_model(model, quantized)
    if mtp_weights(Path(model.path)):
        raise SessionError(
            "A model with layers that predict further tokens is not exported quantised: nobody has "
            "compared what comes out.",
            fix="export it without quantization.",
        )
    return quantized


def _brings_code(model: Path) -> bool:
    named = (model / name for name in NAME_CODE)
    return any("auto_map" in read_json(file, unique=False) for file in named if file.is_file())
