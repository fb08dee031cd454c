"""Program for tests: runs every kernel in Triton's interpreter and prints its error against the reference as JSON.

A separate program, because Triton reads `TRITON_INTERPRET` when it is first imported.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from model.colour import rgb_map
from model.kernels import convolve_norm, geglu, planes_to_rows

MATRICES = ["bt709", "bt601"]


def relative(got, want):
    """Largest difference relative to the largest expected value."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def gate(dtype, inner):
    packed = 3 * torch.randn(5, 2 * inner).to(dtype)
    return relative(geglu.fused(packed), geglu.reference(packed))


def layer(stream, dtype, channels, width):
    padded = (5 + torch.randn(2, 4, 3, width, channels)).to(stream)  # a mean far from 0 tries the norm
    arguments = padded, 0.2 * torch.randn(27, channels), torch.randn(channels), 1e-5, dtype
    pairs = zip(convolve_norm.fused(*arguments), convolve_norm.reference(*arguments), strict=True)
    return max(relative(got, want) for got, want in pairs)


def pixels(dtype, side, depth, tokens):
    planes = torch.randint(0, 256, (2, 1 + 2 * depth, 3, 2 * side, tokens * side), dtype=torch.uint8)[:, 1:]
    arguments = planes, rgb_map(MATRICES, (-0.5, 0.5)).float(), (-0.5, 0.5), depth, side, dtype
    return relative(planes_to_rows.fused(*arguments), planes_to_rows.reference(*arguments))


def main():
    torch.manual_seed(0)
    half, full = torch.bfloat16, torch.float32
    errors = {
        "gate": {"float32": gate(full, 80), "bfloat16": gate(half, 1408), "float16": gate(torch.float16, 1025)},
        "layer": {
            "float32": layer(full, full, 24, 10),
            "bfloat16": layer(full, half, 24, 3),
            "float32, whole tiles": layer(full, full, 32, 8),
        },
        "pixels": {
            "float32": pixels(full, 8, 4, 5),
            "float16": pixels(torch.float16, 8, 4, 1),
            "float32, image": pixels(full, 8, 1, 3),
            "float32, 16 a side": pixels(full, 16, 4, 2),
            "float32, 6 a side": pixels(full, 6, 4, 4),
        },
    }
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
