"""Names of what a row stores beside its scalar columns: the latent, its log-variance, and what `write.store` adds.

- `latent`: posterior mean of the clip; `logvar`: its log-variance, with `write.moments`
- `i2v_cond`: posterior mean of the clip's first frame followed by zeros, shape and type of the latent
- `first_frame`: the clip's first frame as a lossless image file
- any other name: a paired video of the sample (`members`), its latent, or at latent resolution a mask
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.records import is_mask

if TYPE_CHECKING:
    from collections.abc import Collection

LATENT, LOGVAR, I2V_COND, FIRST_FRAME = "latent", "logvar", "i2v_cond", "first_frame"
STORED = (LATENT, LOGVAR, I2V_COND, FIRST_FRAME)
"""In the order of a file. Names of paired videos follow, sorted."""
OPTIONAL = (I2V_COND, FIRST_FRAME)
"""Names that `write.store` takes."""
VERSIONS = {I2V_COND: 1, FIRST_FRAME: 1}
"""How each is made, for the fingerprint: raised whenever a stored value could change."""

TENSOR_COLUMNS = {LATENT: "vae_latent", LOGVAR: "vae_logvar", I2V_COND: "i2v_cond"}
"""Prefix of the Parquet columns of tensors, if it is not their name. The first frame is one column of its own name."""


def stored_names(*, moments: bool, store: Collection[str]) -> tuple[str, ...]:
    """Names of what the rows of a file store, in file order."""
    own = [name for name in STORED if name == LATENT or name in store or (moments and name == LOGVAR)]
    return (*own, *sorted(set(store) - set(STORED)))


def names_in(metadata: dict[str, Any]) -> tuple[str, ...]:
    """`stored_names` of the files that were made with one of this `latentset` metadata: also of members that this one is without."""
    latent = metadata["latent"]
    store = (*latent.get("store", ()), *latent.get("without", ()))
    return stored_names(moments=latent["posterior"] == "moments", store=store)


def bytes_column(name: str) -> str:
    """Parquet column of the bytes."""
    return f"{tensor_column(name)}_bytes" if is_tensor(name) else name


def is_tensor(name: str) -> bool:
    """Whether what is stored under this name is a tensor, and not an image file."""
    return name != FIRST_FRAME


def tensor_column(name: str) -> str:
    """Prefix of the Parquet columns `_bytes`, `_shape` and `_dtype` of a tensor."""
    return TENSOR_COLUMNS.get(name, name)


def tensor_shape(name: str, latent: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a row's tensor, where that of its latent is `latent`: masks have one channel."""
    return (1, *latent[1:]) if name not in STORED and is_mask(name) else latent
