"""Video VAEs with explicit causal state. Imports nothing of the pipeline, of Ray or of storage.

Public names: `load`, `from_state_dict`, `identify`, `names`, `spec` and the types of `model.interface`.
Importing this package loads no torch; `load`, `from_state_dict` and `identify` do.

- `interface`: `LatentSpec` and the `VideoVAE` protocol
- `registry`, `family`: names of networks, and plain facts about them
- `identity`: what decides the latents of a network
- `checkpoint`, `weights`: from a URI to checked tensors; sets of weights, those that ship with Lathe too
- `vae`, `inputs`, `state`, `posterior`: what all network classes share; input checks; causal state; Gaussian
- `arithmetic`, `out_of_memory`: switches of torch that may not change a latent; whether an error means that memory ran out
- `losslessness`: promise 1 measured on a network
- `colour`, `sheets`: uint8 planes to RGB; pictures of originals above reconstructions
- `convolution`, `winograd`: convolutions prepared once for speed
- `leanvae`, `wfvae`, `wfvae2`, `ivvae`, `diffusers_vae`: the networks
- `kernels`, `evaluation`, `training`: GPU kernels; quality; training
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.identity import Identity
from model.interface import LatentSpec, VideoVAE
from model.registry import PRESETS, complete, embedded, family_of, names, resolve, spec

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
) -> Any:
    """A network ready to encode and decode.

    Args:
        name: one of `names()`, or a family name together with `config` (or a checkpoint that carries its configuration).
        checkpoint: local path, `hf://owner/repo/file[@revision]`, or another URI scheme that a fetcher is registered for. A preset whose
            weights come with this package needs none.
        config: published configuration keys; overrides what the checkpoint or the preset says.
        device: where it runs.
        dtype: arithmetic of the large products (`float32` unless told; also bfloat16, float16, float64). Latents are never
            computed in less than float32 outside of them, and come out as float32 (float64).
        untrained: a seed for reproducible random weights instead of a checkpoint; the latents mean nothing.

    Raises:
        ValueError: unknown name or scheme, neither or both of checkpoint and untrained, weights that are not this network's.
        FileNotFoundError: no such checkpoint.
        RuntimeError: the hub refused or could not be reached.
    """
    found = _found(name, checkpoint, config, untrained)
    return _build(found.name, found.config, found.weights, device, dtype, **found.provenance)


def identify(
    name: str, checkpoint: str | None = None, config: Mapping[str, Any] | None = None, *, untrained: int | None = None
) -> Identity:
    """The identity of the network that `load` would give with these arguments on a CPU, without building it.

    Reads every tensor once and checks what `load` checks: keys, shapes, finite values, configuration. Loads torch, and diffusers for its
    networks.

    Raises:
        As `load` does.
    """
    found = _found(name, checkpoint, config, untrained)
    checked, sha256 = _checked(found.name, found.config, found.weights)
    numerics = importlib.import_module(family_of(found.name).module).NUMERICS
    return Identity(checked.spec, checked.config, sha256, numerics, **found.provenance)


def from_state_dict(
    name: str,
    config: Mapping[str, Any] | None,
    state_dict: Mapping[str, torch.Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
) -> Any:
    """A network from tensors in memory, `config` and keys in their published names.

    Raises:
        ValueError: missing, extra or misshapen keys (the first ten are listed), non-finite weights, incomplete configuration.
    """
    return _build(resolve(name), complete(name, config), state_dict, device, dtype)


@dataclass(frozen=True, slots=True)
class _Found:
    """Arguments of `load`, resolved and read: weights not yet compared with the network."""

    name: str
    config: dict[str, Any]
    weights: Mapping[str, torch.Tensor]
    provenance: dict[str, Any]  # checkpoint or seed


def _found(name: str, checkpoint: str | None, config: Mapping[str, Any] | None, untrained: int | None) -> _Found:
    name, family = resolve(name), family_of(name)
    if checkpoint is None and untrained is None and config is None:
        checkpoint = embedded(name)
    if (checkpoint is None) == (untrained is None):
        raise ValueError(_what_to_give(name, both=checkpoint is not None))
    network = importlib.import_module(family.module)
    if checkpoint is None:
        full = complete(name, config)
        family.describe(name, full)  # an impossible configuration is an error before any weights are drawn
        return _Found(name, full, network.random_weights(full, untrained), {"seed": untrained})

    from model import checkpoint as checkpoints

    found = checkpoints.read(checkpoint, want_config=config is None and name not in PRESETS)
    if config is None and name in PRESETS and found.config is not None:
        checkpoints.check_same_config(name, PRESETS[name].config, found.config, checkpoint)
    if config is None and found.config is None and name not in PRESETS:
        raise ValueError(
            f"{name} needs a configuration, and none came with {checkpoint} (no config.json beside it, none inside): give config=, or "
            f"the name of a preset: {', '.join(own for own, preset in PRESETS.items() if preset.family == name)}"
        )
    return _Found(name, complete(name, found.config, config), found.weights, {"checkpoint": found.info})


def _checked(
    name: str, config: dict[str, Any], weights: Mapping[str, torch.Tensor]
) -> tuple[CheckedWeights, WeightsSha256]:
    """Weights that are this network's, and their hashes."""
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
    **provenance: Any,
) -> Any:
    import torch

    from model.weights import as_dtype

    where, kind = torch.device(device), as_dtype(dtype)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{name}: device {device} was asked for, but torch sees no CUDA device here; use cpu")
    checked, sha256 = _checked(name, config, weights)
    return importlib.import_module(family_of(name).module).build(checked, sha256, where, kind, **provenance)


def _what_to_give(name: str, *, both: bool) -> str:
    if both:
        return f"{name}: got both a checkpoint and untrained; give one of them"
    where = ""
    if name in PRESETS:
        preset = PRESETS[name]
        where = (
            f"its published weights ({preset.licence}) are {preset.published}; "
            if preset.published
            else f"none that can be fetched are published ({preset.note or preset.source}); "
        )
    return f"{name} needs weights: {where}give checkpoint=PATH_OR_URI, or untrained=SEED for a trial whose latents mean nothing"
