"""Builds diffusers' class from a configuration and fills it with checked weights; random weights for trials.

Options that blend overlapping pieces are switched off. diffusers is imported here, on first use.
"""

from __future__ import annotations

import inspect
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from model.weights import check_finite, check_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Each splits clips or frames into overlapping pieces and blends the results, which gives latents that are not the network's.
BLENDING = ("use_tiling", "use_framewise_encoding", "use_framewise_decoding")


def library() -> Any:
    """The diffusers library. Raises ValueError if it is not installed."""
    try:
        import diffusers
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ValueError("VAEs of diffusers need the library: pip install 'lathe[diffusers]'") from error
    return diffusers


def published_class(config: Mapping[str, Any]) -> Any:
    """Class that a configuration names. Raises ValueError if the installed diffusers lacks it."""
    diffusers, name = library(), config["_class_name"]
    if not hasattr(diffusers, name):
        raise ValueError(f"the installed diffusers {diffusers.__version__} has no {name}; install a newer version")
    return getattr(diffusers, name)


def empty_module(name: str, config: Mapping[str, Any]) -> Any:
    """Network `name` on the meta device, without memory for its parameters; constant tables have memory.

    Raises:
        ValueError: the class cannot be built from this configuration.
    """
    kind = published_class(config)
    known = set(inspect.signature(kind.__init__).parameters)
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"), _RealTables():
            module = kind(**{key: value for key, value in options.items() if key in known})
    except (TypeError, ValueError, KeyError, IndexError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{name}: {kind.__name__} cannot be built from this configuration: {error}") from error
    # `module.config` also has what the class derives and saves, such as AutoencoderTiny's block_out_channels
    if unknown := sorted(set(options) - known - set(module.config)):
        warnings.warn(
            f"{name}: {kind.__name__} of diffusers {library().__version__} ignores unknown configuration keys: "
            f"{', '.join(unknown)}; a newer diffusers may know them",
            stacklevel=2,
        )
    for switch in BLENDING:
        if hasattr(module, switch):
            setattr(module, switch, False)
    # Parameters keep requiring gradients, as after `from_pretrained`: otherwise torch takes another path for some products, and the last
    # bits differ from the library's.
    return module.eval()


def check_weights(name: str, module: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Compares weights with an empty module.

    Raises:
        ValueError: keys or shapes of another configuration, non-finite weights, or a module with tensors that are in no checkpoint.
    """
    expected = module.state_dict()
    check_keys(name, expected, weights)
    # counters of batch norms, such as FLUX.2's, are whole numbers
    check_finite(name, {key: tensor for key, tensor in weights.items() if expected[key].is_floating_point()})
    everything = (*module.named_parameters(), *module.named_buffers())
    unfilled = [key for key, tensor in everything if tensor.is_meta and key not in expected]
    if unfilled:
        raise ValueError(
            f"{name}: {type(module).__name__} of diffusers {library().__version__} has tensors that are in no checkpoint "
            f"({', '.join(unfilled[:10])}) and that this adapter does not know; use another version of diffusers"
        )


def filled(module: Any, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> Any:
    """Fills `module` in place with copies of checked weights, on `device` in `dtype`, and returns it."""
    module.load_state_dict({key: value.detach().clone() for key, value in weights.items()}, assign=True)
    # ModelMixin.to warns about layers to keep in float32, which none of these classes has
    return torch.nn.Module.to(module, device=device, dtype=dtype)


def full_config(module: Any) -> dict[str, Any]:
    """Every option in force, and the library's version: what the arithmetic depends on besides the weights."""
    options = {key: _plain(value) for key, value in module.config.items() if not key.startswith("_")}
    return {
        "_class_name": type(module).__name__,
        "_diffusers_version": library().__version__,
        **{key: options[key] for key in sorted(options)},
    }


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; each tensor depends only on the seed and its key.

    Scaled so that activations stay of order one. Their latents mean nothing.
    """
    module = empty_module("diffusers", config)
    return {
        key: _random_tensor(key, tuple(meta.shape), seed)
        if meta.is_floating_point()
        else torch.zeros(meta.shape, dtype=meta.dtype)  # counters of batch norms
        for key, meta in module.state_dict().items()
    }


def _random_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    draw = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    noise = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32).reshape(shape).copy())
    kind = key.rpartition(".")[2]
    size = int(np.prod(shape))
    if kind in ("latents_std", "running_var") or (
        kind in ("weight", "gamma") and size == shape[0]
    ):  # deviations, and norms' gains
        return 1 + 0.02 * noise
    if kind == "weight":
        return noise * (size // shape[0]) ** -0.5
    return 0.02 * noise  # biases, means and mixing factors


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


class _RealTables(TorchFunctionMode):
    """Gives memory to index tables of a class built on the meta device: they are not parameters, so no checkpoint fills them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.arange:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
