"""Base of networks that are defined here: runs a definition step by step, eagerly or compiled, and carries the causal state.

The definition (`model.<family>.network.Network`) takes `History`, so a step is a plain function of frames and tensors. On a CPU a step is
one latent row of one video, a video's first row without frames before it: shapes depend on the frame size only, so any chunks and any
batch give the same bits, and memory is that of one step. On other devices a step is the whole batch and up to `STEP_TOKENS` tokens.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from functools import cached_property
from itertools import pairwise
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

import torch

from model import inputs
from model.history import History
from model.vae import CausalVAE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from model.history import StateTensors
    from model.state import CausalState
    from model.vae import Pixels

    Step = Callable[
        ..., StateTensors
    ]  # tensors of the step, then of the state -> outputs, then tensors of the next state

STEP_TOKENS = 1 << 19  # of a step on a GPU, so that memory does not grow with the chunk


def by_rows(device: torch.device) -> bool:
    """Whether a step is one latent row of one video."""
    return device.type == "cpu"


class SteppedVAE(CausalVAE):
    """Network ready to run, over its definition. On a CPU results have the same bits for any chunking and any batch.

    A definition has `encode(video, history)`, `decode(latent, history)` and `prepare(dtype)`, which gives the weights of the large
    products of a copy for inference this dtype; everything else is computed in at least float32.

    Attributes, besides those of `CausalVAE`:
        network: parameters under their published names, on the CPU and in their own dtypes.
        holds_back: whether `decode` needs the next latent for its last frames, so that a call with `last=True` ends the video.
    """

    holds_back = False

    def __init__(self, network: nn.Module, *arguments: Any, **provenance: Any) -> None:
        super().__init__(*arguments, **provenance)
        self.network: Any = network
        if self.compiled:
            find_compiler()
        self._compiled_steps: dict[tuple[object, ...], Step] = {}
        self._clock = _Clock()

    @property
    def compile_s(self) -> float:  # noqa: D102
        return self._clock.seconds

    # ---- facts of a family ------------------------------------------------------------------------------------------

    def _why_whole(self) -> str:
        """Why whole clips only, for networks whose `spec.chunking` is "none"."""
        return "its layers mix the frames of the clip"

    def _phase(self, kind: str, *, first: bool, rows: int) -> str:
        """Phase of the state after a call over `rows` latent rows, where the state's shape depends on it."""
        del kind, first, rows
        return ""

    # ---- encoder and decoder ----------------------------------------------------------------------------------------

    @cached_property
    def _running(self) -> Any:
        """The network that runs: on the device, with its products in `dtype`. Shares memory with `network` where nothing differs."""
        tensors = (*self.network.parameters(), *self.network.buffers())
        with torch.inference_mode(False):  # else parameters on the meta device (`drop_decoder`) take no new values
            running = copy.deepcopy(self.network, {id(tensor): _alias(tensor) for tensor in tensors})
            running.to(self.input_dtype)
            running._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(self.device))
            running.prepare(self.dtype)
        return running

    def _module(self) -> nn.Module:
        return cast("nn.Module", self.network)

    def drop_decoder(self) -> None:  # noqa: D102
        super().drop_decoder()
        self.__dict__.pop("_running", None)
        self._compiled_steps.clear()

    def _run_encoder(
        self, pixels: Pixels, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        self._check_whole(state is None, "encode")
        rows = inputs.check_frames(pixels.frames, self.spec, first=state is None)

        def frames(videos: slice, rows: slice) -> torch.Tensor:
            return pixels.part(videos, self._frames(rows, state is None))

        outputs, tensors = self._walk("encode", frames, (pixels.batch, rows), self._grid(pixels.size), state, last=True)
        after = self._next_state(
            "encode", self._grid(pixels.size), tensors, self._phase("encode", first=state is None, rows=rows)
        )
        return outputs[0], outputs[1] if moments else None, after

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        self._check_whole(state is None and last, "decode")
        B, _, rows, h, w = latent_BCthw.shape

        def latents(videos: slice, rows: slice) -> torch.Tensor:
            return latent_BCthw[videos, :, rows].to(self.device, self.input_dtype)

        (video,), tensors = self._walk("decode", latents, (B, rows), (h, w), state, last=last)
        if last and self.holds_back:
            return video, self._ended("decode", B, (h, w))
        return video, self._next_state("decode", (h, w), tensors, self._phase("decode", first=state is None, rows=rows))

    def _check_whole(self, whole: bool, kind: str) -> None:
        if self.spec.chunking == "none" and not whole:
            raise ValueError(
                f"{self.spec.network} cannot {kind} in chunks: {self._why_whole()}, so every latent depends on every frame. "
                f"Pass whole clips in one call, without state" + (" and with last=True" if kind == "decode" else "")
            )

    # ---- stepping ---------------------------------------------------------------------------------------------------

    def _walk(
        self,
        kind: str,
        part: Callable[[slice, slice], torch.Tensor],
        size: tuple[int, int],
        grid: tuple[int, int],
        state: CausalState | None,
        *,
        last: bool,
    ) -> tuple[list[torch.Tensor], StateTensors]:
        """Runs all steps of a chunk of `size` videos and latent rows; `part(videos, rows)` gives a step's input.

        Returns outputs `B C T H W` and the tensors of the next state.
        """
        batch, rows = size
        results, states = [], []
        for videos in self._videos(batch):
            past = None if state is None else tuple(tensor[videos] for tensor in state.tensors)
            pieces = []
            for span in self._spans(rows, (videos.stop - videos.start) * grid[0] * grid[1]):
                ends = last and span.stop == rows if kind == "decode" and self.holds_back else True
                outputs, past = self._step(kind, part(videos, span), past, last=ends)
                pieces.append(outputs)
            results.append([_joined(parts, 2) for parts in zip(*pieces, strict=True)])
            states.append(past or ())
        return [_joined(parts, 0) for parts in zip(*results, strict=True)], tuple(
            _joined(parts, 0) for parts in zip(*states, strict=True)
        )

    def _videos(self, batch: int) -> Iterator[slice]:
        """Videos of each step. On other devices compiled steps take powers of two of them: each number is compiled for itself, which takes
        a minute, and the batches of a build have any.
        """
        start = 0
        while left := batch - start:
            size = 1 if by_rows(self.device) else 1 << (left.bit_length() - 1) if self.compiled else left
            yield slice(start, start + size)
            start += size

    def _spans(self, rows: int, row_tokens: int) -> list[slice]:
        """Latent rows of each step."""
        if self.spec.chunking == "none":
            return [slice(0, rows)]
        step = 1 if by_rows(self.device) else max(1, STEP_TOKENS // row_tokens)
        return [slice(start, stop) for start, stop in pairwise([*range(0, rows, step), rows])]

    def _frames(self, rows: slice, first: bool) -> slice:
        """Frames of a chunk that these latent rows cover; `first`: the chunk starts a video."""
        lead, stride = self.spec.lead_frames if first else 0, self.spec.time_stride
        start, stop = (max(0, lead + (row - lead) * stride) for row in (rows.start, rows.stop))
        return slice(start, stop)

    def _step(
        self, kind: str, x: torch.Tensor, past: StateTensors | None, *, last: bool
    ) -> tuple[StateTensors, StateTensors]:
        """One run of the definition: outputs, and the tensors of the next state."""
        # Slices of a chunk have its strides. Libraries may choose other sums for them, and a compiled step would compile again.
        x, count = x.contiguous(), 1 if kind == "decode" else 2
        if self.compiled:
            x, past = _compact(x), None if past is None else tuple(_compact(tensor) for tensor in past)
        results = self._runner(kind, x, past, last=last)(x, *(past or ()))
        return results[:count], results[count:]

    def _eager(self, kind: str, *, first: bool, last: bool) -> Step:
        """A step as a function of tensors only."""
        running = self._running

        def encode(x: torch.Tensor, *past: torch.Tensor) -> StateTensors:
            history = History(None if first else past, last=last)
            posterior = running.encode(x, history)
            return posterior.mean.contiguous(), posterior.logvar.contiguous(), *history.tensors()

        def decode(x: torch.Tensor, *past: torch.Tensor) -> StateTensors:
            history = History(None if first else past, last=last)
            return running.decode(x, history).contiguous(), *history.tensors()

        return encode if kind == "encode" else decode

    def _runner(self, kind: str, x: torch.Tensor, past: StateTensors | None, *, last: bool) -> Step:
        eager = self._eager(kind, first=past is None, last=last)
        if not self.compiled:
            return eager
        key = (kind, x.shape, None if past is None else tuple(tensor.shape for tensor in past), last)
        if key not in self._compiled_steps:
            self._compiled_steps[key] = _Compiled(eager, self.device, self._clock)
        return self._compiled_steps[key]


class _Compiled:
    """A step compiled for its shapes, at its first call. On a CPU Inductor packs the weights into the compiled step ("freezing")."""

    def __init__(self, step: Any, device: torch.device, clock: _Clock) -> None:
        # Dynamo counts compilations by code object, and gives up after eight: each step needs its own.
        own = FunctionType(
            step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__
        )
        self._run: Any = torch.compile(own, fullgraph=True, dynamic=False)
        if self._run is own or torch._dynamo.config.disable:
            raise RuntimeError(
                "torch.compile compiles nothing in this process (TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set); unset it, or "
                "load the network without compile"
            )
        self._freezing, self._ready, self._clock = device.type == "cpu", False, clock

    def __call__(self, *tensors: torch.Tensor) -> StateTensors:
        import torch._inductor.config as inductor

        # Not by `options`: Dynamo, which makes parameters constants, reads the process's configuration. At every call: Dynamo
        # compiles again when the number of threads changes, or tensors are of inference mode and were not.
        with nullcontext() if self._ready else self._clock, inductor.patch(freezing=self._freezing):
            results: StateTensors = self._run(*tensors)
        self._ready = True
        return results


class _Clock:
    """Sum of the times spent inside its `with` blocks, the present one included. One thread enters, any reads."""

    def __init__(self) -> None:
        self._spent_since: tuple[float, float | None] = (
            0.0,
            None,
        )  # one value, so that a reader sees both or neither change

    def __enter__(self) -> None:
        self._spent_since = self._spent_since[0], time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._spent_since = self.seconds, None

    @property
    def seconds(self) -> float:
        """The sum now."""
        spent, since = self._spent_since
        return spent if since is None else spent + time.monotonic() - since


def find_compiler() -> str:
    """Path or name of the C++ compiler that torch.compile will use.

    Raises:
        RuntimeError: there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except InvalidCxxCompiler:
        raise RuntimeError(
            "compiling a network needs a C++ compiler, and torch found none; install g++ or name one in the environment variable "
            "CXX, or load the network without compile"
        ) from None


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with the strides that a new tensor has. Results of compiled steps have others where an axis has size one, and a step
    would compile again for those, with sums in another order.
    """
    formats = {4: (torch.channels_last,), 5: (torch.channels_last_3d,)}.get(tensor.ndim, ())
    for memory in (torch.contiguous_format, *formats):
        if tensor.is_contiguous(memory_format=memory):
            new = torch.empty(tensor.shape, device="meta", memory_format=memory)
            return tensor.as_strided(tensor.shape, new.stride())
    return tensor


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another tensor, or parameter, over the same memory: a cast of one leaves the other as it is."""
    return (
        torch.nn.Parameter(tensor.detach(), requires_grad=False)
        if isinstance(tensor, torch.nn.Parameter)
        else tensor.detach()
    )


def _joined(parts: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=axis)
