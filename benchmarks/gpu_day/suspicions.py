"""One measurement for each suspicion about the GPU paths (G1 to G12 of a review): what it is worth, in numbers.

Each function says what was suspected. Layers and kernels alone are here, what concerns whole steps and memory in `step_suspicions`.
On a CPU the same functions run on tiny sizes with the kernels' references; what needs CUDA is left out with the reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_day import step_suspicions
from model.leanvae.depthwise import _CausalDepthwise, _convolved, causal_depthwise
from model.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.gpu_day.report import Report
    from benchmarks.gpu_day.settings import Settings
    from benchmarks.machine import Machine

REPEATS = 5


def run(report: Report, settings: Settings, machine: Machine) -> None:
    """Section `suspicions`."""
    listed: dict[str, Callable[[Settings, Machine], dict[str, Any]]] = {
        "G1 depthwise conv3d": depthwise,
        "G2 depthwise dtype under autocast": depthwise_dtype,
        "G3 block of tokens": step_suspicions.token_block,
        "G4 convolve_norm against a copy": convolve_norm_rate,
        "G5 graphs while batches vary": step_suspicions.varied_batches,
        "G10 attention backends": attention,
        "G11 pair of convolutions": pair_rounding,
        "G12 download on the compute stream": step_suspicions.download,
        "G7 bytes by batch": step_suspicions.bytes_by_batch,
    }
    for name, function in listed.items():
        report.measure(name, lambda function=function: function(settings, machine))
    # last: they fill memory
    if not machine.cuda:
        for name in ("G6 memory of graphs", "G8 graphs on a second device", "G9 memory that is nearly full"):
            report.leave_out(name, "needs CUDA")
        return
    report.measure("G6 memory of graphs", lambda: step_suspicions.graph_memory(settings, machine))
    if torch.cuda.device_count() > 1:
        report.measure("G8 graphs on a second device", lambda: step_suspicions.second_device(settings, machine))
    else:
        report.leave_out("G8 graphs on a second device", "one device")
    report.measure("G9 memory that is nearly full", lambda: step_suspicions.nearly_full(settings, machine))


def fastest(machine: Machine, run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Least seconds of some runs, after one that is not counted."""
    run()
    return min(machine.clock(run) for _ in range(repeats))


def depthwise(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G1: depthwise `conv3d` is slow on CUDA, backward most. Milliseconds of forward and backward of three ways that give the same."""
    B, C, t, h, w = settings.depthwise
    found: dict[str, Any] = {"shape_BCthw": settings.depthwise}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn((B, t, h, w, C), device=machine.device, dtype=dtype, requires_grad=True)
        weight = torch.randn((C, 1, 3, 3, 3), device=machine.device, dtype=dtype, requires_grad=True)
        bias = torch.zeros(C, device=machine.device, dtype=dtype, requires_grad=True)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "conv3d": lambda x=x, k=weight, b=bias: _convolved(x, k, b, (2, 0)),
            "conv3d, backward by 2-D gradients": lambda x=x, k=weight, b=bias: _CausalDepthwise.apply(x, k, b),
            "three conv2d": lambda x=x, k=weight, b=bias: causal_depthwise(x, k, b, conv2d=True),
        }
        for name, way in ways.items():

            def both(way: Callable[[], torch.Tensor] = way) -> None:
                way().sum().backward()

            forward_s, both_s = fastest(machine, way), fastest(machine, both)
            key = f"{name}, {str(dtype).removeprefix('torch.')}"
            found[key] = {"forward_ms": 1e3 * forward_s, "forward_backward_ms": 1e3 * both_s}
    return found


def depthwise_dtype(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G2: under bfloat16 autocast the depthwise convolution must run in float32, on CUDA as on a CPU."""
    C = settings.depthwise[1]
    x = torch.randn((1, 3, 8, 8, C), device=machine.device)
    weight, bias = torch.randn((C, 1, 3, 3, 3), device=machine.device), torch.zeros(C, device=machine.device)
    with torch.autocast(machine.device.type, torch.bfloat16):
        y = causal_depthwise(x, weight, bias)
    exact = causal_depthwise(x, weight, bias)
    return {
        "dtype": str(y.dtype),
        "relative_difference": float((y.float() - exact).abs().max() / exact.abs().max()),
    }


def convolve_norm_rate(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G4: `convolve_norm` reads its input about 11 times from the level-2 cache. Milliseconds, and those of copying the same bytes."""
    from model.kernels import convolve_norm  # imports Triton

    B, C, t, h, w = settings.depthwise
    kernel = convolve_norm.fused if machine.cuda else convolve_norm.reference
    padded = torch.randn((B, t + 2, h, w, C), device=machine.device)
    taps, bias = torch.randn((27, C), device=machine.device), torch.zeros(C, device=machine.device)
    y, normed = kernel(padded, taps, bias, 1e-5, torch.bfloat16)
    moved = padded.nbytes + y.nbytes + normed.nbytes
    source = torch.ones(moved // 2, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    kernel_s = fastest(machine, lambda: kernel(padded, taps, bias, 1e-5, torch.bfloat16))
    copy_s = fastest(machine, lambda: target.copy_(source))
    return {"bytes": moved, "kernel_ms": 1e3 * kernel_s, "copy_ms": 1e3 * copy_s, "times_copy": kernel_s / copy_s}


def attention(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G10: attention with heads of 512 channels has no flash kernel and may take the (h*w)^2 matrix. Each backend: ms, MB, or why not."""
    q, k, v = (torch.randn(settings.attention, device=machine.device).bfloat16() for _ in range(3))
    found: dict[str, Any] = {"shape": settings.attention}
    backends = {
        "as chosen": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    for name, backend in backends.items():

        def attend(backend: SDPBackend | None = backend) -> torch.Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            peak_mb = machine.peak_mb(attend)
            found[name] = {"peak_mb": peak_mb, "ms": 1e3 * fastest(machine, attend, 2)}
        except RuntimeError as error:  # the backend refuses this shape, or memory ran out: that is the finding
            found[name] = {"out_of_memory": is_out_of_memory(error), "refused": str(error)[:200]}
    return found


def pair_rounding(settings: Settings, machine: Machine) -> dict[str, Any]:
    """G11: three bfloat16 convolutions, each rounded before their sum, against one over three frames' channels. Errors against float64."""
    C = settings.depthwise[1] // 4
    x = torch.randn((2, 3 * C, 32, 32), device=machine.device).bfloat16()
    weight = (torch.randn((C, 3 * C, 3, 3), device=machine.device) / (27 * C) ** 0.5).bfloat16()
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    one = F.conv2d(x, weight, padding=1)
    parts = zip(x.split(C, 1), weight.split(C, 1), strict=True)
    three = sum(
        (F.conv2d(frames, kernel, padding=1).float() for frames, kernel in parts), torch.zeros((), device=x.device)
    )

    def rms(got: torch.Tensor) -> float:
        return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    return {"three_rms": rms(three), "one_rms": rms(one)}
