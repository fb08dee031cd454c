"""Records that a family of networks declares about itself in its `facts` module; the registry and `load` read them. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from model.interface import LatentSpec


@dataclass(frozen=True, slots=True)
class LatentPart:
    """Published tensors and configuration keys that decide a latent; the others affect the decoder only, or are unused here.

    `mean`, `logvar` and the keys of `shared` are prefixes of tensor names; `shared` is looked up first, then `logvar`, then `mean`.
    """

    mean: tuple[str, ...]  # tensors that reach the posterior mean
    logvar: tuple[str, ...] = ()  # tensors that reach the log-variance and not the mean
    # Tensors that hold the last layer of both -> number of rows (first axis) that belong to the mean; the log-variance's follow.
    shared: Mapping[str, int] = field(default_factory=dict)
    other_keys: frozenset[str] = frozenset()  # configuration keys that do not change a latent; all other keys do


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture. `keys`: configuration keys it reads; the other keys of a published file (training, tiling) are ignored.

    `keys=None` keeps every key: another library owns the configuration and validates it.
    """

    name: str
    module: str  # defines `check`, `build`, `random_weights` and `NUMERICS`
    keys: tuple[str, ...] | None
    describe: Callable[[str, Mapping[str, Any]], LatentSpec]  # raises ValueError for impossible configurations
    # Of a complete configuration; `tests/model/test_identity.py` compares it with the network.
    latent_part: Callable[[Mapping[str, Any]], LatentPart]
    defaults: Mapping[str, Any] = field(default_factory=dict)  # keys that a published file may omit
    floats: tuple[str, ...] = ()  # keys that hold lists of floats, in which 1 and 1.0 are the same configuration
    compiles: bool = True  # whether its networks can run through torch.compile


@dataclass(frozen=True, slots=True)
class Preset:
    """One published network."""

    name: str
    family: str
    config: Mapping[str, Any]
    published: str | None  # URI that `load` accepts as checkpoint; None: the authors published no weights
    licence: str
    source: str  # URL of the authors' description
    aliases: tuple[str, ...] = ()
    note: str = ""  # what a user should know before choosing it
