"""Values as a trainer wants them: normalised or raw, in its type. All arithmetic is in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pipeline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_name(tensor: Tensor) -> str:
    """`float32` of `torch.float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def converted(latent_CTHW: Tensor, dtype: str | None, spec: dict[str, Any] | None, row_id: str) -> Tensor:
    """The latent as `dtype` (None: as stored) in memory of its own; with `spec` normalised by its constants.

    `(z - mean) / std`, or `(z - shift) * scale`, as docs/formats.md has it.

    Raises:
        InputError: a value that is not finite, or is not in `dtype`.
    """
    kind = latent_CTHW.dtype if dtype is None else DTYPES[dtype]
    if spec is None and kind == latent_CTHW.dtype:
        return latent_CTHW.clone(memory_format=torch.contiguous_format)
    values = latent_CTHW.to(torch.float32)
    if spec is not None:
        values = _normalised(values, spec)
    result = values.to(kind).contiguous()
    if not bool(torch.isfinite(result).all()):
        raise InputError(
            f"latent {row_id} has values that are not finite as {dtype_name(result)}; leave the row out with --where"
        )
    return result


def _normalised(values_CTHW: Tensor, spec: dict[str, Any]) -> Tensor:
    if spec.get("mean") is not None:
        return (values_CTHW - _per_channel(spec["mean"])) / _per_channel(spec["std"])
    shift = spec.get("shift")
    values = values_CTHW if shift is None else values_CTHW - _per_channel(shift)
    return values * _per_channel(spec["scale"])


def _per_channel(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).reshape(-1, 1, 1, 1)
