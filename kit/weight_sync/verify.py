"""Checksums of each parameter on both sides of a sync, and their comparison.

Parameters go by SGLang's names, because only the trainer can compute one side under the names of
the other: SGLang keeps q, k and v in one piece, and gate and up, and pads embeddings. The driver
compares, and has no torch loaded: functions that need it import it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from kit.errors import StackError

if TYPE_CHECKING:
    import torch


FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
"""Hugging Face's part of a parameter that SGLang keeps in one piece, and its place there."""
RENAMED = {"experts.gate_up_proj": "experts.w13_weight", "experts.down_proj": "experts.w2_weight"}
VOCABULARY_STEP = 64
"""SGLang pads embeddings with zeros to a multiple of it."""


def trainer_checksums(
    named: Iterable[tuple[str, torch.Tensor]],
) -> dict[str, dict[str, list[str]]]:
    """Checksums that SGLang may have, by its parameter name and dtype.

    Args:
        named: whole parameters as the engine was given them, under the trainer's names.

    Raises:
        StackError: this SGLang has no checksum for a GPU's tensors.
    """
    import torch

    sums: dict[str, dict[str, list[str]]] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in named:
        piece = next((p for p in FUSED if f".{p}." in name), None)
        if piece is None:
            renamed = name
            for ours, theirs in RENAMED.items():
                renamed = renamed.replace(ours, theirs)
            sums[renamed] = _by_dtype(value)
            continue
        whole_name, place = FUSED[piece]
        fused = name.replace(piece, whole_name)
        parts.setdefault(fused, {})[place] = value
        if len(parts[fused]) == (3 if whole_name == "qkv_proj" else 2):
            pieces = parts.pop(fused)
            sums[fused] = _by_dtype(torch.cat([pieces[i] for i in sorted(pieces)]))
    return sums


def _by_dtype(value: torch.Tensor) -> dict[str, list[str]]:
    import torch

    forms = {}
    for dtype in ("float32", "bfloat16"):
        tensor = value.to(getattr(torch, dtype))
        sums = [checksum(tensor)]
        missing = -len(value) % VOCABULARY_STEP if value.ndim == 2 else 0
        if missing:
            sums.append(checksum(torch.nn.functional.pad(tensor, (0, 0, 0, missing))))
        forms[dtype] = sums
    return forms


def checksum(tensor: torch.Tensor) -> str:
    """Checksum of a tensor, as SGLang's weight checker computes it."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.is_cuda:
        from sglang.srt.managers.mm_utils import tensor_hash

        return f"{tensor_hash(tensor):016x}"
    # The same, without SGLang's imports, which take a CPU many seconds.
    digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).digest()
    return f"{int.from_bytes(digest[:8], 'big'):016x}"


def digest(tensor: torch.Tensor) -> str:
    """Cheap checksum of a tensor's bits; ends in `!` where one of its numbers is NaN.

    Unlike SGLang's it needs no kernel that has to be compiled.
    """
    import torch

    flat = tensor.detach().contiguous().view(-1)
    total = 0
    for piece in flat.view(torch.uint8).split(1 << 26):
        padded = torch.nn.functional.pad(piece, (0, -len(piece) % 8)).view(torch.int64)
        places = torch.arange(1, 2 * len(padded), 2, device=flat.device)
        total = total * 31 + int((padded * places).sum())
    broken = tensor.is_floating_point() and bool(flat.isnan().any())
    return f"{total % (1 << 64):016x}{'!' if broken else ''}"


async def engine_checksums(manager: Any, action: str = "checksum") -> list[dict[str, str]]:
    """A checksum of each parameter the engine holds, by SGLang's names, for each of its devices.

    Args:
        manager: the `tokenizer_manager` of a running `sglang.Engine`.
        action: `checksum` for SGLang's own; `digest` for those of `digest`, buffers included;
            `erase` overwrites all parameters with NaN, and gives none.

    Raises:
        StackError: this SGLang cannot compute them.
    """
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    success, message, ranks, _ = await manager.check_weights(CheckWeightsReqInput(action=action))
    if not success or not (ranks or action == "erase"):
        raise StackError(
            "The engine gave no checksums of its weights.",
            why=str(message),
            fix="install the SGLang version that requirements.lock names.",
        )
    return [rank["checksums"] for rank in ranks or ()]


@dataclass(frozen=True, slots=True)
class Checksums:
    """Trainer's and engine's parameters side by side, by SGLang's names."""

    compared: int
    different: list[str]
    rounded: list[str]
    """Equal, but for a dtype that is not the trainer's."""
    engine_dtype: str
    """Of these; empty where there are none."""
    one_sided: list[str]

    @classmethod
    def of(
        cls, trainer: dict[str, dict[str, list[str]]], engines: list[dict[str, str]], dtype: str
    ) -> Self:
        """Sort the parameters of all replicas."""
        different: set[str] = set()
        rounded: dict[str, str] = {}
        names = {name for engine in engines for name in engine}
        for name in names & set(trainer):
            for engine in engines:
                fits = [d for d, sums in trainer[name].items() if engine.get(name) in sums]
                if not fits:
                    different.add(name)
                elif dtype not in fits:
                    rounded[name] = fits[0]
        return cls(
            len(names & set(trainer)),
            sorted(different),
            sorted(rounded),
            next(iter(rounded.values()), ""),
            sorted(names ^ set(trainer)),
        )

    def lines(self) -> list[str]:
        """The comparison as lines of evidence."""
        shown = f" ({', '.join(self.different[:3])})" if self.different else ""
        lines = [f"checksums of {self.compared} parameters: {len(self.different)} differ{shown}"]
        if self.rounded:
            lines.append(f"{len(self.rounded)} parameters are {self.engine_dtype} in the engine")
        if self.one_sided:
            shown = ", ".join(self.one_sided[:3])
            lines.append(f"{len(self.one_sided)} parameters could not be matched ({shown})")
        return lines

    def require_equal(self) -> int:
        """Return the number of compared parameters. Raises StackError if some differ."""
        if self.different:
            raise StackError(
                f"{len(self.different)} of {self.compared} parameters did not reach the engine: "
                f"{', '.join(self.different[:3])}{' ...' if len(self.different) > 3 else ''}.",
                why="After the hand-over their checksums differ between trainer and engine.",
                fix="call session.sync(verify=True) again; if they differ still, "
                "session.check_mismatch(deep=True) looks for the cause.",
            )
        return self.compared
