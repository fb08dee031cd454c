"""Compiled steps on other devices than a CPU: which numbers of videos are compiled, here without compiling."""

from __future__ import annotations

import torch

import model
from model import stepped_vae
from tests.tiny_corpus import TINY_NETWORK


def test_batches_of_any_number_run_on_few_compiled_steps(monkeypatch):
    compiled = []

    def counted(step, *rest):
        def run(*tensors):
            assert compiled[number] in (0, len(tensors[0]))
            compiled[number] = len(tensors[0])
            return step(*tensors)

        number = len(compiled)
        compiled.append(0)
        return run

    monkeypatch.setattr(stepped_vae, "by_rows", lambda device: False)
    monkeypatch.setattr(stepped_vae, "find_compiler", lambda: "none")
    monkeypatch.setattr(stepped_vae, "_Compiled", counted)
    vae = model.load("leanvae", config=TINY_NETWORK, untrained=0, compile=True)
    planes = torch.randint(0, 256, (7, 9, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    matrices = ["bt709", "bt601"] * 4
    alone = [vae.encode_planes(planes[b : b + 1], matrices[b : b + 1])[0].mean for b in range(7)]
    for batch in range(1, 8):
        first, state = vae.encode_planes(planes[:batch, :5], matrices[:batch])
        rest, _ = vae.encode_planes(planes[:batch, 5:], matrices[:batch], state)
        got = torch.cat([first.mean, rest.mean], dim=2)
        torch.testing.assert_close(got, torch.cat(alone[:batch]), rtol=0, atol=1e-5)
    assert sorted(compiled) == [1, 1, 1, 2, 2, 4, 4]  # once for whole clips, then first and later chunks
