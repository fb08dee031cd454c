"""Folded NAF layers compared with their formula, and the packed product with the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import model
from model.definition import definition
from model.leanvae.fast import coder, tokens
from model.leanvae.network import Stack

CPU = torch.device("cpu")


def layer_of(stack: Stack, *, residual: bool) -> tokens.NAFLayer:
    conv, ffd = stack.dconv_layer[0]["ds_conv"], stack.ffd_layer[0]
    return tokens.NAFLayer(conv, ffd, slot=0, residual=residual, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("residual", [True, False])
def test_a_layer_equals_its_formula(residual):
    torch.manual_seed(0)
    stack = Stack(24, 1)
    conv, (norm, widen, _, _, narrow) = stack.dconv_layer[0]["ds_conv"], stack.ffd_layer[0]
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        padded = torch.randn(2, 5, 4, 6, 24)
        x = padded[:, 2:]
        ds = conv(F.pad(padded.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 0, 0))).permute(0, 2, 3, 4, 1)
        y = x + ds if residual else ds
        value, gate = widen(norm(y)).chunk(2, dim=-1)
        branch = narrow(value * F.gelu(gate))
        want = y + branch if residual else branch
        got = torch.empty_like(x)
        layer_of(stack, residual=residual)(padded, got)
    assert (got - want).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1024, 512, 1376), (16, 24, 80), (1, 8, 16), (333, 352, 128)])
def test_the_packed_product_equals_the_plain_one(dtype, shape):
    rows, inside, outside = shape
    x, weight, bias = torch.randn(rows, inside), torch.randn(outside, inside) * inside**-0.5, torch.randn(outside)
    projection = tokens.Projection(weight, bias, CPU, dtype)
    want = F.linear(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (projection(x).double() - want).abs().max() <= bound * want.abs().max()


def test_the_backend_follows_device_and_dtype(monkeypatch):
    def backend(dtype):
        return tokens.Projection(torch.zeros(4, 4), None, CPU, dtype).backend

    here = "onednn" if torch.backends.mkldnn.is_available() else "torch"
    assert [backend(d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)] == [
        here,
        here,
        "torch",
        "torch",
    ]
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert backend(torch.float32) == "torch"


def test_layers_work_without_the_packed_product(golden, monkeypatch):
    """Without oneDNN, as in some builds of PyTorch: the same vectors, still exact under chunking."""
    monkeypatch.setattr("model.leanvae.fast.tokens._can_pack", lambda device, dtype: False)
    plain = model.from_state_dict("leanvae", golden.config, golden.weights)
    whole = plain.encode(golden["in/A"])[0].mean
    golden.check("out/A_z", whole)
    first, state = plain.encode(golden["in/A"][:, :, :5])
    rest, _ = plain.encode(golden["in/A"][:, :, 5:], state)
    assert torch.equal(torch.cat([first.mean, rest.mean], dim=2), whole)


def test_whole_grid_processing_gives_the_same_vectors(golden, monkeypatch):
    """Whole grids at once, as on a GPU, on the CPU: batches, chunks, images."""
    for module in (tokens, coder):
        monkeypatch.setattr(module, "by_rows", lambda device: False)
    vae = model.from_state_dict("leanvae", golden.config, golden.weights)
    posterior, _ = vae.encode(golden["in/A"], moments=True)
    golden.check("out/A_z", posterior.mean)
    golden.check("out/A_logvar_raw", posterior.logvar)
    first, state = vae.encode(golden["in/B"][:, :, :5])
    rest, _ = vae.encode(golden["in/B"][:, :, 5:], state)
    golden.check("out/B_z", torch.cat([first.mean, rest.mean], dim=2))
    golden.check("out/img_z", vae.encode(golden["in/img"].unsqueeze(2))[0].mean)
    first, state = vae.decode(golden["out/B_z"][:, :, :1], last=False)
    rest, _ = vae.decode(golden["out/B_z"][:, :, 1:], state)
    golden.check("out/B_dec", torch.cat([first, rest], dim=2))


@pytest.mark.parametrize("layers", [1, 3])
def test_other_depths_agree_with_the_plain_network(golden, layers):
    depth = {"sep_num_layer": layers, "fusion_num_layer": layers, "ista_iter_num": layers, "ista_layer_num": layers}
    vae = model.load("leanvae", config={**golden.config, **depth, "latent_dim": 3}, untrained=5)
    with torch.no_grad():
        want = definition("leanvae", vae.config, vae.network.state_dict()).encode(golden["in/B"]).mean
    got = vae.encode(golden["in/B"])[0].mean
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    video, _ = vae.decode(got)
    assert video.shape == golden["in/B"].shape


def test_reading_the_state_before_all_layers_ran_is_an_error():
    carry = tokens.LayerHistory(None, 2)
    carry.save(0, torch.zeros(1, 3, 2, 2, 4))
    with pytest.raises(RuntimeError, match="1 of 2 layers saved no history"):
        carry.new_state()
