"""Names of what a row stores beside its scalar columns: the latent, its log-variance, and what `write.store` adds.

- `latent`: posterior mean of the clip; `logvar`: its log-variance, with `write.moments`
- `i2v_cond`: posterior mean of the clip's first frame followed by zeros, shape and type of the latent
- `first_frame`: the clip's first frame as a lossless image file
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection

LATENT, LOGVAR, I2V_COND, FIRST_FRAME = "latent", "logvar", "i2v_cond", "first_frame"
STORED = (LATENT, LOGVAR, I2V_COND, FIRST_FRAME)
"""All names, in the order of a file."""
OPTIONAL = (I2V_COND, FIRST_FRAME)
"""Names that `write.store` takes."""
VERSIONS = {I2V_COND: 1, FIRST_FRAME: 1}
"""How each is made, for the fingerprint: raised whenever a stored value could change."""

TENSOR_COLUMNS = {LATENT: "vae_latent", LOGVAR: "vae_logvar", I2V_COND: "i2v_cond"}
"""Prefix of the Parquet columns `_bytes`, `_shape` and `_dtype` of each tensor. The first frame is one column of its own name."""


def stored_names(*, moments: bool, store: Collection[str]) -> tuple[str, ...]:
    """Names of what the rows of a file store, in file order."""
    return tuple(name for name in STORED if name == LATENT or name in store or (moments and name == LOGVAR))


def names_in(metadata: dict[str, Any]) -> tuple[str, ...]:
    """`stored_names` of a file with this `latentset` metadata."""
    latent = metadata["latent"]
    return stored_names(moments=latent["posterior"] == "moments", store=latent.get("store", ()))


def bytes_column(name: str) -> str:
    """Parquet column of the bytes."""
    return f"{TENSOR_COLUMNS[name]}_bytes" if name in TENSOR_COLUMNS else name
