"""Settings of torch that a network's calls run under: no gradients, no autocast, a fixed precision of float32 products.

Gradients and autocast are per thread, so a call changes them for itself only. The precision of float32 products is per process:
`ProcessSwitches` sets it while calls are open and restores the program's own values after the last one.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# By default torch runs float32 convolutions on CUDA as tf32, which keeps 11 of 24 significand bits.
PRODUCTS = ("ieee", "tf32")


class ProcessSwitches:
    """Process-wide torch switches that change CUDA products by more than rounding, held at fixed values while calls are open.

    Guarded: `fp32_precision` of `torch.backends.cuda.matmul` and of `torch.backends.cudnn.conv`, and `allow_fp16_accumulation` (off).
    Not guarded, because they change latents within rounding only: `cudnn.benchmark`, `cudnn.deterministic`, the backends of scaled dot
    product attention, `allow_fp16_reduced_precision_reduction`, `allow_bf16_reduced_precision_reduction`.

    Calls with the same setting overlap: the first sets the switches, the last restores them. A call with another setting waits until none
    is open, and later calls wait behind it.

    While a call is open, all threads of the process see these values: a training step in another thread computes its float32 products with
    them, and reading the legacy `allow_tf32` raises RuntimeError in torch if the program had set it. If another thread sets a switch
    meanwhile, open calls compute with the new value and it is not restored; do not do this.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # held by the waiting call, so that later calls do not overtake it
        self._open: Counter[int] = Counter()  # open calls by thread
        self._products = ""
        self._set: list[tuple[Any, str, Any, Any]] = []  # object, attribute, value before, value while calls are open

    @contextmanager
    def held(self, products: str) -> Iterator[None]:
        """Context in which the switches are set to `products` ("ieee" or "tf32").

        Raises:
            ValueError: `products` is neither.
            RuntimeError: this thread already holds another setting, so waiting would never end.
        """
        if products not in PRODUCTS:
            raise ValueError(f"float32 products must be {' or '.join(PRODUCTS)}, got {products!r}")
        self._enter(products, threading.get_ident())
        try:
            yield
        finally:
            self._leave(threading.get_ident())

    def _enter(self, products: str, thread: int) -> None:
        if self._open[thread]:  # only this thread changes its own count
            if products != self._products:
                raise RuntimeError(
                    f"call with {products} products inside a call with {self._products} products; end the outer call first"
                )
            with self._changed:
                self._open[thread] += 1
            return
        with self._turn, self._changed:
            self._changed.wait_for(lambda: not self._any_open() or self._products == products)
            if not self._any_open():
                self._switch(products)
            self._open[thread] += 1

    def _leave(self, thread: int) -> None:
        with self._changed:
            self._open[thread] -= 1
            if not self._open[thread]:
                del self._open[thread]
            if not self._any_open():
                self._restore()
                self._changed.notify_all()

    def _any_open(self) -> bool:
        return self._open.total() > 0

    def _switch(self, products: str) -> None:
        backends: Any = torch.backends  # the type stubs lack these attributes
        wanted = (
            (backends.cudnn.conv, "fp32_precision", products),
            (backends.cuda.matmul, "fp32_precision", products),
            (backends.cuda.matmul, "allow_fp16_accumulation", False),
        )
        self._products = products
        try:
            for where, name, value in wanted:
                self._set.append((where, name, getattr(where, name), value))
                setattr(where, name, value)
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        while self._set:
            where, name, before, ours = self._set.pop()
            if getattr(where, name) == ours:
                setattr(where, name, before)


SWITCHES = ProcessSwitches()


@contextmanager
def own_arithmetic(device: torch.device, products: str = "ieee") -> Iterator[None]:
    """Context without gradients and autocast; on CUDA float32 products and convolutions run as "ieee" (true float32) or "tf32".

    Thread-safe. `ProcessSwitches` describes what other threads see meanwhile and which calls wait for each other.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with SWITCHES.held(products):
            yield
