"""The section `adapter`: low-rank adapters (LoRA) beside frozen weights, in place of training all of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from afina.recipe.keys.section import Section, Text, listed

__all__ = ["Adapter"]

_IN_FOUR_BITS = "QLoRA is LoRA beside a base in 4 bits: write `kind: lora`, and `train.base_dtype: nf4`"


class Adapter(Section):
    """LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), as peft has it.

    `targets` names layers by the end of their path, as peft does: `auto` (peft's choice for the architecture), `all-linear`
    (every linear layer below the head), or names. The head is always trained whole.
    """

    kind: Literal["lora"] = "lora"
    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: Literal["auto", "all-linear"] | tuple[Text, ...] = "auto"
    rslora: bool = False
    dora: bool = False

    @property
    def variant(self) -> str:
        """LoRA, or the variant of it."""
        return " ".join(name for name, chosen in (("rsLoRA", self.rslora), ("DoRA", self.dora)) if chosen) or "LoRA"

    @property
    def layers(self) -> str:
        """The layers in words, as far as the recipe tells them."""
        words = {"auto": "the attention layers", "all-linear": "all linear layers"}
        return words[self.targets] if isinstance(self.targets, str) else f"the layers {', '.join(self.targets)}"

    @field_validator("kind", mode="before")
    @classmethod
    def _not_in_four_bits(cls, value: Any) -> Any:
        if value == "qlora":
            raise ValueError(_IN_FOUR_BITS)
        return value

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if value in ("auto", "all-linear"):
            return value
        names = tuple(listed(value))
        if not names:
            raise ValueError("is an empty list: name layers, or write auto or all-linear")
        return names
