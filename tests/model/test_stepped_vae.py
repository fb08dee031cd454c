"""Definitions run in steps: whatever is compiled is one graph, and refusals. `test_compiled_networks` runs the compiler."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config

import model
from model.definition import DEFINED
from model.stepped_vae import _compact
from tests.model.test_definitions import CONFIGS, video

CAUSAL = {**CONFIGS, "wfvae2": {**CONFIGS["wfvae2"], "norm_type": "layernorm"}}
NETWORKS = {family: model.load(family, config=CAUSAL[family], untrained=0) for family in DEFINED}


def runs_as_one_graph(vae, kind, x, past):
    step = vae._eager(kind, first=not past, last=False)
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=False)
    for got, want in zip(compiled(x, *past), step(x, *past), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", DEFINED)
@torch.no_grad()
def test_every_step_is_one_graph(family):
    torch._dynamo.reset()  # it compiles a function eight times at most, and `encode` is the same for all families
    vae = NETWORKS[family]
    shown = video(1 + vae.spec.time_stride)
    posterior, state = vae.encode(shown[:, :, :1])
    runs_as_one_graph(vae, "encode", shown[:, :, :1], ())
    runs_as_one_graph(vae, "decode", posterior.mean, ())
    if vae.spec.chunking != "none":
        decoding = vae.decode(posterior.mean, last=False)[1]
        runs_as_one_graph(vae, "encode", shown[:, :, 1:], state.tensors)
        runs_as_one_graph(vae, "decode", posterior.mean, decoding.tensors)


def test_states_have_the_strides_of_new_tensors():
    """Else a compiled step would compile again, with other bits."""
    odd = torch.zeros(1, 3, 2, 2, 4)[:, 1:]
    assert odd.is_contiguous()
    assert odd.stride() == (48, 16, 8, 4, 1)
    found = _compact(odd)
    assert found.stride() == torch.empty(odd.shape).stride()
    assert found.data_ptr() == odd.data_ptr()
    last = torch.zeros(1, 4, 3, 2, 2).to(memory_format=torch.channels_last_3d)
    assert (
        _compact(last[:, :, 1:]).stride() == torch.empty(1, 4, 2, 2, 2, memory_format=torch.channels_last_3d).stride()
    )


def test_compiling_without_a_compiler_is_refused():
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        model.load("leanvae", config=CONFIGS["leanvae"], untrained=0, compile=True)


def test_every_call_of_a_compiled_step_is_frozen_on_a_cpu(monkeypatch):
    """Dynamo may compile again at any call, as when the number of threads changes: other bits if weights were not constants then."""
    frozen = []

    def compiled(step, **how):
        def run(*tensors):
            frozen.append(torch._inductor.config.freezing)
            return step(*tensors)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    vae = model.load("leanvae", config=CONFIGS["leanvae"], untrained=0, compile=True)
    vae.encode(video(13))
    assert frozen == [True] * 4
    assert not torch._inductor.config.freezing


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_switched_off_compiling_is_refused_instead_of_running_eagerly(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    vae = model.load("leanvae", config=CONFIGS["leanvae"], untrained=0, compile=True)
    off = torch._dynamo.config.patch(disable=variable == "TORCH_COMPILE_DISABLE")  # it is read when torch is imported
    with off, pytest.raises(RuntimeError, match=r"torch\.compile compiles nothing in this process"):
        vae.encode(video(1))


def test_compiling_a_network_of_diffusers_is_refused():
    for call in (model.load, model.identify):
        with pytest.raises(ValueError, match="networks of diffusers cannot be compiled"):
            call("taesd", untrained=0, compile=True)


def test_weights_that_run_as_they_are_loaded_are_held_once():
    vae = model.load("wfvae", config=CAUSAL["wfvae"], untrained=0, dtype="bfloat16")
    vae.encode(video(1))
    loaded, running = (dict(each.named_parameters()) for each in (vae.network, vae._running))
    same = {key for key in loaded if loaded[key].data_ptr() == running[key].data_ptr()}
    cast = {key for key in loaded if running[key].dtype == torch.bfloat16}
    assert same
    assert cast
    assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
    assert not same & cast


def test_a_decoder_can_be_dropped_in_inference_mode_and_stays_dropped_on_another_backend():
    vae, shown = model.load("leanvae", config=CONFIGS["leanvae"], untrained=0), video(5)
    with torch.inference_mode():
        vae.drop_decoder()
    mean = vae.encode(shown)[0].mean
    assert torch.equal(mean, NETWORKS["leanvae"].encode(shown)[0].mean)
    with pytest.raises(RuntimeError, match="its decoder was dropped"):
        vae.with_backend("plain").decode(mean)
