"""`RoutedExperts`: the experts that the tokens of a sample were sent to, as small numbers.

The engine's own record of a mixture of experts, or what a part of the kit makes of it. A row
belongs to a token that was read; the last token of a sample is only written, so it has none.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from kit.errors import DataError

UNSIGNED = (np.dtype("uint8"), np.dtype("uint16"))


def dtype_for(experts: int) -> np.dtype[Any]:
    """The smallest dtype that holds their numbers, and one more for tokens without a record."""
    return UNSIGNED[0] if experts < 256 else UNSIGNED[1]


def records(samples: Iterable[Any]) -> list[np.ndarray[Any, Any] | None] | None:
    """The arrays of samples' records, None for one without; None where none has any."""
    found = [s.rollout_routed_experts for s in samples]
    if all(record is None for record in found):
        return None
    return [None if record is None else record.array for record in found]


def load(found: Iterable[RoutedExperts]) -> np.ndarray[Any, Any]:
    """How often each expert was taken, (layers, experts), in records of one model."""
    total: Any = 0
    for record in found:
        chosen = record.array[record.known].astype(np.int64)
        chosen = chosen + np.arange(len(record.layers))[:, None] * record.count
        size = len(record.layers) * record.count
        total = total + np.bincount(chosen.ravel(), minlength=size).reshape(-1, record.count)
    return np.asarray(total)


class RoutedExperts:
    """Experts of a sample's tokens but the last: `array` is (tokens - 1, layers, top k).

    Where nothing is known of a token, its row holds the largest number of the dtype. The array
    cannot be written to, two records with the same contents are equal, and NumPy takes it for the
    array that it holds.
    """

    __slots__ = ("array", "count", "layers")

    def __init__(self, array: np.ndarray[Any, Any], layers: Sequence[int], count: int) -> None:
        """Take the array.

        Args:
            array: the experts.
            layers: numbers of its layers in the model, ascending.
            count: experts that each of them has.

        Raises:
            DataError: they do not fit each other, or the array is of another dtype.
        """
        if array.ndim != 3 or array.shape[1] != len(layers) or array.dtype not in UNSIGNED:
            raise DataError(
                f"A record of experts is (tokens - 1, layers, top k) in uint8 or uint16, not "
                f"{array.shape} in {array.dtype} for {len(layers)} layers."
            )
        if not array.flags.c_contiguous or array.flags.writeable:
            array = array.copy()  # a part would hold the whole in memory
            array.flags.writeable = False
        self.array, self.layers, self.count = array, tuple(layers), count

    def unknown(self, rows: int) -> RoutedExperts:
        """A record of so many rows, of the same layers, in which nothing is known."""
        shape = (rows, *self.array.shape[1:])
        return self._with(np.full(shape, self.missing, self.array.dtype))

    def _with(self, array: np.ndarray[Any, Any]) -> RoutedExperts:
        return RoutedExperts(array, self.layers, self.count)

    @property
    def missing(self) -> int:
        """The number that stands for an unknown expert."""
        return int(np.iinfo(self.array.dtype).max)

    @property
    def known(self) -> np.ndarray[Any, Any]:
        """Whether a row is a record, by row."""
        known: np.ndarray[Any, Any] = self.array[:, 0, 0] != self.missing
        return known

    def first(self, rows: int) -> RoutedExperts:
        """The first so many rows."""
        return self if rows >= len(self) else self._with(self.array[: max(rows, 0)])

    def followed_by(self, longer: RoutedExperts) -> RoutedExperts:
        """These rows, and of a longer record those after them. Raises DataError if it is another's.

        A token's row belongs to the pass that gave its log-prob; a pass that goes on later reads
        the earlier tokens again, with other weights.
        """
        self.check_alike(longer)
        whole = np.concatenate([self.array, longer.array[len(self) :]])
        return self._with(whole)

    def check_alike(self, other: RoutedExperts) -> None:
        """Raise DataError where another record is of other layers, or of another top k."""
        ours, theirs = (self.layers, self.array.shape[2]), (other.layers, other.array.shape[2])
        if ours != theirs:
            raise DataError(
                f"Records of experts are of {ours[1]} experts in the layers {list(ours[0])}, and "
                f"of {theirs[1]} in the layers {list(theirs[0])}.",
                fix="take samples of one model.",
            )

    def to_json(self) -> dict[str, Any]:
        """JSON's types: shape, layers, dtype, and the array's bytes in base64."""
        return {
            "shape": list(self.array.shape),
            "layers": list(self.layers),
            "experts": self.count,
            "dtype": str(self.array.dtype),
            "base64": base64.b64encode(self.array.tobytes()).decode("ascii"),
        }

    @classmethod
    def from_json(cls, row: Any) -> Self:
        """The inverse of `to_json`. Raises DataError."""
        try:
            if not isinstance(row, Mapping):
                raise TypeError("it is no mapping")
            dtype = np.dtype(str(row["dtype"]))
            layers, shape, count = row["layers"], row["shape"], row["experts"]
            if dtype not in UNSIGNED or {*map(type, [*layers, *shape, count])} - {int}:
                raise ValueError("a dtype, layer or size is of another kind")
            flat = np.frombuffer(base64.b64decode(row["base64"], validate=True), dtype)
            if len(shape) != 3 or min(shape) < 0:
                raise ValueError(f"its shape is {shape}")
            return cls(flat.reshape(shape), layers, count)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise DataError("It is no record of experts.", why=str(error)) from error

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tokens - 1, layers with experts, top k)."""
        rows, layers, top_k = self.array.shape
        return rows, layers, top_k

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return np.array(self.array, dtype=dtype) if copy else np.asarray(self.array, dtype=dtype)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutedExperts):
            return NotImplemented
        return (
            (self.layers, self.count) == (other.layers, other.count)
            and self.array.dtype == other.array.dtype
            and np.array_equal(self.array, other.array)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        rows, layers, top_k = self.array.shape
        return f"RoutedExperts({rows} tokens, {layers} layers, {top_k} experts each)"
