"""SGLang's checksum of each weight, without the wait for a GPU that it begins and ends with."""

from __future__ import annotations

import hashlib
from typing import Any

from sglang.srt.utils import weight_checker


def _compute_checksum(self: Any) -> dict[str, Any]:
    checksums = {
        name: weight_checker._hash_tensor(value)
        for name, value in self._model_state()
        if not weight_checker._is_non_persistent_buffer_name(name)
    }
    everything = "".join(f"{name}{checksums[name]}" for name in sorted(checksums))
    found: dict[str, Any] = weight_checker.ChecksumInfo(
        checksums=checksums,
        per_gpu_checksum=hashlib.sha256(everything.encode()).hexdigest(),
        parallelism_info=self._parallelism_info(),
    ).model_dump()
    return found


def register() -> None:
    """Let this process' SGLang compute checksums on a CPU."""
    weight_checker.WeightChecker._compute_checksum = _compute_checksum
