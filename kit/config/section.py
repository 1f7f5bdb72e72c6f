"""What every section of the settings is, and the kinds of numbers in it."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from kit.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]


def _kinds(annotation: Any) -> frozenset[Any]:
    """The plain types that an annotation takes, those of its alternatives included."""
    if isinstance(annotation, type):
        return frozenset({annotation})
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds(inner[0])
    if origin in (Union, UnionType):
        return frozenset().union(*map(_kinds, inner))
    if origin is Literal:
        return frozenset(map(type, inner))
    return frozenset({origin or annotation})


class Section(BaseModel):
    """A part of the tree: frozen, and closed to keys that nobody reads."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `yes` and `true` where a number is meant, which pydantic would take for 1."""
        if isinstance(value, bool) and info.field_name is not None:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if bool not in kinds and not kinds.isdisjoint((int, float)):
                raise PydanticCustomError("number", "a number is meant, and this is a truth value")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse. Raises ConfigError."""
        raise ConfigError(
            f"Settings are not changed in place: {name} stays {getattr(self, name, None)!r}.",
            fix='make others, `config = config.replace("training.learning_rate", 1e-5)`; in a '
            "running session call `session.configure(learning_rate=1e-5)`.",
        )
