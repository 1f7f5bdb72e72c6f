"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the tree: frozen, and closed to keys that nobody reads."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
