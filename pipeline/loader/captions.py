"""Which caption a row trains with: one of several, or none, by draws that depend on seed, epoch and row only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.loader.arguments import number
from pipeline.loader.draws import key_of, uniform, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

METADATA = "metadata."


@dataclass(frozen=True, slots=True)
class CaptionRule:
    """`sources`: `caption`, or keys of the metadata as `metadata.short`; a list there is several captions. `dropout`: fraction of rows
    that get "" instead.
    """

    sources: tuple[str, ...] = ("caption",)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.sources or any(name != "caption" and not name.startswith(METADATA) for name in self.sources):
            raise ConfigError(f'captions: expected "caption" or "metadata.KEY", one or more, got {list(self.sources)}')
        object.__setattr__(self, "dropout", number("caption_dropout", self.dropout, 0.0, 1.0))

    @property
    def needs_metadata(self) -> bool:
        """Whether the column `metadata` must be read."""
        return any(name != "caption" for name in self.sources)

    @property
    def draws(self) -> bool:
        """Whether `choose` uses its key."""
        return bool(self.dropout) or self.sources != ("caption",)

    def chosen(
        self, captions: Sequence[str | None], metadata: Sequence[dict[str, Any] | None], keys: Sequence[int]
    ) -> list[str]:
        """`choose` for each row."""
        if not self.draws:
            return [caption or "" for caption in captions]
        return [self.choose(*each) for each in zip(captions, metadata, keys, strict=True)]

    def candidates(self, caption: str | None, metadata: dict[str, Any] | None) -> list[str]:
        """All captions of a row, of which `choose` takes one; "" is none of them."""
        return [text for name in self.sources for text in _texts(name, caption, metadata)]

    def choose(self, caption: str | None, metadata: dict[str, Any] | None, key: int) -> str:
        """The caption of a row; each that it has is equally likely. `key`: of the row in its epoch."""
        if self.dropout and float(uniform(key_of(key, "caption dropout"), 1)[0]) < self.dropout:
            return ""
        if self.sources == ("caption",):
            return caption or ""
        found = self.candidates(caption, metadata)
        return found[whole(key_of(key, "caption"), len(found))] if found else ""


def _texts(name: str, caption: str | None, metadata: dict[str, Any] | None) -> list[str]:
    value: Any = caption if name == "caption" else metadata
    for part in name.split(".")[1:]:
        value = value.get(part) if isinstance(value, dict) else None
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]
