"""Video VAEs with explicit causal state. Imports nothing of `pipeline/`, of Ray or of object stores.

Public names: `load`, `from_state_dict`, `identify`, `names`, `spec` and the types of `model.interface`.
Importing this package loads no torch; `load`, `from_state_dict` and `identify` do.

- `interface`: `LatentSpec` and the `VideoVAE` protocol
- `registry`, `family`, `wan_statistics`: names of networks and plain facts about them
- `definition`: networks as published, with gradients; `network` (their base), `reconstruction` (what they return), `layers` (what their
  layers share), `history` (what causal layers keep between steps)
- `identity`: what decides a network's latents
- `checkpoint`: reads a checkpoint URI into tensors; `weights`: checks and hashes them, holds the weights that ship with Lathe
- `stepped_vae`: runs definitions step by step, eagerly or compiled
- `vae`, `inputs`, `state`, `posterior`: base class of all networks, input checks, causal state, diagonal Gaussian
- `arithmetic`: torch settings that could change a latent; `out_of_memory`: recognises out-of-memory errors
- `losslessness`: measures whether chunked and batched runs give the same latents
- `colour`, `sheets`: YUV planes to RGB, comparison pictures
- `leanvae`, `wfvae`, `wfvae2`, `ivvae`, `diffusers_vae`: the networks
- `kernels`, `metrics`, `training`: GPU kernels, quality metrics, training
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.identity import Identity
from model.interface import LatentSpec, VideoVAE
from model.registry import PRESETS, complete, embedded, family_of, is_whole, names, or_presets, resolve, spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from model.weights import CheckedWeights, WeightsSha256

__all__ = ["Identity", "LatentSpec", "VideoVAE", "from_state_dict", "identify", "load", "names", "spec"]


def load(
    name: str,
    checkpoint: str | None = None,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    untrained: int | None = None,
    compile: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """Loads a network, ready to encode and decode.

    Args:
        name: one of `names()`, or a family name together with `config` (or a checkpoint that carries its configuration).
        checkpoint: local path, `hf://owner/repo/file[@revision]`, or another URI scheme with a registered fetcher. May be left out for
            presets whose weights ship with this package.
        config: published configuration keys; they override those of the checkpoint (in the file or the `config.json` beside it), which
            override those of the preset.
        device: device to run on.
        dtype: dtype of the large products (default float32; also bfloat16, float16, float64). Everything else is computed in at
            least float32; latents are float32 (float64).
        untrained: seed for random weights instead of a checkpoint, for trials; the latents mean nothing.
        compile: runs steps through torch.compile: faster, after up to a minute for each frame size; other bits of the same latents.
        defaults: published configuration keys for what neither `config` nor the checkpoint gives; they override those of the preset.

    Raises:
        ValueError: unknown name or scheme, neither or both of checkpoint and untrained, weights of another network; `compile` for a
            network of diffusers.
        OSError: the checkpoint cannot be read; FileNotFoundError: it does not exist.
        ConnectionError: the Hugging Face hub refused access or could not be reached.
        RuntimeError: `compile` without a C++ compiler.
    """
    resolved = _resolve_arguments(name, checkpoint, config, untrained, defaults)
    return _build(resolved.name, resolved.config, resolved.weights, device, dtype, compile, **resolved.provenance)


def identify(
    name: str,
    checkpoint: str | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    untrained: int | None = None,
    compile: bool = False,
) -> Identity:
    """Identity of the network that `load` would return for these arguments on a CPU, without building it.

    Reads every tensor once and runs the checks of `load` (keys, shapes, finite values, configuration). Imports torch, and diffusers for
    its networks.

    Raises:
        The errors of `load`.
    """
    resolved = _resolve_arguments(name, checkpoint, config, untrained)
    checked, sha256 = _check_weights(resolved.name, resolved.config, resolved.weights)
    numerics = importlib.import_module(family_of(resolved.name).module).NUMERICS
    _check_compiles(resolved.name, compile)
    return Identity(checked.spec, checked.config, sha256, numerics, **resolved.provenance, compiled=compile)


def from_state_dict(
    name: str,
    config: Mapping[str, Any] | None,
    state_dict: Mapping[str, torch.Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    compile: bool = False,
) -> Any:
    """Network from tensors in memory; `config` and the keys of `state_dict` have their published names. `compile`: see `load`.

    Raises:
        ValueError: missing, extra or misshapen keys (the first ten of each are listed), non-finite weights, incomplete configuration;
            `compile` for a network of diffusers.
        RuntimeError: `compile` without a C++ compiler.
    """
    return _build(resolve(name), complete(name, config), state_dict, device, dtype, compile)


@dataclass(frozen=True, slots=True)
class _ResolvedArguments:
    """Arguments of `load` after names are resolved and weights are read; the weights are not yet checked against the network."""

    name: str
    config: dict[str, Any]
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    provenance: dict[str, Any]  # {"checkpoint": CheckpointInfo} or {"seed": int}


def _resolve_arguments(
    name: str,
    checkpoint: str | None,
    config: Mapping[str, Any] | None,
    untrained: int | None,
    defaults: Mapping[str, Any] | None = None,
) -> _ResolvedArguments:
    name, family = resolve(name), family_of(name)
    if checkpoint is None and untrained is None and config is None:
        checkpoint = embedded(name)
    if (checkpoint is None) == (untrained is None):
        raise ValueError(_weights_required(name, both=checkpoint is not None))
    network = importlib.import_module(family.module)
    if checkpoint is None:
        full = complete(name, defaults, config)
        family.describe(name, full)  # reports an impossible configuration before weights are drawn
        return _ResolvedArguments(name, full, network.random_weights(full, untrained), {"seed": untrained})

    from model import checkpoint as checkpoints

    # That of a preset's checkpoint only has to agree; a whole one that is given leaves nothing to the checkpoint's.
    settled = name in PRESETS if config is None else defaults is None and is_whole(name, config)
    loaded = checkpoints.read(checkpoint, want_config=not settled)
    if config is None and name in PRESETS and loaded.config is not None:
        checkpoints.check_same_config(name, PRESETS[name].config, loaded.config, checkpoint)
    if config is None and loaded.config is None and name not in PRESETS:
        raise ValueError(
            f"{name} needs a configuration, but {checkpoint} contains none and has no config.json beside it; give config="
            f"{or_presets(name)}"
        )
    full = complete(name, defaults, loaded.config, config)
    return _ResolvedArguments(name, full, loaded.weights, {"checkpoint": loaded.info})


def _check_weights(
    name: str, config: dict[str, Any], weights: Mapping[str, torch.Tensor]
) -> tuple[CheckedWeights, WeightsSha256]:
    """Checks weights against the network of this name and hashes them."""
    from model.weights import hash_weights

    family = family_of(name)
    checked = importlib.import_module(family.module).check(family.describe(name, config), config, weights)
    return checked, hash_weights(checked.weights, family.latent_part(checked.config))


def _build(
    name: str,
    config: dict[str, Any],
    weights: Mapping[str, torch.Tensor],
    device: torch.device | str,
    dtype: torch.dtype | str | None,
    compile: bool,
    **provenance: Any,
) -> Any:
    import torch

    from model.weights import as_dtype

    target, precision = torch.device(device), as_dtype(dtype)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name}: device {device} was requested, but torch finds no CUDA device; use cpu")
    _check_compiles(name, compile)
    checked, sha256 = _check_weights(name, config, weights)
    network = importlib.import_module(family_of(name).module)
    return network.build(checked, sha256, target, precision, compiled=compile, **provenance)


def _check_compiles(name: str, compile: bool) -> None:
    """Raises ValueError if this network was asked to be compiled and cannot be."""
    if compile and not family_of(name).compiles:
        raise ValueError(f"{name}: networks of {family_of(name).name} cannot be compiled; load it with compile=False")


def _weights_required(name: str, *, both: bool) -> str:
    """Error text for a call that gave no weights, or two sources of weights."""
    if both:
        return f"{name}: got both checkpoint and untrained; give one of them"
    published = ""
    if name in PRESETS:
        preset = PRESETS[name]
        published = (
            f"its published weights ({preset.licence}) are {preset.published}; "
            if preset.published
            else f"its weights cannot be downloaded ({preset.note or preset.source}); "
        )
    return f"{name} needs weights: {published}give checkpoint=PATH_OR_URI, or untrained=SEED for a trial whose latents mean nothing"
