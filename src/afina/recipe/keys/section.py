"""The base of all sections of a recipe: frozen values, errors with their keys, names and lists of names."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from afina.errors import nearest
from afina.frozen import FrozenModel
from afina.redact import looks_secret, redact

__all__ = ["SECRET", "KeyedError", "KeyedErrors", "Names", "Section", "Text", "listed", "shown", "unknown"]

SECRET = (
    "holds a token or a password",
    "leave it out and set HF_TOKEN in the environment: a recipe is shared, and copied",
)


class KeyedError(ValueError):
    """A value error at `keys`, below the key that is being validated."""

    def __init__(self, message: str, *keys: str, remedy: str = "") -> None:
        super().__init__(message)
        self.keys, self.remedy = keys, remedy


class KeyedErrors(ValueError):
    """Several of them at once."""

    def __init__(self, errors: Sequence[KeyedError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = tuple(errors)


def shown(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if value is None:
        return "nothing (null)"
    text = str(value).lower() if isinstance(value, bool) else redact(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."


class Section(FrozenModel):
    # hide_input_in_errors: a misplaced value may be a secret.
    model_config = ConfigDict(allow_inf_nan=False, hide_input_in_errors=True)

    #: Keys that were added later. Unset, they are left out of digests, so that older plans and prepared data keep theirs.
    added_later: ClassVar[tuple[str, ...]] = ()

    def digested(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """The section as plain values for a digest, without the keys in `exclude` and unset keys of `added_later`."""
        values = self.model_dump(mode="json", exclude=set(exclude))
        for name in list(values):
            value = getattr(self, name)
            if isinstance(value, Section):
                values[name] = value.digested()
            elif name in self.added_later and value == type(self).model_fields[name].get_default():
                del values[name]
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _no_stray_boolean_and_no_secret(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and not _takes_boolean(field.annotation):
            remedy = "write `{}` for the defaults, or leave it out" if _takes_section(field.annotation) else ""
            raise KeyedError(f"{str(value).lower()} makes no sense here", remedy=remedy)
        if not isinstance(value, dict) and looks_secret(value):
            raise KeyedError(SECRET[0], remedy=SECRET[1])
        return value

    def problems(self) -> Iterator[KeyedError]:
        """Everything in this section that does not fit together."""
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self) -> Any:
        if problems := list(self.problems()):
            raise KeyedErrors(problems)
        return self


def _takes_boolean(annotation: Any) -> bool:
    return annotation is bool or any(map(_takes_boolean, get_args(annotation)))


def _takes_section(annotation: Any) -> bool:
    return (isinstance(annotation, type) and issubclass(annotation, Section)) or any(
        map(_takes_section, get_args(annotation))
    )


def listed(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be text, or a list of texts, found {shown(value)}")
    return value


def unknown(name: str, kind: str, known: Iterable[str]) -> str:
    return " ".join(filter(None, [f"`{name}` is not {kind};", nearest(name, known), f"known: {', '.join(known)}"]))


Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], BeforeValidator(listed)]
