"""A network's arithmetic is its own: what the caller has switched on around a call does not change a latent.

Enters: the device and how float32 products are to run there. Leaves: a context without gradients, without the caller's autocast and, on
CUDA, with float32 products and convolutions as said; the caller's switches are as before afterwards.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# torch runs float32 convolutions on CUDA as tf32 unless told otherwise, which keeps 11 bits of 24
PRODUCTS = ("ieee", "tf32")


@contextmanager
def own_arithmetic(device: torch.device, products: str = "ieee") -> Iterator[None]:
    """See the module. `products` is "ieee" (true float32) or "tf32"."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        switches = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
        before = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = products
        try:
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
