"""Checksums of each parameter on both sides of a sync, and their comparison.

Parameters go by SGLang's names, because only the trainer can compute one side under the names of
the other: SGLang keeps q, k and v in one piece, and gate and up, and pads embeddings. The driver
compares, and has no torch loaded: functions that need it import it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
BROKEN = "!"
"""Ends the checksum of a tensor that is not all numbers."""
ADAPTER_OF = "adapter "
"""Begins the action of SGLang's checker that gives the checksums of the adapter that it names."""
NO_CODE = -128
"""A number in int8 that is no code of a quantised weight."""
NAN_CODE = 0x7F
"""The bits of NaN in e4m3, but for its sign."""
SCALE = ".weight_scale"
"""Ends the names of scales of quantised weights."""
PIECE = 1 << 26
"""Bytes of which a checksum is taken at a time."""


def trainer_checksums(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, list[str]]]:
    """Checksums that SGLang may have, by its parameter name and dtype.

    Args:
        named: whole parameters as the engine was given them, under the trainer's names.
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
            sums[renamed] = _by_dtype(name, value)
            continue
        whole_name, place = FUSED[piece]
        fused = name.replace(piece, whole_name)
        parts.setdefault(fused, {})[place] = value
        if len(parts[fused]) == (3 if whole_name == "qkv_proj" else 2):
            pieces = parts.pop(fused)
            sums[fused] = _by_dtype(fused, torch.cat([pieces[i] for i in sorted(pieces)]))
    return sums


def _by_dtype(name: str, value: torch.Tensor) -> dict[str, list[str]]:
    import torch

    if value.itemsize == 1 or name.endswith(SCALE):  # codes and scales have one dtype everywhere
        return {dtype: [checksum(value)] for dtype in ("float32", "bfloat16")}
    forms = {}
    for dtype in ("float32", "bfloat16"):
        tensor = value.to(getattr(torch, dtype))
        sums = [checksum(tensor)]
        missing = -len(value) % VOCABULARY_STEP if value.ndim == 2 else 0
        if missing:
            sums.append(checksum(torch.nn.functional.pad(tensor, (0, 0, 0, missing))))
        if (
            dtype == "bfloat16"
        ):  # some of SGLang's parameters have room for more than they are given
            sums.append(checksum(tensor.float()))
        forms[dtype] = sums
    return forms


def checksum(tensor: torch.Tensor) -> str:
    """Checksum of a tensor's bits; ends in `!` where one of its numbers is NaN, or no code.

    Unlike SGLang's own it needs no kernel that a GPU would have to compile first.
    """
    import torch

    flat = tensor.detach().contiguous().view(-1)
    total = 0
    for piece in flat.view(torch.uint8).split(PIECE):
        whole = torch.zeros(-(-len(piece) // 8), dtype=torch.int64, device=flat.device)
        whole.view(torch.uint8)[: len(piece)] = piece
        # Odd factors: no single change cancels out, and a change of places is one.
        factors = torch.arange(1, 2 * len(whole), 2, device=flat.device)
        total = total * 31 + int((whole * factors).sum())
    if tensor.dtype is torch.float8_e4m3fn:  # which has no arithmetic on every device
        broken = bool(((flat.view(torch.uint8) & NAN_CODE) == NAN_CODE).any())
    elif tensor.dtype is torch.int8:
        broken = bool((flat == NO_CODE).any())
    else:
        broken = tensor.is_floating_point() and bool(flat.isnan().any())
    return f"{total % (1 << 64):016x}{BROKEN if broken else ''}"


async def engine_checksums(manager: Any, action: str = "checksum") -> list[dict[str, str]]:
    """A checksum of each weight the engine holds, by SGLang's names, for each of its devices.

    Args:
        manager: the `tokenizer_manager` of a running `sglang.Engine`.
        action: `checksum`; or what `kit.engine.patches` adds: `erase`, which overwrites all
            parameters with NaN, and `record`, both of which give none; and `recorded`, which gives
            digests of what the model's parts have put out.

    Raises:
        StackError: this SGLang cannot compute them.
    """
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    success, message, ranks, _ = await manager.check_weights(CheckWeightsReqInput(action=action))
    if not success or not (ranks or action in ("erase", "record")):
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
        cls,
        trainer: dict[str, dict[str, list[str]]],
        engines: list[dict[str, str]],
        dtype: str,
        reshaped: Collection[str] = (),
    ) -> Self:
        """Sort the parameters of all replicas.

        Args:
            trainer: as `trainer_checksums` gives them.
            engines: those of each replica.
            dtype: the trainer's.
            reshaped: parameters that the engine keeps in a form of its own: they are not compared.
        """
        different: set[str] = set()
        rounded: dict[str, str] = {}
        names = {name for engine in engines for name in engine} - set(reshaped)
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
            sorted(names ^ (set(trainer) - set(reshaped))),
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
            why = "After the sync their checksums differ between trainer and engine."
            raise not_arrived(self.different, self.compared, why)
        return self.compared


def not_arrived(names: Collection[str], compared: int, why: str) -> StackError:
    """Error of a sync after which the engine lacks weights.

    Args:
        names: of them, as SGLang has them.
        compared: how many were looked at.
        why: what shows it.
    """
    shown = ", ".join(sorted(names)[:3]) + (" ..." if len(names) > 3 else "")
    return StackError(
        f"{len(names)} of {compared} parameters did not reach the engine: {shown}.",
        why=why,
        fix="call session.sync(verify=True) again; if they differ still, "
        "session.check_mismatch(deep=True) looks for the cause.",
    )
