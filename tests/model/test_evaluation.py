"""Metrics of `lathe evaluate` on hand-computed values and on a real network."""

import math

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

import model
from model.metrics.examples import KEPT_FRAMES, SAMPLE, ExampleSelection, FrameSampler
from model.metrics.fidelity import ClipMeter, by_position, clip_quality
from model.metrics.frames import MOST_DB, frame_ssim
from model.metrics.latents import LatentMoments
from model.metrics.perceptual import LPIPS
from model.metrics.roundtrip import RoundTrip, eight_bits
from model.metrics.summary import QualitySummary
from tests.tiny_corpus import TINY_NETWORK


def flat(*levels, side=16):
    """Clip whose frames have one value each."""
    return torch.tensor(levels, dtype=torch.uint8)[None, :, None, None].expand(3, -1, side, side).contiguous()


def noise(seed, frames=5, side=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, side, side), dtype=torch.uint8, generator=generator)


def db(mse):
    return 10 * math.log10(255**2 / mse)


def test_quality_of_flat_frames_equals_hand_computed_values():
    quality = clip_quality(flat(100, 100, 50, 50, 200), flat(110, 100, 50, 55, 180))
    errors = [100, 0, 0, 25, 400]
    assert quality.frame_psnr == pytest.approx([MOST_DB if e == 0 else db(e) for e in errors], abs=1e-4)
    assert quality.psnr == pytest.approx((db(100) + db(25) + db(400) + 2 * MOST_DB) / 5, abs=1e-4)
    assert quality.psnr_of_mse == pytest.approx(db(105))
    assert quality.degree == pytest.approx(1 - 35 / 500)
    assert quality.light_sum == pytest.approx(500 / 255 * 3 * 16 * 16)
    assert quality.lpips is None
    # flat frames have no variance: SSIM is its luminance term, C1 = (0.01 * 255)^2
    c1 = 2.55**2
    ssim = [
        (2 * a * b + c1) / (a * a + b * b + c1) for a, b in [(100, 110), (100, 100), (50, 50), (50, 55), (200, 180)]
    ]
    assert quality.frame_ssim == pytest.approx(ssim, abs=1e-12)
    assert quality.ssim_positions == pytest.approx(ssim[1:], abs=1e-12)
    assert quality.groups == 1


def test_ssim_counts_only_windows_inside_the_frame():
    """By its definition (Wang et al. 2004) in float64; windows of 11 over frames of 16 have 6 places a side."""
    original, other = noise(2, frames=2), noise(2, frames=2)
    other[:, :, 0] = 0  # one line of one border
    position = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(position**2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blurred(frames_NCHW):
        return torch.nn.functional.conv2d(frames_NCHW.reshape(-1, 1, 16, 16), window)

    x, y = (clip.transpose(0, 1).double() for clip in (original, other))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    u, v = blurred(x), blurred(y)
    covariance = 2 * (blurred(x * y) - u * v) + c2
    variances = blurred(x * x) - u * u + blurred(y * y) - v * v + c2
    similarity = (2 * u * v + c1) * covariance / ((u * u + v * v + c1) * variances)
    assert similarity.shape == (6, 1, 6, 6)
    assert clip_quality(original, other).frame_ssim == pytest.approx(similarity.view(2, -1).mean(1).tolist(), abs=1e-12)


@pytest.mark.parametrize(("lowest", "most"), [(0, 255), (0, 5), (250, 255)])
def test_ssim_of_the_inner_pixels_is_that_of_torchmetrics_in_float64(lowest, most):
    """Dark, bright and any pixels: float32 would be wrong in the third decimal where they are bright and flat."""
    original, other = ((noise(seed, side=24).int() % (most - lowest + 1) + lowest).to(torch.uint8) for seed in (2, 3))
    frames = [clip.transpose(0, 1).double() for clip in (other, original)]
    _, similarity = structural_similarity_index_measure(
        *frames, data_range=255.0, reduction="none", return_full_image=True
    )
    expected = similarity[..., 5:-5, 5:-5].mean((1, 2, 3))  # from some version on it counts reflected borders
    assert frame_ssim(original, other) == pytest.approx(expected.tolist(), abs=1e-9)
    assert frame_ssim(original, original) == [1.0] * 5
    assert frame_ssim(original[:, :, :8], other[:, :, :8]) == [], "smaller than the window"


def test_quality_does_not_depend_on_how_frames_are_split():
    original, other = noise(0, 9), noise(1, 9)
    whole = clip_quality(original, other)
    meter = ClipMeter(1, 4)
    for part in (slice(0, 1), slice(1, 1), slice(1, 7), slice(7, 9)):
        meter.add(original[:, part], other[:, part])
    assert meter.result() == whole
    assert whole.frames == 9
    assert whole.groups == 2
    assert whole.psnr > whole.psnr_of_mse


def test_identical_clips_are_perfect_and_black_clips_have_no_degree():
    same = clip_quality(noise(0), noise(0))
    assert (same.psnr, same.psnr_of_mse, same.degree) == (MOST_DB, MOST_DB, 1.0)
    assert same.ssim == pytest.approx(1.0)
    assert clip_quality(flat(0), flat(3)).degree is None


def test_positions_skip_the_lead_and_average_over_groups():
    values = [0.9, 1, 2, 3, 4, 5, 6, 7, 8]
    assert by_position(values, 1, 4) == (3, 4, 5, 6)
    assert by_position(values[1:], 0, 4) == (3, 4, 5, 6)
    assert by_position(values[:3], 1, 4) == ()
    assert by_position([0.5], 1, 1) == ()


def test_lpips_gets_frames_in_minus_one_to_one():
    lpips = LPIPS().eval()
    original, other = noise(0), noise(1)
    quality = clip_quality(original, other, lpips=lpips)

    def scaled(clip):
        return clip.transpose(0, 1).double().sub(127.5).div(127.5).float()

    assert quality.lpips == pytest.approx(lpips(scaled(original), scaled(other)).mean().item(), rel=1e-4)
    assert clip_quality(original, original, lpips=lpips).lpips == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("original", "other", "message"),
    [
        (noise(0).float(), noise(0).float(), "expected uint8 frames .*float32"),
        (noise(0), noise(0, 4), "differ in shape"),
        (noise(0, side=8), noise(0, side=8), "at least 11 pixels a side, got 8x8"),
    ],
)
def test_unmeasurable_clips_are_refused(original, other, message):
    with pytest.raises(ValueError, match=message):
        clip_quality(original, other)


def test_a_clip_without_frames_is_refused():
    with pytest.raises(ValueError, match="no frames"):
        ClipMeter(1, 4).result()


def test_summary_averages_over_clips_and_sums_where_the_paper_sums():
    clips = [clip_quality(noise(0), noise(1)), clip_quality(flat(10, 20), flat(12, 20)), clip_quality(flat(0), flat(0))]
    summary = QualitySummary()
    for quality in clips:
        summary.add(quality)
    found = summary.summary()
    psnr = torch.tensor([q.psnr for q in clips], dtype=torch.float64)
    assert (found["clips"], found["frames"]) == (3, 8)
    assert found["psnr"] == pytest.approx(
        {"mean": psnr.mean().item(), "std": psnr.std(correction=0).item(), "min": psnr.min().item(), "max": MOST_DB}
    )
    error, light = sum(q.error_sum for q in clips), sum(q.light_sum for q in clips)
    assert found["degree"] == pytest.approx(1 - error / light)
    assert found["lpips"] is None
    assert found["ssim_by_position"] == pytest.approx(list(clips[0].ssim_positions))  # the others have no group
    assert found["ssim_margin"] == pytest.approx(max(clips[0].ssim_positions) - min(clips[0].ssim_positions))
    assert found["psnr_by_frame"][0] == pytest.approx(sum(q.frame_psnr[0] for q in clips) / 3)
    assert found["psnr_by_frame"][4] == pytest.approx(clips[0].frame_psnr[4])
    assert sum(found["psnr_histogram"].values()) == 3
    assert found["psnr_histogram"]["100"] == 1


def test_ssim_positions_are_weighted_by_groups():
    long, short = clip_quality(noise(0, 9), noise(1, 9)), clip_quality(noise(2, 5), noise(3, 5))
    summary = QualitySummary()
    summary.add(long)
    summary.add(short)
    frames = [[*long.frame_ssim[1 + p :: 4], *short.frame_ssim[1 + p :: 4]] for p in range(4)]
    assert summary.summary()["ssim_by_position"] == pytest.approx([sum(f) / 3 for f in frames])


def test_merged_latent_moments_equal_those_of_all_values():
    parts = [torch.randn((4, t, 3, 5), generator=torch.Generator().manual_seed(t)) * 3 + 7 for t in (1, 4, 2)]
    moments = LatentMoments()
    for part in parts:
        moments.add(part)
    values = torch.cat([p.flatten(1) for p in parts], dim=1).double()
    found = moments.summary()
    assert found["values_per_channel"] == values.shape[1]
    for name, want in {
        "mean": values.mean(1),
        "std": values.std(1, correction=0),
        "min": values.amin(1),
        "max": values.amax(1),
    }.items():
        assert found[name] == pytest.approx(want.tolist())
    with pytest.raises(ValueError, match="5 channels, expected 4"):
        moments.add(torch.zeros(5, 1, 1, 1))


def test_eight_bits_are_clamped_and_rounded():
    video = torch.tensor([-0.7, -0.5, 0.0, 0.5 - 0.6 / 255, 0.5 - 0.4 / 255, 0.5, 9.0])
    assert eight_bits(video, (-0.5, 0.5)).tolist() == [0, 0, 128, 254, 255, 255, 255]


@pytest.mark.parametrize("ends", [(9,), (5, 9), (1, 5, 9)])
def test_a_round_trip_in_chunks_equals_that_of_the_whole_clip(ends):
    vae = model.load("leanvae", config=TINY_NETWORK, untrained=0)
    video = noise(0, 9, 32)
    float_video = video[None].float() / 255 - 0.5
    latent = vae.encode(float_video)[0].mean
    want = eight_bits(vae.decode(latent)[0], (-0.5, 0.5))[0]
    trip, start, steps = RoundTrip(vae), 0, []
    for end in ends:
        steps.append(trip.push_rgb(video[:, start:end], last=end == 9))
        start = end
    assert torch.equal(torch.cat([s.original_CTHW for s in steps], dim=1), video)
    # the clip's own pixels differ in the last bit of a float, so one of a thousand may round the other way
    difference = (torch.cat([s.reconstruction_CTHW for s in steps], dim=1).int() - want.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-3
    assert torch.allclose(torch.cat([s.latent_Cthw for s in steps], dim=1), latent[0], atol=1e-5)


def test_planes_are_encoded_as_in_a_build_and_the_original_is_the_network_input():
    vae = model.load("leanvae", config=TINY_NETWORK, untrained=0)
    planes = torch.randint(16, 236, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    planes[:, :, :8, :8] = torch.tensor([81, 90, 240], dtype=torch.uint8)[:, None, None]  # BT.601 red
    step = RoundTrip(vae).push_planes(planes, "bt601", last=True)
    assert torch.equal(step.latent_Cthw, vae.encode_planes(planes[None], ["bt601"])[0].mean[0])
    red = step.original_CTHW[:, :, :8, :8].float().mean((1, 2, 3))
    assert red.tolist() == pytest.approx([254, 0, 0], abs=1.5)


def test_held_back_frames_are_paired_with_their_originals():
    class Late:
        """Network with one frame per latent that returns each a chunk later; its arithmetic is `2 * frames`."""

        def __init__(self, chunking):
            self.decode_chunking, self.device, self.input_dtype = chunking, torch.device("cpu"), torch.float32
            self.spec = type("Spec", (), {"value_range": (0.0, 1.0), "network": "late"})()

        def encode(self, video, state):
            return type("P", (), {"mean": video})(), None

        def decode(self, latent, held, *, last):
            frames = latent if held is None else torch.cat([held, latent], dim=2)
            return (frames, None) if last else (frames[:, :, :-1], frames[:, :, -1:])

    video = noise(0, 9)
    for chunking, came in (("rounding", [4, 3, 2]), ("none", [0, 0, 9])):
        trip = RoundTrip(Late(chunking))
        steps = [trip.push_rgb(video[:, a:b], last=b == 9) for a, b in ((0, 5), (5, 8), (8, 9))]
        assert [s.reconstruction_CTHW.shape[1] for s in steps] == came
        for step in steps:
            assert torch.equal(step.original_CTHW, step.reconstruction_CTHW)


def test_non_finite_values_are_an_error():
    vae = model.load("leanvae", config=TINY_NETWORK, untrained=0)
    trip = RoundTrip(vae)
    trip._vae.encode = lambda video, state: (type("P", (), {"mean": torch.full((1, 4, 2, 4, 4), math.nan)})(), None)
    with pytest.raises(FloatingPointError, match="latents that are not finite"):
        trip.push_rgb(noise(0, 5, 32), last=True)


@pytest.mark.parametrize(("frames", "shown"), [(1, [0]), (9, [0, 4, 8]), (17, [0, 8, 16]), (81, [0, 32, 80])])
def test_the_frame_sampler_keeps_frames_spread_over_clips_of_any_length(frames, shown):
    sampler, clip = FrameSampler(), flat(*range(frames))
    for start in range(0, frames, 4):
        sampler.add(clip[:, start : start + 4], clip[:, start : start + 4])
    original, other = sampler.frames(3)
    assert original[0, :, 0, 0].tolist() == other[0, :, 0, 0].tolist() == shown
    assert len(sampler._frames) <= KEPT_FRAMES


def test_the_selection_keeps_worst_median_and_best():
    clips = {f"clip {i}": float(i) for i in range(21)}
    orders = [list(clips), list(reversed(clips))]
    for order in orders:
        selection = ExampleSelection(2)
        for name in order:
            selection.offer(clips[name], name, name.upper(), (flat(1), flat(2)))
        assert [(label, shown.score) for label, shown in selection.chosen()] == [
            *(("worst", 0), ("worst", 1), ("median", 10), ("median", 11), ("best", 19), ("best", 20))
        ]
        assert selection.chosen()[0][1].title == "CLIP 0"
    alone = ExampleSelection(3)
    alone.offer(1.0, "one", "one", (flat(1), flat(2)))
    assert [label for label, _ in alone.chosen()] == ["worst"]


def test_the_selection_keeps_few_clips_independent_of_order():
    names = [f"clip {i}" for i in range(500)]
    first, second = ExampleSelection(), ExampleSelection()
    for name in names:
        first.offer(float(name[5:]), name, name, (flat(1), flat(2)))
    for name in reversed(names):
        second.offer(float(name[5:]), name, name, (flat(1), flat(2)))
    assert len(first._sample) == SAMPLE
    assert [s.name for _, s in first.chosen()] == [s.name for _, s in second.chosen()]
    middle = [s.score for label, s in first.chosen() if label == "median"]
    assert all(100 < score < 400 for score in middle)


def test_large_frames_are_reduced():
    sampler = FrameSampler()
    clip = torch.full((3, 1, 400, 800), 9, dtype=torch.uint8)
    sampler.add(clip, clip)
    assert sampler.frames()[0].shape == (3, 1, 192, 384)
    assert (sampler.frames()[0] == 9).all()
