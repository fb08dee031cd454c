"""`lathe check`: measures whether the user's network, weights and machine give lossless chunks; returns a JSON-ready verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.config import parse_size
from pipeline.encoder.network import cuda_available, load_torch, load_vae, resolve_device
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import ModelConfig


def check_network(config: ModelConfig, size: str = "64x64") -> dict[str, Any]:
    """Encodes and decodes a synthetic video in many ways and compares the results; see `model.losslessness`.

    Raises:
        ConfigError: a size the network cannot take, or CUDA requested without a CUDA device.
        CheckpointError: no weights, unsafe weights, weights of another network.
    """
    try:
        height, width = parse_size(size)
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from None
    cuda = config.device.startswith("cuda") or (config.device == "auto" and cuda_available())
    device, dtype = resolve_device(config.device, config.compute_dtype, cuda=cuda)
    vae = load_vae(config, device, dtype)
    stride = vae.spec.space_stride
    if height % stride or width % stride:
        raise ConfigError(f"--size: {vae.spec.network} takes sides that are multiples of {stride}, got {size}")
    from model.losslessness import examine

    with load_torch().inference_mode():
        findings = list(examine(vae, height=height, width=width))
    return {
        "network": vae.spec.network,
        "weights_sha256": vae.weights_sha256,
        "untrained": vae.untrained,
        "device": device,
        "compute_dtype": dtype,
        "claim": {"encode": vae.spec.chunking, "decode": vae.decode_chunking},
        "size": size,
        "ok": all(finding.ok for finding in findings),
        "findings": [{**asdict(finding), "ok": finding.ok} for finding in findings],
    }
