"""Which network a job means, and where it runs: names to specifications, `auto` made definite, weights loaded.

Enters: the model section of a job. Leaves: a `LatentSpec` without torch where the name suffices, else the network itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import model
from model.registry import FAMILIES
from pipeline.errors import AccessError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from model.interface import LatentSpec
    from pipeline.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Network:
    """Which network it is. `identity` goes into the fingerprint, `provenance` (where the file came from) only into metadata."""

    spec: LatentSpec
    identity: dict[str, Any]
    provenance: dict[str, Any]


def known_spec(config: ModelConfig) -> LatentSpec | None:
    """The latent specification as far as name and configuration tell it (loads no torch); None if only the checkpoint can.

    Raises:
        ConfigError: unknown network; names those that are known.
    """
    if config.name in FAMILIES and config.config is None:
        return None
    try:
        return model.spec(config.name, config.config)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def resolve_device(device: str, compute_dtype: str, *, cuda: bool) -> tuple[str, str]:
    """`auto` made definite, given whether the encoders will have CUDA: (device, compute dtype)."""
    device = ("cuda" if cuda else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if compute_dtype == "auto" else compute_dtype
    return device, dtype


def cuda_available() -> bool:
    """Whether this process sees a CUDA device."""
    return bool(load_torch().cuda.is_available())


def load_torch() -> Any:
    """Torch, told before it loads that idle arithmetic threads sleep instead of spinning.

    Decoders share the cores with a CPU encoder; spinning threads made an encode step up to five times slower beside one busy process.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    return torch


def load_vae(config: ModelConfig, device: str, compute_dtype: str) -> Any:
    """The network on its device.

    Raises:
        ConfigError: CUDA asked for where there is none.
        CheckpointError: no weights, unsafe weights, weights of another network.
        AccessError: a hub that refused or could not be reached.
    """
    torch = load_torch()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"model.device: {device} was asked for, but this process sees no CUDA device; use cpu or auto"
        )
    try:
        return model.load(
            config.name,
            config.checkpoint,
            config=config.config,
            device=device,
            dtype=getattr(torch, compute_dtype),
            untrained=config.untrained,
        )
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(f"model: {error}") from error
    except RuntimeError as error:
        if not (config.checkpoint or "").startswith("hf://"):
            raise
        raise AccessError(f"model.checkpoint: {error}") from error


def told_of(vae: Any) -> dict[str, Any]:
    """Which network with which weights runs where, JSON-ready, for whoever reports on it."""
    return {
        "network": vae.spec.network,
        "weights_sha256": vae.weights_sha256,
        "untrained": vae.untrained,
        "checkpoint": vae.checkpoint.to_dict() if vae.checkpoint else None,
        "device": str(vae.device),
        "compute_dtype": str(vae.dtype).removeprefix("torch."),
    }
