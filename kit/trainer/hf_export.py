"""A network's weights in the form in which models are published: safetensors, under the names
that Transformers and SGLang load, in files of bounded size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch

from kit.errors import CheckpointError
from kit.models import lora, low_precision
from kit.models.heads import mtp
from kit.models.source import EMBEDDING, INDEX, OUTPUT, copied_by, mtp_weights
from kit.models.state_dict import saved_buffers
from kit.operators.low_precision import Scheme
from kit.trainer.backend import TrainerBackend, whole_weights
from kit.trainer.learner import DRAFT, POLICY

FILE_BYTES = 4 << 30


def export(
    backend: TrainerBackend,
    directory: str,
    dtype: str,
    *,
    of: str = POLICY,
    rank: int = 0,
    file_bytes: int = FILE_BYTES,
    scheme: Scheme | None = None,
    trained_mtp: bool = False,
    mtp_of: str | None = None,
    beside: Mapping[str, torch.Tensor] | None = None,
) -> int:
    """Write the weights of `policy` or `draft`; how many bytes. All ranks gather, rank 0 writes.

    With the policy go the layers of the model that predict further tokens, which are no part of
    it here: as they were trained (`draft`), or as its files have them.

    Args:
        backend: whose.
        directory: where to; it is there.
        dtype: of the parameters; buffers, codes and scales have their own.
        of: which network.
        rank: this process's.
        file_bytes: the most that a file holds, but for a tensor that is larger.
        scheme: how linear layers are quantised; None leaves them as they are.
        trained_mtp: whether `draft` is such a layer.
        mtp_of: otherwise the directory of the model whose such layers are copied; None copies none.
        beside: tensors that a draft's directory has beside its weights.

    Raises:
        CheckpointError: they cannot be written.
        ModelError: weights that are not finite are to be quantised.
    """
    kept = getattr(torch, dtype)
    named = _named_tensors(backend, of, kept, scheme)
    if of == POLICY and trained_mtp:
        named = chain(named, _named_tensors(backend, DRAFT, kept, None))
    if of == DRAFT and beside:
        named = chain(named, beside.items())
    if rank:
        for _ in named:  # gathering takes all ranks
            pass
        return 0
    if of == POLICY and mtp_of is not None:
        named = _with_mtp(named, mtp_of, trained=trained_mtp)
    return write(named, directory, file_bytes=file_bytes)


def write(
    named: Iterable[tuple[str, torch.Tensor]], directory: str, *, file_bytes: int = FILE_BYTES
) -> int:
    """Write tensors by name, in files of bounded size; how many bytes.

    Args:
        named: in the dtype in which they are written; all are taken, also after an error.
        directory: where to; it is there.
        file_bytes: the most that a file holds, but for a tensor that is larger.

    Raises:
        CheckpointError: they cannot be written.
    """
    folder, problem = Path(directory), ""
    parts: list[dict[str, int]] = []
    for part in _parts(named, file_bytes):
        if problem:
            continue  # other ranks still need this one to gather
        try:
            parts.append(_written(folder, len(parts), part))
        except OSError as error:
            problem = str(error)
    if not problem:
        try:
            _named(folder, parts)
        except OSError as error:
            problem = str(error)
    if problem:
        raise CheckpointError(
            f"The weights cannot be written into {directory}.",
            why=problem,
            fix="free space or name another directory; the session is unchanged.",
        )
    return sum(size for sizes in parts for size in sizes.values())


def export_adapter(
    backend: TrainerBackend, directory: str, dtype: str, base: str, *, rank: int = 0
) -> int:
    """Write the policy's adapters as PEFT reads them; how many bytes. All ranks gather.

    Args:
        backend: whose policy; it has adapters.
        directory: where to; it is there.
        dtype: of the adapters.
        base: name or directory of the model that they belong to.
        rank: this process's; the first one writes.

    Raises:
        CheckpointError: they cannot be written.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    kept, whole = getattr(torch, dtype), {}
    for name, value in backend.named_trained():
        gathered = backend.gather(name, value).detach()
        if not rank:
            whole[name] = gathered.to("cpu", kept, copy=True).contiguous()
    if rank:
        return 0
    model = backend.module()
    state = lora.adapter_state(model, whole)
    try:
        lora.save_config(model, directory, base)
        save_file(state, Path(directory) / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"The adapters cannot be written into {directory}.",
            why=str(error),
            fix="free space or name another directory; the session is unchanged.",
        ) from error
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _named_tensors(
    backend: TrainerBackend, of: str, dtype: torch.dtype, scheme: Scheme | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights, whole, by their names in files."""
    exact = {name for name, _ in saved_buffers(backend.module(of))}
    for name, value in whole_weights(backend, of):
        for saved, tensor in backend.as_saved(name, value, of):
            if scheme and low_precision.is_quantized(saved):
                yield from low_precision.as_stored(saved, tensor, scheme)
            else:
                yield saved, tensor if name in exact else tensor.to(dtype)


def _with_mtp(
    named: Iterable[tuple[str, torch.Tensor]], path: str, *, trained: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """A policy's weights, and those of its files' layers that predict further tokens.

    Copies of embedding and output there are copies of the policy's.

    Args:
        named: the policy's, and those of its layers where they are `trained`.
        path: the model's directory.
        trained: whether only such copies are missing.
    """
    shared: dict[str, torch.Tensor] = {}
    copied = {copied_by(name) for name in mtp_weights(Path(path))}
    for name, tensor in named:
        if name in (EMBEDDING, OUTPUT) and copied - {""}:
            shared[name] = tensor
        yield name, tensor
    for name, tensor in mtp.read(path):
        of = copied_by(name)
        if trained and not of:
            continue
        yield name, shared.get(of, shared[EMBEDDING]) if of else tensor


def _parts(
    named: Iterable[tuple[str, torch.Tensor]], limit: int
) -> Iterator[dict[str, torch.Tensor]]:
    """As many of the tensors at a time as a file takes, on the host."""
    part: dict[str, torch.Tensor] = {}
    room = limit
    for name, tensor in named:
        size = tensor.numel() * tensor.itemsize
        if part and size > room:
            yield part
            part, room = {}, limit
        # A copy: experts share a tensor, which safetensors would refuse.
        part[name] = tensor.detach().to("cpu", copy=True).contiguous()
        room -= size
    yield part


def _written(folder: Path, number: int, part: dict[str, torch.Tensor]) -> dict[str, int]:
    """Write a file whose final name depends on how many there will be; bytes by name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(part, folder / f"part-{number}.safetensors", {"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    return {name: tensor.numel() * tensor.element_size() for name, tensor in part.items()}


def _named(folder: Path, parts: list[dict[str, int]]) -> None:
    """Give the files their names, and say in an index what is where if there are several."""
    if len(parts) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, sizes in enumerate(parts):
        name = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / name)
        places |= dict.fromkeys(sizes, name)
    total = sum(size for sizes in parts for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
