"""`kit import nanochat`: a checkpoint of nanochat as a model's directory.

nanochat (https://github.com/karpathy/nanochat) writes a step's weights as `model_000650.pt`, their
sizes as `meta_000650.json`, and its tokenizer into a folder of its own. What its code computes with
them has changed, and is written nowhere: base of the rotation, soft cap, factors. So the version
is told by which weights there are. Transformers' `NanoChatForCausalLM` is the first of them, of
October 2025 to 11 January 2026; later ones are refused by what they have more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kit.checkpoint import manifest, nanochat_tokenizer
from kit.errors import ModelError
from kit.utils.reading import open_regular, read_json

if TYPE_CHECKING:
    import torch

ROTATION_BASE, SOFT_CAP = 10_000.0, 15.0
"""Of the version that Transformers has; nanochat's code has them as constants."""
EPS = 2.0**-23
"""Of nanochat's norms in float32: that dtype's epsilon, as torch takes where it is told none."""
LAYER = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Parts of a layer: nanochat's name, and Transformers'."""
WHOLE = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
LATER = {
    r"smear_": "mixes each token's embedding with the one before (smear, since 14 March 2026)",
    r"backout_": "takes a middle layer's output away at the end (backout, since 14 March 2026)",
    r"value_embeds\.": "adds embeddings to the values (since 16 January 2026)",
    r"(resid|x0)_lambdas$": "scales its residual stream by layer (since 11 January 2026)",
}
"""Weights that Transformers' NanoChat has no place for, by their names, and what they do."""
SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_LAYER_NAME = re.compile(r"transformer\.h\.(\d+)\.(.+)\.weight")
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
    meta = _read_meta(directory / f"meta_{number}.json")
    encoding = nanochat_tokenizer.read(_tokenizer_file(directory, tokenizer))
    if len(encoding) != meta["vocab_size"]:
        raise ModelError(
            f"The tokenizer has {len(encoding):,} tokens, the model {meta['vocab_size']:,}.",
            fix="name the tokenizer.pkl that the model was trained with: --tokenizer FILE.",
        )
    weights = _read_weights(directory / f"model_{number}.pt")
    _refuse_later(weights, meta)
    _check_shapes(weights, meta)
    target = out.absolute()
    with manifest.new_folder(target, "export") as folder:
        built = nanochat_tokenizer.build(encoding, meta["sequence_len"])
        built.save_pretrained(folder)
        texts = nanochat_tokenizer.compare(encoding, _loaded(folder))
        _write_settings(folder, _settings(meta, weights, encoding, dtype), encoding)
        size = _write_weights(folder, weights, meta, dtype)
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


def _read_meta(file: Path) -> dict[str, Any]:
    """Sizes of the model, whole numbers all of them, and `window_pattern` where it has one."""
    try:
        meta = read_json(file)["model_config"]
        sizes = {name: meta[name] for name in SIZES}
        if not all(type(size) is int and size > 0 for size in sizes.values()):
            raise ValueError(f"not all sizes in it are whole numbers above 0: {sizes}")
        if sizes["n_embd"] % sizes["n_head"] or sizes["n_head"] % sizes["n_kv_head"]:
            raise ValueError(f"its heads do not divide its width: {sizes}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file} does not describe a model of nanochat.",
            why=f"{type(error).__name__}: {error}",
            fix="copy it from where the model was trained; it belongs to the model_*.pt.",
        ) from error
    return sizes | {"window_pattern": str(meta.get("window_pattern") or "L")}


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


def _refuse_later(weights: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Raise ModelError for a version that computes more than Transformers' NanoChat does."""
    neutral = {"resid_lambdas": 1.0, "x0_lambdas": 0.0}
    more = [
        name
        for name, value in weights.items()
        if name not in _names(meta) and not (name in neutral and (value == neutral[name]).all())
    ]
    reasons = [
        why for pattern, why in LATER.items() if any(re.match(pattern, name) for name in more)
    ]
    pattern = meta["window_pattern"].upper()
    short = any(pattern[n % len(pattern)] != "L" for n in range(meta["n_layer"] - 1))
    if short:
        reasons.append(f"has sliding windows (window_pattern {pattern}, since 11 January 2026)")
    if more and not reasons:
        reasons.append(f"has weights that are not known here: {', '.join(sorted(more)[:4])}")
    if reasons:
        raise ModelError(
            f"This nanochat {'; '.join(reasons)}.",
            why="Transformers' NanoChatForCausalLM, which trainer and engine compute, is nanochat "
            "as it was until 11 January 2026 (before commit aa530cd).",
            fix="train a model with nanochat's code of before that commit, or take one that was.",
        )
    if missing := sorted(_names(meta).keys() - weights.keys()):
        raise ModelError(
            f"The checkpoint lacks {', '.join(missing[:4])}, which its meta_*.json promises.",
            fix="copy model and meta of one and the same step.",
        )


def _check_shapes(weights: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Raise ModelError for a weight whose shape is not the one that the sizes say."""
    wide, keys = meta["n_embd"], meta["n_embd"] // meta["n_head"] * meta["n_kv_head"]
    inner = len(weights["transformer.h.0.mlp.c_fc.weight"])
    shapes = {
        "attn.c_q": (wide, wide),
        "attn.c_k": (keys, wide),
        "attn.c_v": (keys, wide),
        "attn.c_proj": (wide, wide),
        "mlp.c_fc": (inner, wide),
        "mlp.c_proj": (wide, inner),
    }
    for name in _names(meta):
        there = tuple(weights[name].shape)
        layer = _LAYER_NAME.fullmatch(name)
        expected = shapes[layer[2]] if layer else (max(there[0], meta["vocab_size"]), wide)
        if there != expected:
            raise ModelError(
                f"{name} has the shape {there}, but the sizes in meta_*.json ask for {expected}.",
                fix="copy model and meta of one and the same step.",
            )


def _names(meta: Mapping[str, Any]) -> dict[str, str]:
    """Transformers' name of every weight, by nanochat's."""
    layers = {
        f"transformer.h.{number}.{old}.weight": f"model.layers.{number}.{new}.weight"
        for number in range(meta["n_layer"])
        for old, new in LAYER.items()
    }
    return WHOLE | layers


def _settings(
    meta: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    encoding: nanochat_tokenizer.Encoding,
    dtype: Dtype,
) -> dict[str, Any]:
    """The configuration of the model in Transformers' words."""
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "vocab_size": meta["vocab_size"],
        "hidden_size": meta["n_embd"],
        "intermediate_size": len(weights["transformer.h.0.mlp.c_fc.weight"]),
        "num_hidden_layers": meta["n_layer"],
        "num_attention_heads": meta["n_head"],
        "num_key_value_heads": meta["n_kv_head"],
        "max_position_embeddings": meta["sequence_len"],
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTATION_BASE},
        "final_logit_softcapping": SOFT_CAP,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": encoding.special[nanochat_tokenizer.BOS],
        "eos_token_id": _ends(encoding),
        "pad_token_id": None,  # the token that a model pads with learns nothing
        "dtype": dtype,
    }


def _ends(encoding: nanochat_tokenizer.Encoding) -> list[int]:
    """Tokens at which nanochat's engine ends an answer."""
    names = (nanochat_tokenizer.ENDS_TURN, nanochat_tokenizer.BOS)
    return [encoding.special[name] for name in names]


def _write_settings(
    folder: Path, settings: Mapping[str, Any], encoding: nanochat_tokenizer.Encoding
) -> None:
    generation = {
        "bos_token_id": settings["bos_token_id"],
        "eos_token_id": _ends(encoding),
        "pad_token_id": settings["bos_token_id"],
        "do_sample": True,
        "temperature": 1.0,
    }
    for name, values in (("config", settings), ("generation_config", generation)):
        text = json.dumps(values, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _loaded(folder: Path) -> Any:
    """The tokenizer as everybody will load it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _write_weights(
    folder: Path, weights: Mapping[str, torch.Tensor], meta: Mapping[str, Any], dtype: Dtype
) -> int:
    """Write the weights under Transformers' names; how many numbers."""
    import torch

    from kit.trainer.hf_export import write

    counted = 0

    def named() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal counted
        for old, new in _names(meta).items():
            value = weights[old]
            if old in WHOLE:  # nanochat pads the vocabulary, and cuts the logits
                value = value[: meta["vocab_size"]]
            counted += value.numel()
            yield new, value.to(getattr(torch, dtype))

    write(named(), str(folder))
    return counted
