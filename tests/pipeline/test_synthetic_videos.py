"""Synthetic videos: pure functions of (seed, index) with the statistics of natural video."""

import itertools

import numpy as np
import pytest
import torch

from pipeline.synthetic_videos import clips, colours, fields, leaves, lettering, motion, optics, shapes, warping
from pipeline.synthetic_videos.clips import SyntheticVideos, clip

SAMPLE = 64  # clips of 9 x 64 x 64 the statistics are taken over


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def sample():
    """Float videos `(N, T, H, W, 3)` in [0, 1]."""
    return np.stack([clip(2, index, 9, 64, 64).permute(1, 2, 3, 0).numpy() for index in range(SAMPLE)]) / np.float32(
        255
    )


@pytest.fixture(scope="module")
def grey(sample):
    return sample @ colours.LUMA


def test_a_clip_is_uint8_rgb_of_the_requested_size():
    for frames, height, width in [(17, 48, 80), (1, 64, 64), (5, 33, 50), (2, 16, 16)]:
        video = clip(0, 3, frames, height, width)
        assert video.shape == (3, frames, height, width)
        assert video.dtype == torch.uint8
        assert video.is_contiguous()


def test_a_clip_is_a_pure_function_of_its_arguments():
    first = [clip(7, index, 5, 48, 48) for index in range(8)]
    torch.manual_seed(1)
    np.random.seed(1)  # global random state must not matter
    again = [clip(7, index, 5, 48, 48) for index in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in itertools.combinations([*first, clip(8, 0, 5, 48, 48)], 2):
        assert not torch.equal(a, b)


def test_threads_do_not_change_a_bit():
    alone = clip(7, 1, 9, 64, 64)
    torch.set_num_threads(2)
    try:
        together = clip(7, 1, 9, 64, 64)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, together)


def test_ranks_share_the_sequence_and_resume():
    whole = list(itertools.islice(SyntheticVideos(3, 2, 32, 32), 8))
    ranks = [itertools.islice(SyntheticVideos(3, 2, 32, 32, start=rank, stride=2), 4) for rank in range(2)]
    woven = [video for pair in zip(*ranks, strict=True) for video in pair]
    resumed = list(itertools.islice(SyntheticVideos(3, 2, 32, 32, start=1 + 2 * 2, stride=2), 2))
    assert all(torch.equal(a, b) for a, b in zip(whole, woven, strict=True))
    assert torch.equal(resumed[0], whole[5])
    assert torch.equal(resumed[1], whole[7])


@pytest.mark.parametrize(
    "arguments", [(-1, 0, 5, 32, 32), (0, -1, 5, 32, 32), (0, 0, 0, 32, 32), (0, 0, 5, 15, 32), (0, 0, 5, 32, 8)]
)
def test_impossible_clip_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="got"):
        clip(*arguments)


def test_impossible_videos_are_refused_on_construction():
    with pytest.raises(ValueError, match="stride must be at least 1; got 0"):
        SyntheticVideos(0, 5, 32, 32, stride=0)
    with pytest.raises(ValueError, match="at least 1 frame"):
        SyntheticVideos(0, 5, 32, 8)


def test_spatial_power_falls_as_in_natural_images(grey):
    """Power 1/f^2 is the rule for photographs, up to 1/f^3 for compressed and scaled video; white noise has slope 0."""
    side = grey.shape[-1]
    window = np.hanning(side)[:, None] * np.hanning(side)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    edges = np.geomspace(0.03, 0.35, 8)  # cycles per pixel
    slopes = []
    for frame in grey[:, 0]:
        if frame.std() < 0.01:
            continue  # an empty scene has no slope
        power = np.abs(np.fft.fft2((frame - frame.mean()) * window)) ** 2
        rings = [power[(frequency >= low) & (frequency < high)].mean() for low, high in itertools.pairwise(edges)]
        slopes.append(np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(rings), 1)[0])
    assert len(slopes) > 0.9 * SAMPLE
    assert -3.4 < np.mean(slopes) < -2.0
    assert np.std(slopes) < 1.2


def test_details_are_rare_and_strong(grey):
    """Haar details have heavy tails: kurtosis far above a Gaussian's 3 (Field 1987; Mallat 1989)."""
    rows = grey[:, 0, ::2, ::2] - grey[:, 0, 1::2, ::2]
    columns = grey[:, 0, ::2, ::2] - grey[:, 0, ::2, 1::2]
    kurtosis = [
        (d**4).mean() / (d**2).mean() ** 2 for pair in zip(rows, columns, strict=True) for d in pair if d.std() > 1e-3
    ]
    assert np.median(kurtosis) > 8
    assert np.quantile(kurtosis, 0.1) > 3


def test_frames_change_less_than_they_contain(grey):
    change = np.abs(np.diff(grey, axis=1)).mean((1, 2, 3))
    contrast = grey.std((2, 3)).mean(1)
    assert np.median(change / (contrast + 1e-3)) < 0.3
    assert np.mean(change < contrast) > 0.9


def test_light_differs_between_clips_and_uses_the_range(grey):
    means = grey.mean((1, 2, 3))
    assert 0.25 < means.mean() < 0.6
    assert means.std() > 0.12
    assert (means < 0.2).any()
    assert (means > 0.6).any()
    assert np.quantile(grey, 0.02) < 0.05
    assert np.quantile(grey, 0.98) > 0.9


def test_colour_channels_are_correlated(sample):
    """Achromatic spread is largest, then blue-yellow, then red-green (Ruderman, Cronin and Chiao 1998)."""
    pixels = (sample - sample.mean((1, 2, 3), keepdims=True))[:, ::4, ::2, ::2].reshape(-1, 3)
    grey_sd, blue_yellow, red_green = (pixels @ colours.AXES).std(0)
    assert grey_sd > 3 * blue_yellow
    assert blue_yellow > red_green > 0.005


def test_some_clips_are_still_and_most_move(grey):
    still = (np.abs(np.diff(grey, axis=1)).max((1, 2, 3)) == 0).mean()
    assert 0.01 < still < 0.25


def test_clips_with_cuts_hold_two_scenes(monkeypatch):
    monkeypatch.setattr(clips, "_CUT", 100.0)  # every clip that moves
    monkeypatch.setattr(clips, "_STATIC", 0.0)
    jumps = []
    for index in range(16):
        video = clip(4, index, 9, 32, 32).float() / 255
        change = (video[:, 1:] - video[:, :-1]).abs().mean((0, 2, 3))
        jumps.append(bool(change.max() > max(6 * change.median(), 0.06)))
    assert 6 <= sum(jumps) < 16  # the others dissolve or fade


def test_a_clip_where_nothing_moves_repeats_one_frame(monkeypatch):
    monkeypatch.setattr(clips, "_STATIC", 1.0)
    for index in range(6):
        video = clip(4, index, 5, 32, 32)
        assert torch.equal(video, video[:, :1].expand(-1, 5, -1, -1))


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_a_field_has_the_requested_slope(exponent):
    field = fields.power_field(np.random.default_rng(0), (128, 128), exponent)
    power = np.abs(np.fft.fft2(field)) ** 2
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None])
    inside = (frequency > 0) & (frequency < 0.5)
    slope = np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1)[0]
    assert slope == pytest.approx(-2 * exponent, abs=0.1)
    assert field.mean() == pytest.approx(0, abs=1e-5)
    assert field.std() == pytest.approx(1, abs=1e-4)


def test_sizes_of_leaves_fall_as_the_cube():
    radii = leaves.radii(np.random.default_rng(0), 200_000, 2, 64)
    assert radii.min() >= 2
    assert radii.max() <= 64
    # density r^-3: three quarters are smaller than twice the smallest, of what is left three quarters again
    low = 1 / (1 - (2 / 64) ** 2)
    assert (radii < 4).mean() == pytest.approx(0.75 * low, abs=0.005)
    assert (radii[radii >= 4] < 8).mean() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_shapes_stay_within_their_radius_and_have_soft_edges(kind):
    rng = np.random.default_rng(5)
    y, x = np.mgrid[-30:31, -30:31].astype(np.float32)
    for _ in range(20):
        shape = shapes.random_shape(rng, 20.0, (kind,))
        mask = shapes.coverage(shapes.signed_distance(shape, y, x), 2.0)
        assert mask.dtype == np.float32
        assert mask.max() > 0.4
        assert mask.min() == 0
        assert ((mask > 0.02) & (mask < 0.98)).any()
        if kind != "stroke":  # which bends
            assert mask[np.hypot(y, x) > 23].max() == 0


def test_a_canvas_appears_where_its_map_puts_it():
    canvas = torch.zeros(4, 24, 24)
    canvas[:, 8:16, 8:16] = 1
    maps = np.stack([np.diag([0.5, 0.5, 1.0]) for _ in range(2)])
    maps[1, :2, 2] = (4, -2)  # 4 right, 2 up
    frames = torch.zeros(2, 3, 16, 20)
    warping.lay_over(frames, canvas, maps)
    expected = torch.zeros(2, 16, 20)
    expected[0, 6:10, 8:12] = 1
    expected[1, 4:8, 12:16] = 1
    assert torch.equal(frames, expected[:, None].expand(-1, 3, -1, -1))


def test_nearer_layers_move_more_with_the_camera():
    course = motion.Trajectory(np.array([[0.0, 0.0], [10.0, -4.0]]), np.zeros(2), np.zeros(2))
    assert course.maps(depth=0.5)[1, :2, 2].tolist() == [5.0, -2.0]
    turned = motion.Trajectory(np.zeros((1, 2)), np.array([np.pi / 2]), np.array([np.log(2.0)])).maps(about=(3.0, 0.0))[
        0
    ]
    assert turned @ [3, 0, 1] == pytest.approx([3, 0, 1])
    assert turned @ [4, 0, 1] == pytest.approx([3, 2, 1])
    moving = [course.maps(), motion.resting(2).maps()]
    assert motion.fastest(moving, 1, 0.0) == 10.0


def test_optical_effects_have_their_documented_effect():
    torch.manual_seed(0)
    frames = torch.rand(2, 3, 20, 28)
    flat = torch.full((1, 3, 20, 28), 0.25)
    assert optics.gaussian(flat, 1.3) == pytest.approx(flat, abs=1e-6)
    assert optics.gaussian(frames, 1.3).std() < 0.5 * frames.std()
    assert optics.soften_chroma(frames).shape == frames.shape
    assert optics.soften_chroma(frames).std() < frames.std()
    assert (optics.soften_chroma(flat) - flat).abs().max() < 1e-6
    assert (optics.quantise(frames, 1e-6) - frames).abs().max() < 1e-5  # the transform is orthonormal
    coarse = optics.quantise(frames, 0.2)
    # steps of 0.2 to 1.6 wipe out most of white noise with deviation 0.29, and no more than all of it
    assert 0.05 < (coarse - frames).std() < frames.std()


def test_letters_fit_the_given_size():
    for height, widest in [(7, 40), (15, 200), (31, 64)]:
        mask = lettering.lettering(np.random.default_rng(1), height, widest)
        assert mask.shape[1] <= max(widest, 7 * height / 7)
        assert (mask.min(), mask.max()) == (0, 1)
