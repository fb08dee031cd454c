"""Checks that tensors fit a network, and hashes them; subfolders hold the weights that ship with Lathe.

The hashes (of all values, and of those that reach the latent) do not depend on the container: a .ckpt and its .safetensors copy hash alike.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from model.family import LatentPart
    from model.interface import LatentSpec

SHOWN = 10
DTYPES = ("float32", "bfloat16", "float16", "float64")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Torch dtype of a name; None is float32. Raises ValueError unless it is in `DTYPES`."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    return getattr(torch, name)


def _listed(label: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {label}: {', '.join(items[:SHOWN])}{more}"


def check_keys(name: str, expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless keys and shapes agree; lists the first ten missing, extra and misshapen keys."""
    missing = [key for key in expected if key not in weights]
    extra = [key for key in weights if key not in expected]
    misshapen = [
        f"{key} is {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in weights and weights[key].shape != expected[key].shape
    ]
    problems = [
        _listed(label, items)
        for label, items in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
        if items
    ]
    if problems:
        raise ValueError(
            f"the weights do not fit {name}: {'; '.join(problems)}. Check the network's name and its configuration"
        )


def check_finite(name: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError if a tensor's type is not in `DTYPES`, or if it holds NaN or infinity."""
    known = [getattr(torch, dtype) for dtype in DTYPES]
    wrong = [f"{key} ({tensor.dtype})" for key, tensor in weights.items() if tensor.dtype not in known]
    if wrong:
        raise ValueError(
            f"{name}: weights must be floating point ({', '.join(DTYPES)}); got {_listed('others', wrong)}. Save them in one of these types"
        )
    broken = [key for key, tensor in weights.items() if not _is_finite(tensor)]
    if broken:
        raise ValueError(
            f"{name}: {_listed('tensors with NaN or infinity', broken)}. The file is damaged or its training diverged; get another one"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    # min and max propagate NaN; eleven times as fast as isfinite on every element, which took a third of the time to read a checkpoint
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


@dataclass(frozen=True, slots=True)
class WeightsSha256:
    """Hex SHA-256 of a set of weights: all tensors, those that reach the posterior mean, and those that reach mean or log-variance."""

    all: str
    mean: str
    moments: str


@dataclass(frozen=True, slots=True)
class CheckedWeights:
    """Weights that passed all checks against their network.

    `empty`: the network on the meta device, names and shapes only, which the family's `build` fills. `config` and `spec` are complete.
    """

    spec: LatentSpec
    config: dict[str, Any]
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    empty: Any = field(repr=False)


def check_weights(
    empty: nn.Module, spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]
) -> CheckedWeights:
    """Compares weights with the empty network of the same configuration.

    Raises:
        ValueError: keys or shapes that differ from the network's, or non-finite weights.
    """
    check_keys(spec.network, empty.state_dict(), weights)
    check_finite(spec.network, weights)
    return CheckedWeights(spec, config, weights, empty)


def fill(checked: CheckedWeights) -> Any:
    """Fills the checked network with copies of the weights, on the CPU in their own dtypes, for inference."""
    network = checked.empty
    network.load_state_dict({key: value.detach().cpu().clone() for key, value in checked.weights.items()}, assign=True)
    return network.requires_grad_(False).eval()


def hash_weights(weights: Mapping[str, torch.Tensor], part: LatentPart) -> WeightsSha256:
    """Hashes the values independently of the container: dtype, shape and little-endian bytes of each tensor, in the order of keys."""
    everything, mean, moments = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key].detach().cpu().contiguous()
        everything.update(_header(key, tensor))
        everything.update(_bytes(tensor))
        of_mean, of_logvar = _latent_rows(key, tensor, part)
        for role, rows, digests in (("mean", of_mean, (mean, moments)), ("logvar", of_logvar, (moments,))):
            if rows is None:
                continue
            # one hash of the values serves both digests
            values = hashlib.sha256(_bytes(rows)).digest()
            for digest in digests:
                digest.update(_header(f"{role}\0{key}", rows) + values)
    return WeightsSha256(everything.hexdigest(), mean.hexdigest(), moments.hexdigest())


def _latent_rows(key: str, tensor: torch.Tensor, part: LatentPart) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Rows of a tensor that reach the mean, and rows that reach the log-variance only; None if there are none."""
    for prefix, count in part.shared.items():
        if key.startswith(prefix):
            return tensor[:count], tensor[count:]
    if key.startswith(part.logvar):
        return None, tensor
    return (tensor if key.startswith(part.mean) else None), None


def _header(key: str, tensor: torch.Tensor) -> bytes:
    return f"{key}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
