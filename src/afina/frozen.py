"""The base of all records that are validated: a pydantic model that is frozen and refuses unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["FrozenModel"]


class FrozenModel(BaseModel):
    """A frozen value. An unknown key is an error, in a user's file and in a record that afina wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True)
