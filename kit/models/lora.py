"""LoRA: adapters beside frozen weights. PEFT puts them in and names them, the trainer computes.

A linear layer with the frozen weight W becomes x W^T + s (x A^T) B^T with trained A (r, in) and B
(out, r). Nothing writes to W: what engines and exports get is W + s B A, summed in float32 and
rounded once. With `whole_products` a layer computes with that very sum, rounded to the dtype of W,
so that its bits are those of an engine that holds it.

Hu et al., https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kit.config import LoraConfig
from kit.errors import ModelError
from kit.models import four_bit
from kit.models.adapters import FUSED, WEIGHTS, adapter_directory, fits
from kit.models.state_dict import named_weights
from kit.operators.adapter import add_adapter

NAME = "default"
"""PEFT's name of the one adapter that there is."""
SUMMED_AT_ONCE = 1 << 22
"""Numbers of a weight on a GPU that get their adapter added at a time."""
BASE, KEPT, COPY = ".base_layer", ".original_module", f".modules_to_save.{NAME}"
"""What PEFT puts into the names of a frozen weight beside an adapter, of one beside a copy that is
trained whole, and of that copy."""


class _Switch:
    """Whether all adapters are off, which makes a policy its own reference."""

    off = False


_SWITCH = _Switch()


@contextmanager
def switched_off() -> Iterator[None]:
    """Have models compute without their adapters inside the block."""
    _SWITCH.off = True
    try:
        yield
    finally:
        _SWITCH.off = False


def inject(model: nn.Module, lora: LoraConfig, seed: int, *, whole_products: bool = False) -> None:
    """Put adapters into a Transformers model; all its other weights are frozen.

    Args:
        model: its decoder layers get them.
        lora: which, and how they begin.
        seed: of the numbers that A begins with.
        whole_products: compute with the sum of weight and adapter.

    Raises:
        ModelError: a name fits no module, or one that cannot be trained so.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kept = _check_names(model, lora)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings are dealt with
        torch.manual_seed(seed)
        inject_adapter_in_model(_peft_config(lora, kept), model, adapter_name=NAME)
    whole: Any = model
    whole.get_input_embeddings().register_forward_hook(_begin_gradient)
    for module in model.modules():
        layer: Any = module
        if isinstance(module, ModulesToSaveWrapper):
            layer.__class__ = _switched(layer.__class__)
        elif isinstance(module, BaseTunerLayer):
            layer.__class__ = _adapted(layer.__class__)
            layer.whole = whole_products


def _begin_gradient(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    """Let the first layer get a gradient as all others do: else it would be compiled by itself."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _check_names(model: Any, lora: LoraConfig) -> list[str]:
    """Refuse names that fit nothing; the modules to be trained whole, by their full names.

    PEFT would take `norm` for every name that ends so, `q_norm` too.
    """
    own = [name for name, module in model.named_modules() if [*module.parameters(False)]]
    linear = [name for name in own if isinstance(model.get_submodule(name), nn.Linear)]
    linear = [name for name in linear if model.get_submodule(name) is not model.lm_head]
    targets = () if isinstance(lora.target_modules, str) else lora.target_modules
    for setting, names, there in (
        ("target_modules", targets, linear),
        ("modules_to_save", lora.modules_to_save, own),
    ):
        for name in names:
            if not any(fits(name, path) for path in there):
                kinds = sorted({path.rpartition(".")[2] for path in there})
                raise ModelError(
                    f"model.lora.{setting} has {name!r}, which names nothing in "
                    f"{type(model).__name__} that could be trained so.",
                    fix=f"name some of {', '.join(kinds)}.",
                )
    tied = {"lm_head", "embed_tokens"} & {n.rpartition(".")[2] for n in lora.modules_to_save}
    if tied and model.config.tie_word_embeddings:
        raise ModelError(
            f"model.lora.modules_to_save has {min(tied)}, which {type(model).__name__} shares "
            "between its first and its last layer.",
            why="Trained in one of both places, it would be another weight there, and the engine "
            "and every checkpoint have one for both.",
            fix="leave it out.",
        )
    return [path for path in own if any(fits(name, path) for name in lora.modules_to_save)]


def _peft_config(lora: LoraConfig, kept: list[str]) -> Any:
    """PEFT's own configuration with these settings."""
    import peft

    targets = lora.target_modules
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        init_lora_weights=lora.init_lora_weights,
        modules_to_save=kept or None,
    )


@cache
def _switched(kind: Any) -> Any:
    """Subclass that computes, and has the weights, of the frozen module while adapters are off."""

    class Switched(kind):
        @property
        def disable_adapters(self) -> bool:
            return _SWITCH.off

    return Switched


@cache
def _adapted(kind: Any) -> Any:
    """Subclass with the trainer's forward pass. One class for all layers shares compiled code."""
    return type(kind.__name__, (Adapted, kind), {})


class Adapted:
    """A linear layer with an adapter."""

    base_layer: Any
    lora_A: Any
    lora_B: Any
    scaling: dict[str, float]
    whole: bool
    """Whether it multiplies with the sum of weight and adapter."""

    def adapter(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A, B, factor of their product), as they are now."""
        return self.lora_A[NAME].weight, self.lora_B[NAME].weight, self.scaling[NAME]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Product with weight and adapter; with the weight alone while adapters are off."""
        base = self.base_layer
        if _SWITCH.off:
            without: torch.Tensor = base(x)
            return without
        a, b, factor = self.adapter()
        if self.whole:
            weight = (base.weight.float() + change(a, b, factor)).to(base.weight.dtype)
            product: torch.Tensor = base.product(x, weight)
            return product
        return add_adapter(base(x), x, a, b, factor)


def change(a: torch.Tensor, b: torch.Tensor, factor: float) -> torch.Tensor:
    """What an adapter adds to its weight, (out, in), in float32.

    Without TF32 on a GPU, which would round A and B to 11 bits.
    """
    a, b = a.float(), b.float()
    if not a.is_cuda:
        return (b @ a) * factor
    # In float64 no setting of the process can make a product less exact than float32.
    return ((b.double() @ a.double()) * factor).float()


def merged(
    model: nn.Module,
    name: str,
    weight: torch.Tensor,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A whole weight with its adapter added, in float32; as it is where it has none.

    Args:
        model: the model with adapters.
        name: of the weight, as `base_weights` gives it.
        weight: it, whole.
        gather: makes an adapter's parameter whole; all ranks call it.
    """
    layer = layer_of(model, name)
    if layer is None:
        return weight
    a, b, factor = layer.adapter()
    a, b = gather(a), gather(b)
    if not weight.is_cuda or layer.whole:  # other products may have other bits than the trainer's
        return _sum(weight, change(a, b, factor))
    total = weight.new_empty(weight.shape, dtype=torch.float32)
    rows = max(SUMMED_AT_ONCE // weight.shape[1], 1)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        total[part] = _sum(weight[part], change(a, b[part], factor))
    return total


def _sum(weight: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Sum in float32. Where nothing is added every bit stays, also the sign of a zero."""
    return torch.where(added == 0, weight.float(), weight.float() + added)


def merge_error(
    layer: Adapted,
    weight: torch.Tensor,
    dtype: torch.dtype,
    gather: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared sums of (what rounding the sum to a dtype does to the change, the change itself).

    Args:
        layer: with an adapter.
        weight: its frozen weight, whole.
        dtype: of the engine.
        gather: makes an adapter's parameter whole; all ranks call it.
    """
    a, b, factor = layer.adapter()
    added, base = change(gather(a), gather(b), factor), weight.to(dtype).float()
    arrived = (weight.float() + added).to(dtype).float() - base
    return _squares(arrived - added), _squares(added)


def _squares(value: torch.Tensor) -> torch.Tensor:
    """Sum of squares in float64, without a copy that is as wide."""
    norm: torch.Tensor = torch.linalg.vector_norm(value, dtype=torch.float64)
    return norm.square()


def layer_of(model: nn.Module, name: str) -> Adapted | None:
    """The layer with an adapter that a weight belongs to; None for all other weights."""
    path, _, last = name.rpartition(".")
    if last != "weight":
        return None
    layer = model.get_submodule(path)
    return layer if isinstance(layer, Adapted) else None


def base_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers of a model by the names that they have without adapters.

    Frozen ones, and the copies of those that are trained whole; no adapters. Those that are kept in
    4 bits are on the meta device, for `base_weight`.
    """
    for name, value in chain(named_weights(model), four_bit.named_weights(model)):
        if ".lora_A." in name or ".lora_B." in name or f"{KEPT}." in name:
            continue
        yield name.replace(f"{BASE}.", ".").replace(f"{COPY}.", "."), value


def base_weight(model: nn.Module, name: str) -> torch.Tensor:
    """A weight that `base_weights` gave on the meta device."""
    layer: Any = model.get_submodule(name.rpartition(".")[0])
    weight: torch.Tensor = getattr(layer, "base_layer", layer).weight
    return weight


def adapter_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The layers that hold the matrices A and B of all adapters, by the names of these."""
    return [
        (f"{name}.weight", layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and (".lora_A." in name or ".lora_B." in name)
    ]


def as_engines_have(
    model: nn.Module, name: str, value: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """A whole A or B under the name that an engine wants.

    And zeros for layers without adapter that SGLang computes in one product with this one: it takes
    adapters of all of them or none.
    """
    yield name.replace(f".{NAME}.", "."), value
    path, _, matrix = name.replace(f".{NAME}.", ".").partition(".lora_")
    parent, _, own = path.rpartition(".")
    group = next((group for group in FUSED if own in group), ())
    layers = {each: model.get_submodule(f"{parent}.{each}") for each in group}
    adapted = [each for each, layer in layers.items() if isinstance(layer, Adapted)]
    if adapted[:1] != [own]:  # the first of them stands in for those that have none
        return
    for each, layer in layers.items():
        if each not in adapted:
            linear: Any = layer
            rows = len(value) if matrix.startswith("A") else linear.out_features
            yield f"{parent}.{each}.lora_{matrix}", value.new_zeros(rows, value.shape[1])


def adapter_state(model: Any, gathered: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Trained parameters under the names of PEFT's files.

    Args:
        model: the model with adapters.
        gathered: its trained parameters by name, whole.
    """
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, gathered, adapter_name=NAME, save_embedding_layers=False
    )
    return {f"base_model.model.{name}": value for name, value in state.items()}


def read_adapter(model: Any, directory: Path) -> None:
    """Give a model's adapters, and what is trained whole beside them, the numbers of PEFT's files.

    Args:
        model: the model with adapters; whole, not sharded yet.
        directory: of the adapter.

    Raises:
        ModelError: the files cannot be read, or are of other adapters.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / WEIGHTS
    own = adapter_state(model, {n: p for n, p in model.named_parameters() if p.requires_grad})
    try:
        there = load_file(file)
        if own.keys() != there.keys():
            raise ValueError("it holds other adapters than the model has")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(there[name])
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The adapter {file} cannot be read.",
            why=str(error),
            fix="give model.lora.adapter_path a whole adapter of this model, or leave it out.",
        ) from error


def by_peft(model: Any, lora: LoraConfig | None, device: torch.device) -> Any:
    """A Transformers model as PEFT computes it with the adapter that training starts from.

    Args:
        model: the model of the files.
        lora: the adapter, and how the weights beside it are kept.
        device: what is computed on.
    """
    if lora is not None and lora.load_in_4bit:
        four_bit.round_weights(model.model.layers, device)
    if lora is None or lora.adapter_path is None:
        return model
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a directory beside the adapter it knows nothing
        return PeftModel.from_pretrained(model, adapter_directory(lora)).merge_and_unload()


def save_config(model: Any, directory: str, base: str) -> None:
    """Write `adapter_config.json` as PEFT reads it.

    Args:
        model: the model with adapters.
        directory: where to.
        base: name or directory of the model that the adapter belongs to.
    """
    config = copy(model.peft_config[NAME])
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(directory)
