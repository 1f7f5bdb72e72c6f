"""What adapters a model would get, by the headers of its weight files: no torch, nothing loaded.

So names that fit nothing, and an adapter of a directory that is none of this model and of these
settings, are refused before a process starts, and memory is planned for what is trained.
`kit.models.lora` puts the adapters in.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kit.config import LoraConfig, ModelConfig
from kit.errors import ConfigError, did_you_mean
from kit.models.source import ExpertLayout, ModelSource, safetensors_shapes, stored_shapes
from kit.utils.reading import UnreadableError, read_object

_LAYER = re.compile(r"\blayers\.\d+\.")
_ROUTED = re.compile(r"\bexperts?\b|\bmlp\.gate\b|\brouter\b")
"""In names of a mixture's weights: experts and what chooses among them."""
TIED = {"lm_head", "embed_tokens"}
"""Modules with one weight, in models that tie their embeddings."""
SGLANG = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""SGLang's layers that compute several of a model's in one product, in this order."""
FUSED = tuple(SGLANG.values())
"""Layers whose adapters SGLang wants together."""
NF4_BLOCK = 64
"""Numbers that share a scale; see `kit.operators.nf4`, which takes torch."""
FIXED = {
    "lm_head": "the output layer, whose logits the trainer computes without a layer's forward pass",
    "embed_tokens": "an embedding, which is looked up and not multiplied with",
}


Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each weight, by its module's name."""


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """Number of a model's adapters, and their size."""

    modules: int
    """Layers with an adapter."""
    parameters: int
    """Trained parameters, modules that are trained whole included."""
    kinds: tuple[str, ...] = ()
    """Last names of the layers with an adapter."""
    largest: int = 0
    """Parameters of the largest weight beside an adapter."""
    trains_head: bool = False
    """Whether the output layer is trained whole."""
    beside: int = 0
    """Parameters of all weights beside an adapter."""
    linear: int = 0
    """Parameters of all weights that can be kept in 4 bits."""

    @classmethod
    def of(cls, config: ModelConfig, source: ModelSource) -> Self:
        """Look at a model's files.

        Args:
            config: with `lora`.
            source: where the model is.

        Raises:
            ConfigError: a name of the settings fits nothing that could be trained so.
        """
        lora = config.lora
        assert lora is not None
        stored = stored_shapes(Path(source.path))
        weights = {n.removesuffix(".weight"): s for n, s in stored.items() if n.endswith(".weight")}
        linear: Shapes = {
            name: shape
            for name, shape in weights.items()
            if len(shape) == 2 and _LAYER.search(name) and not _ROUTED.search(name)
        }
        if source.experts:
            _refuse_experts(config.name, lora, source.experts, linear)
        if "lm_head" not in weights and (tied := TIED & {*lora.modules_to_save}):
            raise ConfigError(
                f"model.lora.modules_to_save has {min(tied)!r}, which {config.name} shares between "
                "its first and its last layer.",
                why="Trained in one of both places, it would be another weight there, and the "
                "engine and every checkpoint have one for both.",
                fix="leave it out.",
            )
        adapted = _matching("target_modules", lora, linear, config.name)
        whole = _matching("modules_to_save", lora, weights, config.name)
        adapted = [name for name in adapted if name not in whole]
        if lora.load_in_4bit:
            _check_four_bit(config.name, source, linear, whole)
        if lora.adapter_path is not None:
            _check_files(config, source, linear, adapted, {name: weights[name] for name in whole})
        trained = sum(lora.r * sum(linear[name]) for name in adapted)
        trained += sum(math.prod(weights[name]) for name in whole)
        kinds = sorted({name.rpartition(".")[2] for name in adapted})
        return cls(
            len(adapted),
            trained,
            tuple(kinds),
            largest=max((math.prod(linear[name]) for name in adapted), default=0),
            trains_head="lm_head" in whole,
            beside=sum(math.prod(linear[name]) for name in adapted),
            linear=0 if source.experts else sum(map(math.prod, linear.values())),
        )


def fits(name: str, path: str) -> bool:
    """Whether a name of the settings means the module at this path, as PEFT takes names."""
    return f".{path}".endswith(f".{name}")


def _refuse_experts(model: str, lora: LoraConfig, experts: ExpertLayout, linear: Shapes) -> None:
    """Refuse what would leave experts out in silence, or adapt them."""
    kinds = sorted({n.rpartition(".")[2] for n in linear if "attn" in n or "attention" in n})
    fix = f"name layers of its attention in model.lora.target_modules: [{', '.join(kinds)}]."
    why = f"{model} has {experts.count} experts in each of its layers with some, in one tensor."
    if lora.target_modules == "all-linear":
        raise ConfigError(
            "model.lora.target_modules is all-linear, and experts get no adapters yet.",
            why=why,
            fix=fix,
        )
    if other := [n for n in lora.modules_to_save if n.rpartition(".")[2] not in TIED]:
        raise ConfigError(
            f"model.lora.modules_to_save has {other[0]!r}, and of a mixture of experts only "
            f"{' and '.join(sorted(TIED))} are known to be trained rightly beside adapters.",
            fix="leave it out.",
        )
    outside = [n for n in lora.target_modules if n.rpartition(".")[2] not in kinds]
    if outside:
        raise ConfigError(
            f"model.lora.target_modules has {outside[0]!r}, which names experts, or nothing.",
            why=f"{why} They get no adapters yet, and no other part outside of attention.",
            fix=fix,
        )


def _check_four_bit(model: str, source: ModelSource, linear: Shapes, whole: list[str]) -> None:
    """Refuse weights that cannot be kept in 4 bits, or of which little would be."""
    setting = "model.lora.load_in_4bit is set, and"
    if source.experts:
        raise ConfigError(
            f"{setting} {model} is a mixture of experts.",
            why="Its experts, which most of it is, are one tensor in each layer, and linear layers "
            "alone are quantised.",
            fix="leave it out.",
        )
    if trained := [name for name in whole if name in linear]:
        raise ConfigError(
            f"{setting} model.lora.modules_to_save has {trained[0].rpartition('.')[2]!r}, whose "
            "weights would be in 4 bits.",
            why="A copy that is trained whole would begin with other numbers than the reference.",
            fix="leave one of them out; lm_head and norms can be trained whole.",
        )
    for name, shape in linear.items():
        if math.prod(shape) % NF4_BLOCK:
            raise ConfigError(
                f"{setting} {name} of {model} has {' x '.join(map(str, shape))} numbers, which is "
                f"no multiple of {NF4_BLOCK}.",
                why="They are quantised in blocks of so many.",
                fix="leave it out.",
            )


def _matching(setting: str, lora: LoraConfig, there: Shapes, model: str) -> list[str]:
    """Modules that the names of a setting mean. Raises ConfigError where one means none."""
    names = getattr(lora, setting)
    if names == "all-linear":
        return list(there)
    for name in names:
        if any(fits(name, path) for path in there):
            continue
        kinds = sorted({path.rpartition(".")[2] for path in there})
        known = FIXED.get(name) if setting == "target_modules" else None
        raise ConfigError(
            f"model.lora.{setting} has {name!r}, which "
            + (f"gets no adapter: it is {known}." if known else f"names nothing in {model}."),
            why=f"Its layers have {', '.join(kinds)}.",
            fix="name some of these." if known else did_you_mean(name, kinds),
        )
    return [path for path in there if any(fits(name, path) for name in names)]


# ---- an adapter that is there already ------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter, as PEFT names them."""
IN_4_BITS = {"frozen_weights": "nf4"}
"""In an export's manifest: what it was trained beside, where that is not the files' weights."""
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""
_NO_MATTER = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
        "init_lora_weights", "lora_alpha", "lora_dropout", "megatron_core", "modules_to_save",
        "peft_type", "peft_version", "qalora_group_size", "r", "revision", "target_modules",
        "task_type", "use_rslora",
    }
)  # fmt: skip
"""Settings of PEFT that are compared here, or that change nothing once an adapter is trained."""
_BEGINS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the frozen weights what they were."""


def adapter_directory(lora: LoraConfig) -> Path:
    """Directory of the adapter that `adapter_path` names."""
    assert lora.adapter_path is not None
    return Path(lora.adapter_path).expanduser().absolute()


def located(lora: LoraConfig) -> LoraConfig:
    """Settings for processes with another working directory: the adapter's path is absolute."""
    if lora.adapter_path is None:
        return lora
    return lora.model_copy(update={"adapter_path": str(adapter_directory(lora))})


def _check_files(
    config: ModelConfig, source: ModelSource, linear: Shapes, adapted: list[str], whole: Shapes
) -> None:
    """Refuse an adapter that is none of this model and of these settings.

    Args:
        config: of the model.
        source: where it is.
        linear: its layers that could have adapters.
        adapted: those that the settings mean.
        whole: modules that the settings train whole.
    """
    lora = config.lora
    assert lora is not None
    folder = adapter_directory(lora)
    settings = _adapter_settings(folder)
    _check_settings(folder, lora, settings)
    expected: dict[str, tuple[int, ...]] = {
        f"{PREFIX}{name}.lora_{side}.weight": shape
        for name in adapted
        for side, shape in (("A", (lora.r, linear[name][1])), ("B", (linear[name][0], lora.r)))
    }
    expected |= {f"{PREFIX}{name}.weight": shape for name, shape in whole.items()}
    try:
        found = safetensors_shapes(folder / WEIGHTS)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ConfigError(
            f"The adapter in {folder} cannot be read: {WEIGHTS} is no whole safetensors file.",
            why=str(error),
            fix="copy it again, or save it with PEFT's `save_pretrained`.",
        ) from None
    _compare(folder, expected, found)
    if _trained_in_4_bits(folder) and not lora.load_in_4bit:
        warnings.warn(
            f"The adapter in {folder} was trained beside weights in 4 bits, and here they are as "
            "their files have them, which is another model. Set model.lora.load_in_4bit: true to "
            "go on with the one that was trained.",
            stacklevel=2,
        )
    if other := _other_base(config, source, settings):
        warnings.warn(
            f"The adapter in {folder} was made for {other}, and model.name is {config.name}: its "
            "shapes fit, and whether its numbers mean anything beside these weights nobody knows.",
            stacklevel=2,
        )


def _adapter_settings(folder: Path) -> dict[str, Any]:
    """PEFT's settings of an adapter. Raises ConfigError where there is none that can be read."""
    if not folder.is_dir():
        raise ConfigError(
            f"There is no directory {str(folder)!r}, which model.lora.adapter_path names.",
            fix="give the directory that holds adapter_config.json; one of the Hugging Face hub "
            "has to be downloaded first: `hf download OWNER/NAME --local-dir FOLDER`. A checkpoint "
            "that was trained from it holds its own adapters, and is loaded without it: "
            'RLSession.load(path, changes={"model.lora.adapter_path": None}).',
        )
    if (folder / CONFIG).is_file() and not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} has no {WEIGHTS}, so there are no weights of an adapter in it.",
            why="adapter_model.bin is a pickle, which could run code, and is not read."
            if (folder / "adapter_model.bin").exists()
            else "",
            fix="save the adapter with PEFT's `save_pretrained`, which writes safetensors.",
        )
    try:
        return read_object(folder / CONFIG, unique=False)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no {CONFIG}, so it is no adapter of PEFT.",
            why="It holds a whole model." if (folder / "config.json").is_file() else "",
            fix="give the directory that PEFT or session.export_hf(adapter=True) wrote; a merged "
            "model is given as model.name.",
        ) from None
    except (UnreadableError, OSError) as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read.", why=f"{error}.") from None


def _check_settings(folder: Path, lora: LoraConfig, settings: dict[str, Any]) -> None:
    """Raise ConfigError for an adapter of another kind, or with other numbers."""
    if settings.get("peft_type") != "LORA":
        raise ConfigError(
            f"The adapter in {folder} is of PEFT's kind {settings.get('peft_type')!r}.",
            fix="give one of the kind LORA.",
        )
    for name, default in (("r", 8), ("lora_alpha", 8), ("use_rslora", False)):
        there = settings.get(name, default)
        if there != getattr(lora, name):
            raise ConfigError(
                f"The adapter in {folder} has {name} {there}, and model.lora.{name} is "
                f"{getattr(lora, name)}.",
                why="The same numbers would be another model.",
                fix=f"set model.lora.{name}: {str(there).lower()}.",
            )
    begins = settings.get("init_lora_weights")
    if begins not in _BEGINS:
        raise ConfigError(
            f"The adapter in {folder} was begun with init_lora_weights {begins!r}.",
            why="Its base is no longer the model of its files, so it belongs to other weights.",
            fix="have PEFT convert it: `save_pretrained(path, path_initial_model_for_weight_"
            "conversion=...)`, which writes an ordinary adapter.",
        )
    unknown = {
        name: value
        for name, value in settings.items()
        if name not in _NO_MATTER and value not in (None, False, "none", "", [], {})
    }
    if unknown:
        name, value = next(iter(unknown.items()))
        raise ConfigError(
            f"The adapter in {folder} has {name}: {value!r}, and is computed otherwise than the "
            "adapters that are trained here.",
            fix="merge it into its model with PEFT's `merge_and_unload`, give that as model.name, "
            "and leave adapter_path out: adapters are then trained on top.",
        )


def _compare(folder: Path, expected: Shapes, found: Shapes) -> None:
    """Raise ConfigError where an adapter's tensors are not those that the settings ask for."""
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or more:
        raise ConfigError(
            f"The adapter in {folder} is of other modules than model.lora asks for: "
            + "; ".join(
                f"{what} {', '.join(names[:2])}"
                + (f" and {len(names) - 2} more" * (len(names) > 2))
                for what, names in (("it lacks", missing), ("it also has", more))
                if names
            )
            + ".",
            fix="set model.lora.target_modules and modules_to_save to what it was trained with: "
            f"it adapts {_kinds(found)}.",
        )
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise ConfigError(
                f"The adapter in {folder} is of another model: {name} has shape "
                f"{tuple(found[name])}, and here it would have {tuple(shape)}.",
                fix="give the model that it was trained with as model.name.",
            )


def _kinds(found: Shapes) -> str:
    """The modules of an adapter's tensors, as the settings would name them."""
    adapted = {n.rsplit(".", 3)[1] for n in found if ".lora_" in n and n.count(".") >= 3}
    whole = {n.rsplit(".", 2)[1] for n in found if ".lora_" not in n and n.count(".") >= 2}
    kept = f", and [{', '.join(sorted(whole))}] whole" if whole else ""
    return f"[{', '.join(sorted(adapted))}]{kept}"


def _trained_in_4_bits(folder: Path) -> bool:
    """Whether an export says so of the weights that it was trained beside."""
    try:
        manifest = read_object(folder / "manifest.json")
    except (ValueError, OSError):  # PEFT writes none
        return False
    return IN_4_BITS.items() <= manifest.items()


def _other_base(config: ModelConfig, source: ModelSource, settings: dict[str, Any]) -> str:
    """The model that an adapter says it was made for, where that is another; "" if it is not."""
    named = settings.get("base_model_name_or_path")
    if not isinstance(named, str) or not named or named == config.name:
        return ""
    own, there = Path(source.path), Path(named).expanduser()
    if there.is_dir():
        return "" if there.resolve() == own.resolve() else named
    # A name of the hub may stand for a directory here: the last part of both is the model's own.
    return "" if named.rpartition("/")[2].lower() in str(own).lower() else named
