"""Which caption a row trains with: one of several, or none, by draws that depend on seed, epoch and row only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.loader.arguments import number
from pipeline.loader.draws import key_of, uniform, whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

METADATA, CAPTIONS = "metadata.", "captions."
NAMED = ("captions", "caption_names")


@dataclass(frozen=True, slots=True)
class CaptionRule:
    """`sources`: `caption`; `captions`, all of a row; `captions.short`, those of that name; keys of the metadata as `metadata.short`, where
    a list is several captions. `dropout`: fraction of rows that get "" instead.
    """

    sources: tuple[str, ...] = ("caption",)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.sources or any(not _is_source(name) for name in self.sources):
            raise ConfigError(
                f'captions: expected "caption", "captions", "captions.NAME" or "metadata.KEY", one or more, got {list(self.sources)}'
            )
        object.__setattr__(self, "dropout", number("caption_dropout", self.dropout, 0.0, 1.0))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns to be read besides the caption."""
        needed = ["metadata"] if any(name.startswith(METADATA) for name in self.sources) else []
        return (*needed, *(NAMED if any(_of_captions(name) for name in self.sources) else ()))

    @property
    def draws(self) -> bool:
        """Whether `choose` uses its key."""
        return bool(self.dropout) or self.sources != ("caption",)

    def chosen(
        self, captions: Sequence[str | None], columns: Sequence[Mapping[str, Any]], keys: Sequence[int]
    ) -> list[str]:
        """`choose` for each row."""
        if not self.draws:
            return [caption or "" for caption in captions]
        return [self.choose(*each) for each in zip(captions, columns, keys, strict=True)]

    def candidates(self, caption: str | None, columns: Mapping[str, Any]) -> list[str]:
        """All captions of a row, of which `choose` takes one; "" is none of them. `columns`: its values of `columns`."""
        return [text for name in self.sources for text in _texts(name, caption, columns)]

    def choose(self, caption: str | None, columns: Mapping[str, Any], key: int) -> str:
        """The caption of a row; each that it has is equally likely. `columns`: its values of `columns`. `key`: of the row in its epoch."""
        if self.dropout and float(uniform(key_of(key, "caption dropout"), 1)[0]) < self.dropout:
            return ""
        if self.sources == ("caption",):
            return caption or ""
        found = self.candidates(caption, columns)
        return found[whole(key_of(key, "caption"), len(found))] if found else ""


def _is_source(name: str) -> bool:
    return name == "caption" or _of_captions(name) or name.startswith(METADATA)


def _of_captions(name: str) -> bool:
    return name == "captions" or name.startswith(CAPTIONS)


def _texts(name: str, caption: str | None, columns: Mapping[str, Any]) -> list[str]:
    if name == "captions":
        return list(dict.fromkeys(columns["captions"]))  # a text may have several names
    if name.startswith(CAPTIONS):
        wanted = name[len(CAPTIONS) :]
        return [text for text, own in zip(*(columns[each] for each in NAMED), strict=True) if own == wanted]
    value: Any = caption if name == "caption" else columns.get("metadata")
    for part in name.split(".")[1:]:
        value = value.get(part) if isinstance(value, dict) else None
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text]
