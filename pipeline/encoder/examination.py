"""`lathe check`: measures whether the user's network, weights and machine give lossless chunks; returns a JSON-ready verdict."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.config import parse_size
from pipeline.encoder.compiling import check_compiled, missing_compiler, prepare_compiler, why_never_compiled
from pipeline.encoder.network import cuda_available, known_spec, load_torch, load_vae, resolve_device
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from model.losslessness import Finding
    from pipeline.config import ModelConfig


def check_network(
    config: ModelConfig, size: str = "64x64", *, compiled: bool = False, threads: int | None = None
) -> dict[str, Any]:
    """Encodes and decodes a synthetic video in many ways and compares the results; see `model.losslessness`.

    Args:
        config: the network, with its device and compute dtype.
        size: of the frames, HxW.
        compiled: whether its steps run through `torch.compile`. Each is compiled first: minutes for a large network.
        threads: of arithmetic [default: torch's choice]; they change sums, as in a build. Restored afterwards.

    Raises:
        ConfigError: a size the network cannot take, CUDA requested without a CUDA device, `compiled` without a compiler or for a network
            that is never compiled.
        CheckpointError: no weights, unsafe weights, weights of another network.
        BuildError: `torch.compile` failed.
    """
    try:
        height, width = parse_size(size)
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from None
    cuda = config.device.startswith("cuda") or (config.device == "auto" and cuda_available())
    device, dtype = resolve_device(config.device, config.compute_dtype, cuda=cuda)
    if compiled:
        _prepare_compiler(config, device, threads)
    torch = load_torch()
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        vae = load_vae(config, device, dtype, compiled=compiled)
        findings = _findings(vae, height, width)
    finally:
        torch.set_num_threads(before)
    return {
        "network": vae.spec.network,
        "weights_sha256": vae.weights_sha256,
        "untrained": vae.untrained,
        "device": device,
        "compute_dtype": dtype,
        "compiled": compiled,
        "claim": {"encode": vae.spec.chunking, "decode": vae.decode_chunking},
        "size": size,
        "ok": all(finding.ok for finding in findings),
        "findings": [{**asdict(finding), "ok": finding.ok} for finding in findings],
    }


def _findings(vae: Any, height: int, width: int) -> list[Finding]:
    """Raises ConfigError for a size the network cannot take, BuildError if `torch.compile` failed."""
    stride = vae.spec.space_stride
    if height % stride or width % stride:
        raise ConfigError(
            f"--size: {vae.spec.network} takes sides that are multiples of {stride}, got {height}x{width}"
        )
    torch = load_torch()
    from model.losslessness import examine

    try:
        with torch.inference_mode():
            return list(examine(vae, height=height, width=width))
    except RuntimeError as error:
        check_compiled(error, "check the eager network with --compile off")
        raise


def _prepare_compiler(config: ModelConfig, device: str, threads: int | None) -> None:
    known_spec(config)  # reports an unknown network
    if (why := why_never_compiled(config.name) or missing_compiler(device)) is not None:
        raise ConfigError(f"engine.compile: got on, and {why}; --compile off checks the eager network")
    prepare_compiler(device, threads)
