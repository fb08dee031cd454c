"""Compiled steps, by the real compiler: as lossless as eager ones, and equal to them up to rounding.

A compiler takes 5 to 20 s for a step. Each case compiles one: videos are begun eagerly, as compiled networks take the same states.
IV-VAE passes as well but compiles for one to three minutes, so it is not here.
"""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config as inductor

import model
from model.losslessness import ROUNDING
from pipeline.encoder.compiling import missing_compiler
from tests.model.test_definitions import CONFIGS, video

pytestmark = pytest.mark.skipif(
    missing_compiler("cpu") is not None, reason=f"nothing can be compiled here: {missing_compiler('cpu')}"
)

SMALLEST = {
    "leanvae": CONFIGS["leanvae"],
    "wfvae2": {**CONFIGS["wfvae2"], "norm_type": "layernorm"},
}


@pytest.mark.parametrize(
    ("family", "dtype", "kind"),
    [
        ("leanvae", "bfloat16", "encode"),
        ("leanvae", "float32", "decode"),
        ("wfvae2", "float32", "encode"),
    ],
)
@inductor.patch(compile_threads=1)  # its own processes would import torch for a few small kernels
def test_compiled_steps_give_the_same_bits_in_any_chunks_and_batch(family, dtype, kind):
    eager, compiled = (
        model.load(family, config=SMALLEST[family], untrained=0, dtype=dtype, compile=on) for on in (False, True)
    )
    assert (eager.identity().compiled, compiled.identity().compiled) == (False, True)
    shown = video(1 + 2 * eager.spec.time_stride)
    shown, row = torch.cat([shown, shown.flip(3)]), eager.spec.time_stride
    if kind == "decode":
        shown, row = eager.encode(shown)[0].mean, 1

    def run(vae, part, state):
        if kind == "decode":
            return vae.decode(part, state)
        posterior, state = vae.encode(part, state)
        return posterior.mean, state

    state = run(eager, shown[:, :, :1], None)[1]
    want = run(eager, shown[:, :, 1:], state)[0]
    together = run(compiled, shown[:, :, 1:], state)[0]
    difference = (together - want).abs().max()
    assert 0 < difference <= ROUNDING[eager.dtype] * want.abs().max(), "compiled sums are in another order"
    for place, alone in enumerate(eager.split_state(state)):
        first, alone = run(compiled, shown[place : place + 1, :, 1 : 1 + row], alone)
        rest, _ = run(compiled, shown[place : place + 1, :, 1 + row :], alone)
        assert torch.equal(torch.cat([first, rest], dim=2), together[place : place + 1])
    assert len(compiled._compiled_steps) == 1
