"""Whether a set of tensors is what a network needs, and which set it is.

Enters: tensors by published key, from wherever they came. Leaves: the same tensors after strict checks, and a hash of their values
that does not depend on the container (a .ckpt and its .safetensors copy hash alike).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

SHOWN = 10
DTYPES = ("float32", "bfloat16", "float16", "float64")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A torch dtype from its name; None is float32. Raises ValueError for anything the networks do not compute in."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    return getattr(torch, name)


def _listed(label: str, items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {label}: {', '.join(items[:SHOWN])}{more}"


def check_keys(name: str, expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError unless keys and shapes agree one to one; lists the first ten of each kind of trouble."""
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
            f"the weights are not those of {name}: {'; '.join(problems)}. Check the network's name and its configuration"
        )


def check_finite(name: str, weights: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where a tensor is not floating point or holds NaN or infinity."""
    wrong = [f"{key} ({tensor.dtype})" for key, tensor in weights.items() if not tensor.is_floating_point()]
    if wrong:
        raise ValueError(f"{name}: weights must be floating point; {_listed('are not', wrong)}")
    broken = [key for key, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ValueError(
            f"{name}: {_listed('tensors with NaN or infinity', broken)}. The file is damaged or its training diverged; get another one"
        )


def fill(network: nn.Module, name: str, weights: Mapping[str, torch.Tensor]) -> str:
    """Puts weights into an empty network of the same keys and shapes, as their own copies -> their hash.

    Raises:
        ValueError: keys or shapes that are not the network's, or non-finite weights.
    """
    check_keys(name, network.state_dict(), weights)
    check_finite(name, weights)
    network.load_state_dict({key: value.detach().cpu().clone() for key, value in weights.items()}, assign=True)
    network.requires_grad_(False).eval()
    return hash_weights(weights)


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over keys in order, with dtype, shape and little-endian bytes of each tensor."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        tensor = weights[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
