"""What a family of networks declares about itself: plain facts, no torch.

Enters: the `facts` file of each family. Leaves: `Family` and `Preset`, which the registry lists and `load` follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from model.interface import LatentSpec


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. `keys` are the configuration it reads; everything else in a published file (training, tiling) is ignored.

    `keys=None` keeps every key: the configuration belongs to another library, which judges it itself.
    """

    name: str
    module: str  # holds `build`, `random_weights` and `NUMERICS`
    keys: tuple[str, ...] | None
    describe: Callable[[str, Mapping[str, Any]], LatentSpec]  # raises ValueError for impossible configurations
    defaults: Mapping[str, Any] = field(default_factory=dict)  # keys a published file may leave out


@dataclass(frozen=True, slots=True)
class Preset:
    """One published network."""

    name: str
    family: str
    config: Mapping[str, Any]
    published: str | None  # URI that `load` takes as checkpoint; None: its authors published no weights
    licence: str
    source: str  # where its authors describe it
    aliases: tuple[str, ...] = ()
    note: str = ""  # what a user should know before choosing it
