"""The network of a job: name and configuration to `LatentSpec` (without torch if the name suffices), identity, device, loading."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import model
from model.registry import FAMILIES, lacking
from pipeline.errors import AccessError, CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from model.interface import LatentSpec
    from pipeline.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Network:
    """Identity of a job's network.

    `identity`: everything that can change a latent; part of the fingerprint. `provenance`: origin of the weights, and hash and
    configuration of the whole network, which decoding needs; recorded in metadata only.
    """

    spec: LatentSpec
    identity: dict[str, Any]
    provenance: dict[str, Any]


def identify(config: ModelConfig, *, moments: bool = False) -> Network:
    """Identifies the network of a job by reading its checkpoint once, without building it. Finds bad checkpoints before workers start.

    Args:
        config: the model section of the job.
        moments: whether the log-variance is stored too; its tensors then count.

    Raises:
        CheckpointError: no weights, unsafe weights, weights of another network.
        AccessError: the hub refused access or could not be reached.
    """
    load_torch()
    with _foreign_errors():
        identity = model.identify(config.name, config.checkpoint, config.config, untrained=config.untrained)
    return network_of(identity, moments=moments)


def network_of(network: model.Identity, *, moments: bool) -> Network:
    """`Network` of a model identity; the log-variance counts only with `moments`."""
    identity = {
        "network": network.spec.network,
        "config": network.latent_config,
        "latent_weights_sha256": network.latent_sha256(moments=moments),
        "untrained": network.seed is not None,
        "numerics": network.numerics,
    }
    if network.compiled:  # left out otherwise: fingerprints of data that is older than this option stay as they are
        identity["compiled"] = True
    origin = network.checkpoint.to_dict() if network.checkpoint else {"untrained_seed": network.seed}
    provenance = {**origin, "weights_sha256": network.sha256.all, "config": dict(network.config)}
    return Network(network.spec, identity, provenance)


def known_spec(config: ModelConfig) -> LatentSpec | None:
    """Latent specification from name and configuration (imports no torch); None if only the checkpoint has it.

    Raises:
        ConfigError: unknown network; lists the known ones.
    """
    partial = config.checkpoint is not None and config.name in FAMILIES and lacking(config.name, config.config)
    if partial or (config.name in FAMILIES and config.config is None):
        return None
    try:
        return model.spec(config.name, config.config)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def resolve_device(device: str, compute_dtype: str, *, cuda: bool) -> tuple[str, str]:
    """Resolves `auto`, given whether the encoders will have CUDA: (device, compute dtype)."""
    device = ("cuda" if cuda else "cpu") if device == "auto" else device
    dtype = ("bfloat16" if device.startswith("cuda") else "float32") if compute_dtype == "auto" else compute_dtype
    return device, dtype


def cuda_available() -> bool:
    """Whether this process sees a CUDA device."""
    return bool(load_torch().cuda.is_available())


def load_torch() -> Any:
    """Imports torch with idle OpenMP threads set to sleep instead of spin.

    Decoders share the cores with a CPU encoder: spinning threads made an encode step up to five times slower beside one busy process.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    return torch


def load_vae(
    config: ModelConfig,
    device: str,
    compute_dtype: str,
    *,
    compiled: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """Loads the network on its device. `compiled`: its steps run through `torch.compile`; see `compiling.prepare_compiler`. `defaults`: as
    for `model.load`.

    Raises:
        ConfigError: CUDA requested without a CUDA device.
        CheckpointError: no weights, unsafe weights, weights of another network.
        AccessError: the hub refused access or could not be reached.
    """
    torch = load_torch()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"model.device: {device} was requested, but torch finds no CUDA device; use cpu or auto")
    with _foreign_errors():
        return model.load(
            config.name,
            config.checkpoint,
            config=config.config,
            device=device,
            dtype=getattr(torch, compute_dtype),
            untrained=config.untrained,
            compile=compiled,
            defaults=defaults,
        )


@contextmanager
def _foreign_errors() -> Iterator[None]:
    """Converts errors of `model` while weights are read into Lathe's."""
    try:
        yield
    except ConnectionError as error:
        raise AccessError(f"model.checkpoint: {error}") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"model: {error}") from error


def describe_network(vae: Any) -> dict[str, Any]:
    """Network description for reports, JSON-ready: name, weights, device, dtype."""
    return {
        "network": vae.spec.network,
        "weights_sha256": vae.weights_sha256,
        "untrained": vae.untrained,
        "checkpoint": vae.checkpoint.to_dict() if vae.checkpoint else None,
        "device": str(vae.device),
        "compute_dtype": str(vae.dtype).removeprefix("torch."),
    }
