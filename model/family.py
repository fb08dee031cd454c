"""What a family of networks declares about itself: plain facts, no torch.

Enters: the `facts` file of each family. Leaves: `Family`, `LatentPart` and `Preset`, which the registry lists and `load` follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from model.interface import LatentSpec


@dataclass(frozen=True, slots=True)
class LatentPart:
    """Which published tensors and configuration keys decide a latent. The others serve the decoder, or nothing that is computed here.

    `mean`, `logvar` and the keys of `shared` are beginnings of tensor names; `shared` is looked up first, then `logvar`, then `mean`.
    """

    mean: tuple[str, ...]  # tensors that reach the posterior mean
    logvar: tuple[str, ...] = ()  # tensors that reach the log-variance and not the mean
    # Tensors that hold the last layer of both -> how many rows (of the first axis) are the mean's; the log-variance's follow.
    shared: Mapping[str, int] = field(default_factory=dict)
    other_keys: frozenset[str] = frozenset()  # configuration keys that change no latent; every other key counts


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. `keys` are the configuration it reads; everything else in a published file (training, tiling) is ignored.

    `keys=None` keeps every key: the configuration belongs to another library, which judges it itself.
    """

    name: str
    module: str  # holds `check`, `build`, `random_weights` and `NUMERICS`
    keys: tuple[str, ...] | None
    describe: Callable[[str, Mapping[str, Any]], LatentSpec]  # raises ValueError for impossible configurations
    latent_part: Callable[
        [Mapping[str, Any]], LatentPart
    ]  # of a complete configuration; `tests/model/test_identity.py` holds it to the network
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
