"""Directories of EAGLE-3 heads: what is in them, and whether they go with a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.models.source import stored_shapes
from kit.utils.reading import read_json

ARCHITECTURE = "LlamaForCausalLMEagle3"
"""SGLang's name for the heads that the kit has."""
READS = 3
"""Layers of the policy that a head reads."""
OLDER = "midlayer."
"""How names of the layer's weights begin in files of EAGLE's authors, for `layers.0.`."""
UNTRIED = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bias",
    "norm_output",
    "fc_norm",
    "use_aux_norm",
)
"""Settings of SGLang's heads with which none was tried."""
WORDS, IS_WORD, EMBEDDING = "d2t", "t2d", "embed_tokens.weight"
"""Tensors of files that are no weights of a head: how far the number of each of its words is from
the token's, which tokens are words, and a copy of the policy's embedding."""


def problem_of(path: str | Path, model: str | Path) -> str:
    """Why a directory's head cannot draft for a model, in words; empty where it can.

    Args:
        path: the head's directory; config.json and weights are there.
        model: the model's directory.
    """
    head, policy = (read_json(Path(p) / "config.json", unique=False) for p in (path, model))
    return _of_settings(head, policy) or _of_layers(head, policy) or _of_files(head, Path(path))


def _of_settings(head: Mapping[str, Any], policy: Mapping[str, Any]) -> str:
    layers, width = head.get("num_hidden_layers"), head.get("hidden_size")
    if ARCHITECTURE not in (head.get("architectures") or ()):
        named = ", ".join(map(str, head.get("architectures") or ["nothing"]))
        return f"its config.json names {named}, and not {ARCHITECTURE}"
    if layers != 1:
        return f"it has {layers} layers, and heads of one layer are what was tried"
    if {width, head.get("target_hidden_size") or width} != {policy.get("hidden_size")}:
        return f"it reads hidden states of {width} numbers; the model's {policy.get('hidden_size')}"
    if not head.get("draft_vocab_size"):
        return "it has no output of its own (draft_vocab_size), with which none was tried"
    if untried := [name for name in UNTRIED if head.get(name)]:
        return f"{untried[0]} is set in its config.json, with which none was tried"
    rotation = head.get("rope_parameters") or head.get("rope_scaling") or {}
    if (kind := rotation.get("rope_type") or rotation.get("type") or "default") != "default":
        return f"its rotation is scaled ({kind}), with which none was tried"
    return ""


def _of_layers(head: Mapping[str, Any], policy: Mapping[str, Any]) -> str:
    own = head.get("eagle_config") or {}
    count, read = int(policy["num_hidden_layers"]), layers_read(head, policy)
    if own.get("use_aux_hidden_state") is False or head.get("num_aux_hidden_states", 3) != READS:
        return f"it does not read {READS} layers of the model, as those do that were tried"
    if len(set(read)) != READS or not all(0 <= layer < count - 1 for layer in read):
        return (
            f"it reads layers {', '.join(map(str, read))} of the model, which has {count}: SGLang "
            f"shows it {READS} different ones before the last"
        )
    return ""


def layers_read(head: Mapping[str, Any], policy: Mapping[str, Any]) -> tuple[int, ...]:
    """The policy's layers whose output a head reads, the first one being 0; in their order.

    Args:
        head: its config.json.
        policy: config.json of the policy, by whose layers SGLang goes where the head names none.
    """
    named = (head.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    return tuple(sorted(usual_layers(int(policy["num_hidden_layers"])) if named is None else named))


def usual_layers(count: int) -> tuple[int, ...]:
    """Those that SGLang shows where a head names none, of a policy of so many layers."""
    return 1, count // 2 - 1, count - 4


def _of_files(head: Mapping[str, Any], path: Path) -> str:
    wanted, stored = shapes(head), {own_name(n): s for n, s in stored_shapes(path).items()}
    own, whole = int(head["draft_vocab_size"]), int(head["vocab_size"])
    if own != whole:
        wanted[WORDS] = (own,)
    stored = {n: s for n, s in stored.items() if n not in (IS_WORD, EMBEDDING) or n in wanted}
    if missing := sorted(wanted.keys() - stored.keys()):
        return f"its files lack {', '.join(missing[:3])}"
    if others := sorted(stored.keys() - wanted.keys()):
        return f"its files have {', '.join(others[:3])}, which it has no place for"
    if wrong := [name for name, shape in wanted.items() if stored[name] != shape]:
        return f"{wrong[0]} is {stored[wrong[0]]} there, and {wanted[wrong[0]]} by its config.json"
    return ""


def own_name(name: str) -> str:
    """Name of a weight in the trainer and in SGLang, by that in a head's files."""
    return f"layers.0.{name.removeprefix(OLDER)}" if name.startswith(OLDER) else name


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of a head by its name, from its config.json."""
    width, wide = int(settings["hidden_size"]), int(settings["intermediate_size"])
    heads = int(settings["num_attention_heads"])
    pairs = int(settings.get("num_key_value_heads") or heads)
    size = int(settings.get("head_dim") or width // heads)
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (heads * size, 2 * width),
        "self_attn.k_proj": (pairs * size, 2 * width),
        "self_attn.v_proj": (pairs * size, 2 * width),
        "self_attn.o_proj": (width, heads * size),
        "input_layernorm": (width,),
        "hidden_norm": (width,),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (wide, width),
        "mlp.up_proj": (wide, width),
        "mlp.down_proj": (width, wide),
    }
    return {
        "fc.weight": (width, READS * width),
        "norm.weight": (width,),
        "lm_head.weight": (int(settings["draft_vocab_size"]), width),
        **{f"layers.0.{name}.weight": shape for name, shape in layer.items()},
    }
