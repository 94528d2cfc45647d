"""What every section of a recipe is made of; see `schema.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1, strict=True)]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, unknown keys refused, no value converted (`"0.1"` is not a number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
