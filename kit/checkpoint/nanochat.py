"""`kit import nanochat`: a checkpoint of nanochat as a model's directory.

nanochat (https://github.com/karpathy/nanochat) writes a step's weights as `model_000650.pt`, their
sizes as `meta_000650.json`, and its tokenizer into a folder of its own. Which versions of it are
known, and what they compute, stands in `nanochat_versions.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kit.checkpoint import manifest, nanochat_tokenizer
from kit.checkpoint.nanochat_versions import Version
from kit.errors import ModelError
from kit.utils.reading import open_regular, read_json

if TYPE_CHECKING:
    import torch

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_STEP = re.compile(r"model_(\d+)\.pt")
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Imported:
    """What was written."""

    path: Path
    step: int
    parameters: int
    texts: int
    """Texts on which the tokenizer was compared with tiktoken."""

    def __str__(self) -> str:
        """Say so in a few lines."""
        return (
            f"{self.path}\nstep {self.step}, {self.parameters:,} parameters; its tokenizer gives "
            f"tiktoken's ids on all {self.texts:,} texts"
        )


def import_nanochat(
    directory: Path,
    out: Path,
    *,
    step: int | None = None,
    tokenizer: Path | None = None,
    dtype: Dtype = "float32",
) -> Imported:
    """Write a checkpoint of nanochat as a directory that sessions and Transformers load.

    Args:
        directory: holds `model_*.pt` and `meta_*.json`.
        out: the directory to write; an export that is there is replaced.
        step: of several; None takes the last one.
        tokenizer: folder or file of `tokenizer.pkl`; None looks where nanochat puts it.
        dtype: of the weights that are written; float32 keeps every number.

    Raises:
        ModelError: it is none, its version is not known, or its tokenizer cannot be had.
        CheckpointError: it cannot be written, or something else is in the way.
    """
    number = _step(directory, step)
    meta, pattern = _read_meta(directory / f"meta_{number}.json")
    encoding = nanochat_tokenizer.read(_tokenizer_file(directory, tokenizer))
    if len(encoding) != meta["vocab_size"]:
        raise ModelError(
            f"The tokenizer has {len(encoding):,} tokens, the model {meta['vocab_size']:,}.",
            fix="name the tokenizer.pkl that the model was trained with: --tokenizer FILE.",
        )
    weights = _read_weights(directory / f"model_{number}.pt")
    version = Version(meta, pattern, "smear_gate.weight" in weights)
    version.check(weights)
    target = out.absolute()
    with manifest.new_folder(target, "export") as folder:
        built = nanochat_tokenizer.build(encoding, meta["sequence_len"])
        built.save_pretrained(folder)
        texts = nanochat_tokenizer.compare(encoding, _loaded(folder))
        inner = len(weights["transformer.h.0.mlp.c_fc.weight"])
        _write_settings(folder, version.settings(inner) | {"dtype": dtype}, encoding)
        size = _write_weights(folder, weights, version, dtype)
        facts = {"made_from": str(directory.absolute()), "step": int(number), "dtype": dtype}
        manifest.seal(folder, "export", facts)
    return Imported(target, int(number), size, texts)


def _step(directory: Path, step: int | None) -> str:
    """A step's number as its files have it, with zeros in front."""
    names = [file.name for file in directory.glob("model_*.pt")] if directory.is_dir() else []
    found = {int(m[1]): m[1] for name in names if (m := _STEP.fullmatch(name))}
    wanted = max(found, default=0) if step is None else step
    if wanted in found:
        return found[wanted]
    below = sorted({str(file.parent) for file in directory.glob("*/**/model_*.pt")})[:8]
    if found:
        why = f"Its steps are {', '.join(map(str, sorted(found)))}."
    else:
        why = f"There are some in {', '.join(below)}." if below else ""
    raise ModelError(
        f"{directory} has no model_*.pt" + (f" of step {step}." if step is not None else "."),
        why=why,
        fix="give one of nanochat's checkpoint folders, such as chatsft_checkpoints/d20.",
    )


def _read_meta(file: Path) -> tuple[dict[str, int], str]:
    """Sizes of the model, and its pattern of windows; `L` has none."""
    try:
        meta = read_json(file)["model_config"]
        sizes = {name: meta[name] for name in SIZES}
        if not all(type(size) is int and size > 0 for size in sizes.values()):
            raise ValueError(f"not all sizes in it are whole numbers above 0: {sizes}")
        if sizes["n_embd"] % sizes["n_head"] or sizes["n_head"] % sizes["n_kv_head"]:
            raise ValueError(f"its heads do not divide its width: {sizes}")
        pattern = str(meta.get("window_pattern") or "L")
        if set(pattern.upper()) - set("SL"):
            raise ValueError(f"window_pattern is {pattern!r}, which has other letters than S and L")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file} does not describe a model of nanochat.",
            why=f"{type(error).__name__}: {error}",
            fix="copy it from where the model was trained; it belongs to the model_*.pt.",
        ) from error
    return sizes, pattern


def _tokenizer_file(directory: Path, given: Path | None) -> Path:
    name = "tokenizer.pkl"
    if given:
        places = [given / name if given.is_dir() else given]
    else:
        base = directory.absolute()
        places = [base / name, *(up / "tokenizer" / name for up in (base, *base.parents[:2]))]
    for place in places:
        if place.is_file():
            return place
    raise ModelError(
        f"There is no {name} for {directory}.",
        why=f"Looked for: {', '.join(map(str, places))}.",
        fix="give the folder that holds it: --tokenizer FOLDER.",
    )


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by nanochat's names. Of the pickle in it nothing but tensors is made."""
    import pickle

    import torch

    try:
        open_regular(file).close()
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise ValueError("it holds more than tensors")
    except (OSError, ValueError, RuntimeError, AttributeError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{file} holds no weights.",
            why=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="copy it again; it is read as data only, and nothing in it is run.",
        ) from error
    # A model that was compiled has this in front of its names.
    return {name.removeprefix("_orig_mod."): value for name, value in found.items()}


def _ends(encoding: nanochat_tokenizer.Encoding) -> list[int]:
    """Tokens at which nanochat's engine ends an answer."""
    names = (nanochat_tokenizer.ENDS_TURN, nanochat_tokenizer.BOS)
    return [encoding.special[name] for name in names]


def _write_settings(
    folder: Path, settings: Mapping[str, Any], encoding: nanochat_tokenizer.Encoding
) -> None:
    bos = encoding.special[nanochat_tokenizer.BOS]
    tokens = {"bos_token_id": bos, "eos_token_id": _ends(encoding)}
    generation = {**tokens, "pad_token_id": bos, "do_sample": True, "temperature": 1.0}
    for name, values in (("config", {**settings, **tokens}), ("generation_config", generation)):
        text = json.dumps(values, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    if "auto_map" in settings:
        from kit.models.own import source_of

        shutil.copy(source_of(settings["model_type"]), folder)


def _loaded(folder: Path) -> Any:
    """The tokenizer as everybody will load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _write_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], version: Version, dtype: Dtype
) -> int:
    """Write the weights under Transformers' names; how many numbers."""
    import torch

    from kit.trainer.hf_export import write

    counted = 0

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal counted
        for old, new in version.names.items():
            value = weights[old]
            if version.is_by_token(old):  # nanochat pads the vocabulary, and cuts the logits
                value = value[: version.sizes["vocab_size"]]
            counted += value.numel()
            yield new, value.to(getattr(torch, dtype))

    write(named(), str(folder))
    return counted
