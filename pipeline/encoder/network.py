"""Which network a job means, and where it runs: names to specifications, `auto` made definite, weights loaded.

Enters: the model section of a job. Leaves: a `LatentSpec` without torch where the name suffices, else the network itself.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import model
from model.registry import FAMILIES
from pipeline.errors import AccessError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.interface import LatentSpec
    from pipeline.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Network:
    """Which network it is.

    `identity`: what can change a latent; goes into the fingerprint. `provenance`: the file the weights came from, and hash and
    configuration of the whole network, which decoding needs; goes into metadata only.
    """

    spec: LatentSpec
    identity: dict[str, Any]
    provenance: dict[str, Any]


def identify(config: ModelConfig, *, moments: bool = False) -> Network:
    """The network of a job, found by reading its checkpoint once; no network is built. Bad checkpoints show before workers start.

    Args:
        config: the model section of the job.
        moments: whether the log-variance is stored too, so that its tensors count.

    Raises:
        CheckpointError: no weights, unsafe weights, weights of another network.
        AccessError: a hub that refused or could not be reached.
    """
    load_torch()
    with _foreign_errors(config):
        found = model.identify(config.name, config.checkpoint, config.config, untrained=config.untrained)
    return network_of(found, moments=moments)


def network_of(found: model.Identity, *, moments: bool) -> Network:
    """The record of a network, of which the log-variance counts only with `moments`."""
    identity = {
        "network": found.spec.network,
        "config": found.latent_config,
        "latent_weights_sha256": found.latent_sha256(moments=moments),
        "untrained": found.seed is not None,
        "numerics": found.numerics,
    }
    origin = found.checkpoint.to_dict() if found.checkpoint else {"untrained_seed": found.seed}
    return Network(found.spec, identity, {**origin, "weights_sha256": found.sha256.all, "config": dict(found.config)})


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
    with _foreign_errors(config):
        return model.load(
            config.name,
            config.checkpoint,
            config=config.config,
            device=device,
            dtype=getattr(torch, compute_dtype),
            untrained=config.untrained,
        )


@contextmanager
def _foreign_errors(config: ModelConfig) -> Iterator[None]:
    """Errors of `model` while weights are read, as ours."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise CheckpointError(f"model: {error}") from error
    except RuntimeError as error:
        if not (config.checkpoint or "").startswith("hf://"):
            raise
        raise AccessError(f"model.checkpoint: {error}") from error


def describe_network(vae: Any) -> dict[str, Any]:
    """Which network with which weights runs where, JSON-ready, for whoever reports on it."""
    return {
        "network": vae.spec.network,
        "weights_sha256": vae.weights_sha256,
        "untrained": vae.untrained,
        "checkpoint": vae.checkpoint.to_dict() if vae.checkpoint else None,
        "device": str(vae.device),
        "compute_dtype": str(vae.dtype).removeprefix("torch."),
    }
