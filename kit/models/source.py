"""Finds a model's files (embedded, a directory, or a Hugging Face name) and reads its sizes.

`find` returns a `ModelSource`; `ModelShape.read` gives the sizes that memory depends on, without
loading the model.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from kit.config import TINY, TINY_MOE, ModelConfig
from kit.errors import ConfigError, ModelError
from kit.utils.reading import mapping, open_regular, parse_json, read_json

TINY_DIRECTORY = Path(__file__).resolve().parents[1] / "tiny" / "model"
DIRECTORIES = {TINY: TINY_DIRECTORY, TINY_MOE: TINY_DIRECTORY.with_name("moe")}
"""Of the models that ship with the kit, by name."""
FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Files of a hub model that a session needs. Code among them runs only if it is trusted."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where a mixture of experts has its experts, and how many of them a token takes."""

    layers: tuple[int, ...]
    """Numbers of the layers with experts, ascending; others are dense."""
    count: int
    """Experts of a layer."""
    top_k: int
    """Experts that a token takes."""
    model_layers: int
    """All layers, dense ones included."""

    @classmethod
    def read(cls, folder: Path, settings: dict[str, Any]) -> Self | None:
        """Read it from config.json and the names of the weights; None without experts."""
        config = settings.get("text_config") or settings
        count = expert_count(config)
        top_k = config.get("num_experts_per_tok")
        if not (isinstance(count, int) and isinstance(top_k, int)):
            return None
        try:
            names = [name for file in weight_files(folder) for name in stored_parameters(file)]
        except (OSError, ValueError):
            return None  # whoever loads it says what is wrong
        numbers = {int(m[1]) for name in names if (m := _EXPERT_WEIGHT.search(name))}
        last = int(config.get("num_hidden_layers", 0))  # what follows predicts further tokens
        layers = tuple(sorted(number for number in numbers if number < last))
        return cls(layers, count, top_k, last) if layers else None


_EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


def expert_count(settings: Mapping[str, Any]) -> int | None:
    """Experts of a layer by config.json; None for a dense model."""
    return next((n for key in _EXPERT_COUNTS if (n := settings.get(key))), None)


_EXPERT_WEIGHT = re.compile(r"\blayers\.(\d+)\..*\bexperts\b")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model directory, and what its config.json says that a session needs."""

    path: str
    context_length: int
    architecture: str
    bytes: int
    """Size of its weight files."""
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that config.json and generation_config.json name as ends of a response."""
    vocabulary: int = 0
    """Rows of its embedding; 0 where config.json does not say."""
    experts: ExpertLayout | None = None
    """Its experts; None for a dense model."""


def find(config: ModelConfig) -> ModelSource:
    """Find the model and read its config.json; downloads a hub model that is not cached.

    Raises:
        ModelError: it is missing, no model directory, or its weights are incomplete.
        ConfigError: `context_length` is more than the model supports.
    """
    path = DIRECTORIES.get(config.name) or _directory(config.name)
    file = path / "config.json"
    try:
        settings = read_json(file, unique=False)
        limit = int(settings["max_position_embeddings"])
        architecture = str(settings["architectures"][0])
        vocabulary = int(settings.get("vocab_size") or 0)
    except FileNotFoundError:
        raise _no_model(path) from None
    except (ValueError, LookupError, TypeError, ArithmeticError, OSError) as error:
        raise ModelError(
            f"{file} does not describe a language model: {type(error).__name__} {error}."
        ) from error
    if config.context_length and config.context_length > limit:
        raise ConfigError(
            f"model.context_length is {config.context_length}, but {config.name} holds {limit} "
            f"tokens.",
            fix=f"set model.context_length to {limit} or less.",
        )
    if broken := broken_weights(path):
        raise ModelError(
            f"The weights in {path} are not whole: {'; '.join(broken[:4])}.",
            fix="download or copy the model again; `kit doctor` says how.",
        )
    return ModelSource(
        str(path),
        config.context_length or limit,
        architecture,
        size_of(path),
        _eos_token_ids(settings) | _eos_token_ids(_generation_config(path)),
        vocabulary,
        ExpertLayout.read(path, settings),
    )


def _no_model(path: Path) -> ModelError:
    """Error for a directory without config.json."""
    what = f"{path} has no config.json, so it is no Hugging Face model directory."
    if (path / "adapter_config.json").is_file():
        return ModelError(
            what,
            why="It holds an adapter of PEFT, which belongs to another model.",
            fix="give that model as model.name, and this directory as model.lora.adapter_path. To "
            "train all weights, merge both into one model first: PEFT's `merge_and_unload`.",
        )
    if next(path.glob("model_*.pt"), None):
        return ModelError(
            what,
            why="It holds a checkpoint of nanochat.",
            fix=f"write a model directory of it: kit import nanochat {path} OUT.",
        )
    is_checkpoint = (path / "manifest.json").is_file()
    return ModelError(
        what,
        why="It is a checkpoint of a session." if is_checkpoint else "",
        fix="load it: RLSession.load(path)."
        if is_checkpoint
        else "point model.name at the directory that holds config.json and the safetensors.",
    )


def _generation_config(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path / "generation_config.json", unique=False)
    except (OSError, ValueError):  # models need not have one
        return {}
    return settings if isinstance(settings, dict) else {}


def _eos_token_ids(settings: dict[str, Any]) -> frozenset[int]:
    ids = settings.get("eos_token_id")
    return frozenset(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))


def size_of(path: Path) -> int:
    """Total bytes of a directory's weight files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors") if file.is_file())


def broken_weights(path: Path) -> list[str]:
    """Describe safetensors of a directory that are missing or truncated; empty if all are whole.

    Reads only the index and the header of each file, so it is fast whatever the model's size.
    """
    names = {file.name for file in path.glob("*.safetensors")}
    if (path / INDEX).is_file():
        try:
            named = read_json(path / INDEX, unique=False)["weight_map"].values()
            names = set(map(str, named))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{INDEX} cannot be read ({type(error).__name__})"]
    faults = ((name, _fault(path / name)) for name in sorted(names))
    return [f"{name} {fault}" for name, fault in faults if fault]


def _fault(file: Path) -> str:
    """Describe what is wrong with one safetensors file; "" if it is as long as its header says."""
    if not file.is_file():
        return "is a link to a file that is gone" if file.is_symlink() else "is missing"
    try:
        begin, tensors = safetensors_header(file)
        whole = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0) + begin
    except (ValueError, KeyError, TypeError, AttributeError):
        return "is no safetensors file"
    size = file.stat().st_size
    if begin - 8 >= size:
        return "is cut off in its first bytes, or no safetensors file"
    return f"is cut off: {size:,} of {whole:,} bytes are there" if size < whole else ""


LONGEST_HEADER = 100 * 10**6
"""Bytes; the library of safetensors reads no longer one either."""


def safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Header of a safetensors file: offset of its data, and an entry per tensor.

    A file too short for its header has no tensors.
    """
    with open_regular(file) as opened:
        length = int.from_bytes(opened.read(8), "little")
        # A text file in its place, such as a pointer of Git LFS, gives an absurd length.
        whole = length < min(file.stat().st_size, LONGEST_HEADER)
        header = mapping(parse_json(opened.read(length))) if whole else {}
    header.pop("__metadata__", None)
    return 8 + length, header


def weights_digest(path: str | Path) -> str:
    """SHA-256 of a model's weight files, by their names; read once, while they stay as they are."""
    files = sorted(weight_files(Path(path)))
    return _digest(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@cache
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    word = hashlib.sha256()
    for name, _, _ in files:
        with Path(name).open("rb") as opened:
            own = hashlib.file_digest(opened, "sha256").hexdigest()
        word.update(f"{Path(name).name} {own}\n".encode())
    return word.hexdigest()


def is_hub_name(name: str) -> bool:
    """Whether a name is a hub name, `owner/name`, and not a local directory."""
    hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return hub and not Path(name).is_dir()


def cached(name: str) -> Path | None:
    """Directory of a model in the hub's cache, complete or not; None if absent. No network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _directory(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if is_hub_name(name):
        return _from_hub(name)
    if os.sep in name:
        raise ModelError(
            f"There is no model directory {str(path.absolute())!r}.",
            fix="check model.name: a directory, a Hugging Face name such as Qwen/Qwen3-0.6B, or "
            "tiny.",
        )
    near = difflib.get_close_matches(name, DIRECTORIES, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ModelError(
        f"There is no model {name!r}.",
        fix=f"{hint}model.name is a directory, a Hugging Face name such as Qwen/Qwen3-0.6B, or "
        f"tiny or tiny-moe (the models that ship with the kit).",
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"The model {name!r} is no directory here, is not in the local cache, and cannot be "
            f"downloaded.",
            why=str(error).splitlines()[0],
            fix="connect to the network once, or download the model on another machine, copy the "
            "directory here and set model.name to its path; `kit doctor` gives the commands.",
        ) from error


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a model: from config.json, and parameters from the headers of its weight files."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    """Width of the feed-forward part; with experts, of all that one token is routed to."""
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """Whether output and input embedding are one tensor."""
    caps_logits: bool = False
    """Whether it has a soft cap on its logits, which keeps a copy of them more."""

    @classmethod
    def read(cls, directory: str | Path, *, of_mtp: bool = False) -> Self:
        """Read the sizes of a model directory with config.json and safetensors.

        Args:
            directory: of the model.
            of_mtp: of its layer that predicts a further token, and not of the model without it.

        Raises:
            ModelError: there are no safetensors, or they or config.json cannot be read.
        """
        folder = Path(directory)
        try:
            return cls._of(read_json(folder / "config.json", unique=False), folder, of_mtp=of_mtp)
        except (
            LookupError, TypeError, ValueError, ArithmeticError, AttributeError, OSError,
        ) as error:  # fmt: skip
            raise ModelError(
                f"The sizes of the model in {str(folder)!r} cannot be read.",
                why=f"{type(error).__name__}: {error}",
                fix="give a directory with config.json and safetensors of a causal language model.",
            ) from error

    @classmethod
    def _of(cls, config: dict[str, Any], folder: Path, *, of_mtp: bool) -> Self:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        wide = int(config.get("intermediate_size", 4 * hidden))
        if experts := config.get("num_experts_per_tok"):
            wide = int(config.get("moe_intermediate_size", wide)) * int(experts)
        tied = bool(config.get("tie_word_embeddings", False))
        files = weight_files(folder)
        if not files:
            raise FileNotFoundError("there are no *.safetensors")
        stored = {name: size for file in files for name, size in stored_parameters(file).items()}
        layers = int(config["num_hidden_layers"])
        if of_mtp:
            stored = {n: stored[n] for n in stored if is_mtp(n, layers) and not copied_by(n)}
        else:
            stored = {n: stored[n] for n in stored if not is_mtp(n, layers)}
        if tied and len(stored) > 1:
            # Some files hold it all the same, as the copy of the input embedding that it is.
            stored.pop("lm_head.weight", None)
        return cls(
            parameters=sum(stored.values()),
            layers=1 if of_mtp else layers,
            hidden=hidden,
            intermediate=wide,
            heads=heads,
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=tied,
            caps_logits=bool(config.get("final_logit_softcapping")),
        )

    def key_value_bytes(self, width: int) -> int:
        """Bytes of one token in the KV cache; `width` is bytes per number."""
        return 2 * self.layers * self.key_value_heads * self.head_size * width


def weight_files(folder: Path) -> list[Path]:
    """Weight files that a model is loaded from; a directory may hold a second copy of them."""
    index, whole = folder / INDEX, folder / "model.safetensors"
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = read_json(index, unique=False)["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return sorted(folder.glob("*.safetensors"))


_MTP = re.compile(r"^(?:model\.)?mtp[._]")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def is_mtp(name: str, layers: int) -> bool:
    """Whether a weight is of layers that predict further tokens (multi-token prediction).

    Args:
        name: in the model's files. They are called `model.mtp_layers.0` there (MiMo), `mtp`
            (Qwen3-Next), `model.mtp_block` (Ernie 4.5), or come after the last layer (DeepSeek,
            GLM).
        layers: of the model, without these.
    """
    layer = _LAYER.match(name)
    return bool(_MTP.match(name)) or (layer is not None and int(layer[1]) >= layers)


EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def copied_by(name: str) -> str:
    """The weight of which one of such a layer is a copy (DeepSeek, GLM); "" where it is none."""
    copies = {".embed_tokens.weight": EMBEDDING, ".shared_head.head.weight": OUTPUT}
    return next((of for end, of in copies.items() if name.endswith(end)), "")


def mtp_weights(folder: Path) -> dict[str, Path]:
    """File of each weight of layers that predict further tokens; empty where there are none."""
    settings = read_json(folder / "config.json", unique=False)
    layers = (settings.get("text_config") or settings).get("num_hidden_layers")
    if not isinstance(layers, int):
        return {}
    files = weight_files(folder)
    return {n: file for file in files for n in safetensors_shapes(file) if is_mtp(n, layers)}


def stored_parameters(file: Path) -> dict[str, int]:
    """Number of elements of each tensor in a safetensors file; reads only its header."""
    return {name: math.prod(shape) for name, shape in safetensors_shapes(file).items()}


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a model is loaded from; reads only headers."""
    return {n: s for file in weight_files(folder) for n, s in safetensors_shapes(file).items()}


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a file; reads only its header. Raises ValueError if it is broken."""
    begin, tensors = safetensors_header(file)
    if begin - 8 >= file.stat().st_size:
        raise ValueError(f"{file.name} is no safetensors file, or not a whole one")
    return {name: tuple(map(int, tensor["shape"])) for name, tensor in tensors.items()}
