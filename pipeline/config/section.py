"""`Section`: what all groups of options have in common."""

from __future__ import annotations

import re
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of options. Unknown names are refused, and numbers that JSON does not have; every field has a docstring."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


def matching(pattern: str, expected: str) -> AfterValidator:
    """Validator of text that must match `pattern` as a whole. `expected` says in the message what does."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}, got {value!r}")
        return value

    return AfterValidator(check)


def as_list(value: Any) -> Any:
    """Text as its parts between commas, one value as a list of it."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part]
    return value if isinstance(value, (list, tuple)) else [value]
