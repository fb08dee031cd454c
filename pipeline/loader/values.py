"""Values of a batch: samples of the stored Gaussian, the network's constants, the type that training wants, the device."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import ConfigError
from pipeline.loader.draws import key_of, normal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    import torch

    from pipeline.loader.spec import Constant, DatasetSpec

Normalize = Literal["none", "model"]
Posterior = Literal["mean", "sample"]
LOGVAR_RANGE = (-30.0, 20.0)  # as the networks' own libraries clamp it before exp


def check_values(normalize: str, posterior: str, spec: DatasetSpec, where: str) -> None:
    """Raises ConfigError for values that this dataset cannot give."""
    if normalize not in ("none", "model"):
        raise ConfigError(f"normalize: expected none or model, got {normalize!r}")
    if posterior not in ("mean", "sample"):
        raise ConfigError(f"posterior: expected mean or sample, got {posterior!r}")
    if posterior == "sample" and not spec.moments:
        raise ConfigError(
            f'posterior: {where} stores means only, "sample" needs the log-variance; use "mean", or encode with --moments'
        )
    if normalize == "none":
        return
    if spec.normalised:
        raise ConfigError(
            f'normalize: the latents of {where} were normalised before they were stored; use normalize="none"'
        )
    if all(value is None for value in (spec.scale, spec.shift, spec.mean, spec.std)):
        raise ConfigError(
            f'normalize: {where} records no constants of {spec.network}; use normalize="none" and your own, `lathe stats` suggests some'
        )


def device_of(device: str | torch.device) -> torch.device:
    """The device of this name. Raises ConfigError for one that this process does not have."""
    import torch

    try:
        found = torch.device(device)
        if found.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("CUDA is not available here")
        if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"there are {torch.cuda.device_count()} CUDA devices")
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device: {device!r} cannot be used: {str(error).splitlines()[0]}; expected cpu or cuda:N"
        ) from None
    return found


def check_dtype(dtype: Any) -> None:
    """Raises ConfigError for anything but None or a floating-point type of torch."""
    import torch

    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(
            f"dtype: expected a floating-point torch.dtype such as torch.bfloat16, or None, got {dtype!r}"
        )


class Values:
    """Turns stored latents of one dataset into those that training gets. Safe for several threads."""

    def __init__(
        self,
        spec: DatasetSpec,
        normalize: Normalize,
        posterior: Posterior,
        dtype: torch.dtype | None,
        device: torch.device,
    ) -> None:
        import torch

        self._torch = torch
        self._stored: torch.dtype = getattr(torch, spec.dtype)
        self._dtype = dtype or self._stored
        self.draws = posterior == "sample"  # whether `finish` uses its keys
        self._constants = _constants(spec) if normalize == "model" else None
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def typed(self, block: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Bytes as a tensor of the stored type."""
        return block.view(self._stored).view(*shape)

    def finish(
        self, mean: torch.Tensor, logvar: torch.Tensor | None, keys: Sequence[int], axis: int, *, plain: bool = False
    ) -> torch.Tensor:
        """Values for training from stored ones. `axis`: of the channels; 1 with a batch, then `keys` has a draw for each of it.
        `plain`: only the type is changed.
        """
        if logvar is None and (plain or self._constants is None):
            return mean.to(self._dtype)
        values = mean.to(self._torch.float32)
        if logvar is not None:
            shape = logvar.shape[axis:]
            noise = self._torch.from_numpy(
                np.concatenate([normal(key_of(key, "posterior"), int(np.prod(shape))) for key in keys]).reshape(
                    logvar.shape
                )
            ).to(values.device, non_blocking=True)
            values = values + noise * (logvar.to(self._torch.float32).clamp(*LOGVAR_RANGE) * 0.5).exp()
        if self._constants is not None:
            shift, scale = (self._along(part, values.ndim, axis).to(values.device) for part in self._constants)
            values = (values - shift) * scale
        return values.to(self._dtype)

    def copying(self) -> AbstractContextManager[None]:
        """Within: copies to a GPU and arithmetic there, beside training, finished at the end. Memory read from may then be used again."""
        return nullcontext() if self._stream is None else self._copying(self._stream)

    @contextmanager
    def _copying(self, stream: torch.cuda.Stream) -> Iterator[None]:
        with self._torch.cuda.stream(stream):
            yield
        stream.synchronize()

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device."""
        if self._device.type == "cpu":
            return tensor
        return tensor.to(self._device, non_blocking=True)

    def _along(self, values: tuple[float, ...], dims: int, axis: int) -> torch.Tensor:
        shape = [1] * dims
        shape[axis] = len(values)
        return self._torch.tensor(values, dtype=self._torch.float32).reshape(shape)


def _constants(spec: DatasetSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per channel what to subtract, then to multiply by: `(z - shift) * scale` or `(z - mean) / std`."""
    if spec.mean is not None or spec.std is not None:
        mean = _each(spec.mean, spec.latent_channels, 0.0)
        std = _each(spec.std, spec.latent_channels, 1.0)
        return mean, tuple(1.0 / value for value in std)
    return _each(spec.shift, spec.latent_channels, 0.0), _each(spec.scale, spec.latent_channels, 1.0)


def _each(value: Constant, channels: int, default: float) -> tuple[float, ...]:
    if isinstance(value, tuple):
        return value
    return (default if value is None else value,) * channels
