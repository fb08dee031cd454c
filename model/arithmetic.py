"""Arithmetic of a network's calls, whatever the calling program has switched on: no gradients, no autocast, float32 products as asked.

Gradients and autocast belong to a thread, so a call changes them for itself only. The switches of float32 products belong to the process:
`ProcessSwitches` sets them while calls are open and puts the program's own values back after the last one.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# torch runs float32 convolutions on CUDA as tf32 unless told otherwise, which keeps 11 bits of 24
PRODUCTS = ("ieee", "tf32")


class ProcessSwitches:
    """torch's process-wide switches that change a product on CUDA by more than its rounding, held at given values while calls are open.

    Guarded: `fp32_precision` of `torch.backends.cuda.matmul` and of `torch.backends.cudnn.conv`, and `allow_fp16_accumulation` (off).
    Not guarded: the choice of algorithms (`cudnn.benchmark`, `cudnn.deterministic`, the backends of scaled dot product attention) and
    `allow_fp16_reduced_precision_reduction`, `allow_bf16_reduced_precision_reduction`: they change latents within rounding.

    Calls of the same setting overlap: the first sets the switches, the last puts back what it found. A call of another setting waits until
    none is open, and calls that come later wait behind it.

    While a call is open, every other thread of the process sees these values too: a training step beside it computes its float32 products
    with them, and reading the legacy `allow_tf32` raises RuntimeError in torch where the program had set that. A switch that another thread
    sets meanwhile stays as that thread set it, and open calls compute with it; let no thread do so.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # held by the call that waits, so that no later one overtakes it
        self._open: Counter[int] = Counter()  # calls by thread
        self._products = ""
        self._set: list[tuple[Any, str, Any, Any]] = []  # object, attribute, value before, value while open

    @contextmanager
    def held(self, products: str) -> Iterator[None]:
        """The switches at `products` ("ieee" or "tf32") for the length of the block.

        Raises:
            ValueError: any other word.
            RuntimeError: this thread holds another setting, for which the call would wait for ever.
        """
        if products not in PRODUCTS:
            raise ValueError(f"float32 products are {' or '.join(PRODUCTS)}, got {products!r}")
        self._enter(products, threading.get_ident())
        try:
            yield
        finally:
            self._leave(threading.get_ident())

    def _enter(self, products: str, thread: int) -> None:
        if self._open[thread]:  # only this thread changes its own count
            if products != self._products:
                raise RuntimeError(
                    f"a call with {products} products inside one with {self._products}: end the outer one first"
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
        backends: Any = torch.backends  # its stubs leave these out
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
    """No gradients and no autocast; on CUDA also float32 products and convolutions as "ieee" (true float32) or "tf32".

    Safe in several threads at once; `ProcessSwitches` says what other threads see meanwhile, and which calls wait for each other.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with SWITCHES.held(products):
            yield
