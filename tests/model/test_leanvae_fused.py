"""Fused LeanVAE: with the kernels' references it gives the published vectors; on a GPU it equals the plain one up to rounding."""

from __future__ import annotations

import itertools

import pytest
import torch

import model
import model.colour
from model import kernels
from model.colour import yuv_to_video
from model.kernels import Kernels, convolve_norm, geglu, planes_to_rows
from model.kernels.graphs import EAGER_RUNS, StepGraphs
from model.leanvae.fast.layers import LayerHistory
from tests.model.test_kernel_graphs import Recorder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MATRICES = ["bt709", "bt601"]


@pytest.fixture
def references(monkeypatch):
    """Fused networks on a CPU, with the kernels' references, over whole batches and chunks as on a GPU."""
    monkeypatch.setattr("model.stepped_vae.by_rows", lambda device: False)
    own = Kernels(convolve_norm.reference, geglu.reference, planes_to_rows.reference)
    monkeypatch.setattr(kernels, "choose", lambda device, dtype, requested=None: requested or "fused")
    monkeypatch.setattr(kernels, "load", lambda backend: own if backend == "fused" else None)


@pytest.fixture
def fused(references, golden):
    return model.from_state_dict("leanvae", golden.config, golden.weights)


def in_chunks(vae, video, *ends):
    means, state = [], None
    for start, stop in itertools.pairwise([0, *ends]):
        posterior, state = vae.encode(video[:, :, start:stop], state)
        means.append(posterior.mean)
    return torch.cat(means, dim=2)


def planes_of(batch, frames, height, width):
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (batch, frames, 3, height, width), dtype=torch.uint8, generator=generator)


def relative(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


@pytest.mark.parametrize("block", [8192, 5])
def test_fused_layers_give_the_published_vectors(fused, golden, monkeypatch, block):
    monkeypatch.setattr("model.leanvae.fast.layers.BLOCK", block)
    assert fused.backend == "fused"
    assert "fused" in repr(fused)
    posterior, _ = fused.encode(golden["in/A"], moments=True)
    golden.check("out/A_z", posterior.mean)
    golden.check("out/A_logvar_raw", posterior.logvar)
    golden.check("out/A_z_chunk5", in_chunks(fused, golden["in/A"], 5, 9, 13, 17))
    golden.check("out/B_z", fused.encode(golden["in/B"])[0].mean)
    golden.check("out/img_z", fused.encode(golden["in/img"].unsqueeze(2))[0].mean)
    golden.check("out/B_dec", fused.decode(golden["out/B_z"])[0])


def test_planes_and_float_video_agree(fused):
    planes = planes_of(2, 9, 16, 24)
    want, _ = fused.encode(yuv_to_video(planes, MATRICES))
    assert relative(fused.encode_planes(planes, MATRICES)[0].mean, want.mean) <= 1e-5
    first, state = fused.encode_planes(planes[:, :5], MATRICES)
    rest, _ = fused.encode_planes(planes[:, 5:], MATRICES, state)
    assert relative(torch.cat([first.mean, rest.mean], dim=2), want.mean) <= 1e-5
    with pytest.raises(ValueError, match=r"one colour matrix per video \(2\)"):
        fused.encode_planes(planes, ["bt709"])


@pytest.mark.parametrize("layers", [1, 3])
def test_other_depths_agree_with_the_definition(references, golden, layers):
    depth = {"sep_num_layer": layers, "fusion_num_layer": layers, "ista_iter_num": layers, "ista_layer_num": layers}
    config = {**golden.config, **depth, "latent_dim": 3}
    fused = model.load("leanvae", config=config, untrained=5)
    plain = fused.with_backend("plain")
    want = plain.encode(golden["in/B"], moments=True)[0]
    got = fused.encode(golden["in/B"], moments=True)[0]
    assert relative(got.mean, want.mean) <= 1e-5
    assert relative(got.logvar, want.logvar) <= 1e-5
    video = plain.decode(want.mean)[0]
    # Norms of sparse tokens amplify rounding: at depth 3 the definition itself is 1e-4 to 2e-4 away from float64, by CPU.
    exact = model.load("leanvae", config=config, untrained=5, dtype="float64").with_backend("plain")
    rounding = relative(video, exact.decode(want.mean)[0])
    assert rounding < (1e-5 if layers == 1 else 1e-3)
    assert relative(fused.decode(want.mean)[0], video) <= max(1e-5, 2 * rounding)


def test_long_chunks_are_split_into_steps(fused, golden, monkeypatch):
    monkeypatch.setattr("model.stepped_vae.STEP_TOKENS", 2 * 2 * 6)  # two rows of clip A at a time
    steps = fused._spans(5, 2 * 6)
    assert [span.stop for span in steps] == [2, 4, 5]
    golden.check("out/A_z", fused.encode(golden["in/A"])[0].mean)
    golden.check("out/A_dec", fused.decode(golden["out/A_z"])[0])


def test_a_layer_without_history_is_an_error():
    history = LayerHistory(None, 2)
    history.save(0, torch.zeros(1, 3, 2, 2, 4))
    with pytest.raises(RuntimeError, match="1 of 2 layers saved no history"):
        history.new_state()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_no_worse_than_plain(references, golden, dtype):
    fused = model.from_state_dict("leanvae", golden.config, golden.weights, dtype=dtype)
    assert fused.fused.encoder.pixel_dtype == torch.float16
    errors = {
        backend: relative(fused.with_backend(backend).encode(golden["in/A"])[0].mean, golden["out/A_z"])
        for backend in ("plain", "fused")
    }
    assert 1e-6 < errors["fused"] < {"bfloat16": 4e-2, "float16": 5e-3}[dtype], errors
    # hidden layers are rounded once more before the gate, pixels in float16
    assert errors["fused"] < 2 * errors["plain"], errors


def test_with_backend_keeps_the_weights(fused, golden):
    plain = fused.with_backend("plain")
    assert (plain.backend, fused.backend) == ("plain", "fused")
    assert plain.weights_sha256 == fused.weights_sha256
    _, state = fused.encode(golden["in/A"][:, :, :5])
    rest, _ = plain.encode(golden["in/A"][:, :, 5:], state)  # states are interchangeable
    golden.check("out/A_z", torch.cat([fused.encode(golden["in/A"][:, :, :5])[0].mean, rest.mean], dim=2))
    first, state = fused.decode(golden["out/A_z"][:, :, :2])
    golden.check("out/A_dec", torch.cat([first, plain.decode(golden["out/A_z"][:, :, 2:], state)[0]], dim=2))


def test_recorded_steps_give_the_same_latents(fused):
    """Chunks, images, batches, sizes, planes and float video in turn, as in a build, until all are replayed."""
    recorder = Recorder()
    planes = planes_of(3, 13, 16, 32)
    video = yuv_to_video(planes, ["bt709"] * 3)

    def latents():
        everything = []
        for part in (slice(0, 3), slice(1, 2)):
            matrices, state = ["bt709"] * len(planes[part]), None
            for frames in (slice(0, 5), slice(5, 9), slice(9, 13)):
                posterior, state = fused.encode_planes(planes[part, frames], matrices, state, moments=True)
                everything += [posterior.mean, posterior.logvar, *state.tensors]
        everything.append(fused.encode(video[:, :, :5, :, :16])[0].mean)
        return everything

    want = latents()
    fused.fused.graphs = StepGraphs(recorder)
    for _ in range(EAGER_RUNS + 2):
        for got, expected in zip(latents(), want, strict=True):
            assert torch.equal(got, expected)
    assert recorder.replayed > 3 * recorder.recorded / 2 > 0
    assert len(fused.fused.graphs) == recorder.recorded


def test_rows_that_fill_up_a_recorded_batch_do_not_change_latents(fused):
    """Three videos in the graph of four, whose other rows are NaN, have the bits that they have beside a fourth video."""
    planes, recorder = planes_of(4, 9, 16, 24), Recorder()
    matrices = [*MATRICES, *MATRICES]

    def latents(batch):
        first, state = fused.encode_planes(planes[:batch, :5], matrices[:batch])
        rest, state = fused.encode_planes(planes[:batch, 5:], matrices[:batch], state)
        return first.mean, rest.mean, *state.tensors

    want = [tensor[:3] for tensor in latents(4)]
    fused.fused.graphs = StepGraphs(recorder)
    latents(4)
    for _ in range(EAGER_RUNS):
        got = latents(3)
    assert recorder.batches == [4, 4]
    assert recorder.replayed > 0
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


# ---- on a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_gpu
def test_kernels_on_the_gpu_equal_their_references():
    torch.manual_seed(0)
    packed = torch.randn(1000, 2 * 1408, device="cuda", dtype=torch.bfloat16)
    assert relative(geglu.fused(packed), geglu.reference(packed)) <= 2**-8
    for channels in (24, 128, 384, 512, 768):
        padded = torch.randn(2, 5, 9, 13, channels, device="cuda")
        layer = padded, 0.2 * torch.randn(27, channels, device="cuda"), torch.randn(channels, device="cuda")
        got = convolve_norm.fused(*layer, 1e-5, torch.bfloat16)
        want = convolve_norm.reference(*layer, 1e-5, torch.bfloat16)
        assert relative(got[0], want[0]) <= 1e-5
        assert relative(got[1], want[1]) <= 2**-8
    planes = planes_of(2, 9, 64, 80).cuda()
    colours = model.colour.rgb_map(MATRICES, (-1, 1)).to("cuda", torch.float32)
    for side, dtype, bound in ((8, torch.float32, 1e-6), (16, torch.float16, 2**-10)):
        how = planes[:, 1:], colours, (-1.0, 1.0), 4, side, dtype
        assert relative(planes_to_rows.fused(*how), planes_to_rows.reference(*how)) <= bound


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["leanvae-dim16", "leanvae-wan22-dim48"])
def test_the_fused_network_on_the_gpu_agrees_with_the_plain_one(name):
    exact = model.load(name, untrained=0, device="cuda")
    fused = model.load(name, untrained=0, device="cuda", dtype="bfloat16")
    plain = fused.with_backend("plain")
    assert (exact.backend, fused.backend, plain.backend) == ("plain", "fused", "plain")
    planes = planes_of(2, 17, 128, 160)
    want = exact.encode_planes(planes, MATRICES)[0].mean
    errors = {}
    for vae in (plain, fused):
        whole = vae.encode_planes(planes, MATRICES)[0].mean
        errors[vae.backend] = relative(whole, want)
        for _ in range(EAGER_RUNS + 2):  # until steps are replayed
            first, state = vae.encode_planes(planes[:, :5], MATRICES)
            rest, _ = vae.encode_planes(planes[:, 5:], MATRICES, state)
            assert relative(torch.cat([first.mean, rest.mean], dim=2), whole) <= 2e-2
        assert relative(vae.decode(want)[0], exact.decode(want)[0]) <= 5e-2
    assert errors["fused"] < max(2 * errors["plain"], 2e-2), errors
    assert len(fused.fused.graphs) > 0


@pytest.mark.gpu
@needs_gpu
def test_steps_do_not_wait_for_the_gpu():
    fused = model.load("leanvae-dim4", untrained=0, device="cuda", dtype="bfloat16")
    planes = planes_of(1, 5, 64, 64).cuda()
    for _ in range(EAGER_RUNS + 2):
        fused.encode_planes(planes, ["bt709"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.encode_planes(planes, ["bt709"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
