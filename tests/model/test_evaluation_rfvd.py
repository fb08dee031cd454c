"""rFVD: distance of Gaussians by hand, windows, and I3D with weights written under its published names."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchmetrics.image.fid import _compute_fid

from model.metrics.frechet import FeatureMoments, VideoDistance, WindowFeatures, frechet_distance
from model.metrics.i3d import (
    I3D,
    PROTOCOLS,
    i3d_from_state_dict,
    load_i3d,
    pad_same,
    pool_same,
    to_i3d_input,
)
from tests.model.waves import wave, wave_weights


def spread(seed, rows=50, width=6):
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distances_of_diagonal_gaussians_equal_hand_computed_values():
    # one dimension: (m - m')^2 + (s - s')^2 with standard deviations s
    mean, other = torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, 2.0]).double()
    covariance, wider = torch.diag(torch.tensor([4.0, 9.0]).double()), torch.diag(torch.tensor([25.0, 9.0]).double())
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(mean, covariance, other, covariance) == pytest.approx(9)
    assert frechet_distance(mean, covariance, other, wider) == pytest.approx(9 + (2 - 5) ** 2)
    flat = torch.diag(torch.tensor([0.0, 9.0]).double())  # singular
    assert frechet_distance(mean, covariance, mean, flat) == pytest.approx(4)


def test_distances_agree_with_torchmetrics():
    found = []
    for rows in (spread(0), spread(1) @ spread(2, 6, 6) + 3):
        moments = FeatureMoments(6)
        moments.add(rows[:7])
        moments.add(rows[7:])
        mean, covariance = moments.mean_and_covariance()
        assert torch.allclose(mean, rows.mean(0))
        assert torch.allclose(covariance, torch.cov(rows.T))
        found += [mean, covariance]
    assert frechet_distance(*found) == pytest.approx(_compute_fid(*found).item(), rel=1e-9)


def test_covariance_of_one_row_is_refused():
    moments = FeatureMoments(6)
    moments.add(spread(0, 1))
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        moments.mean_and_covariance()


def test_windows_have_sixteen_frames_and_remaining_frames_are_dropped():
    seen = []

    def network(window_NCTHW):
        seen.append(window_NCTHW)
        return window_NCTHW.mean((3, 4)).reshape(1, -1)[:, :400].repeat(1, 9)[:, :400]

    video = torch.arange(37, dtype=torch.uint8)[None, :, None, None].expand(3, -1, 12, 20).contiguous()
    features = WindowFeatures(network)
    for start in range(0, 37, 5):
        features.add(video[:, start : start + 5], video[:, start : start + 5] + 100)
    assert [len(features.original), len(features.other), len(seen)] == [2, 2, 4]
    assert seen[0].shape == (1, 3, 16, 224, 224)
    starts = [(window[0, 0, 0, 0, 0].item() + 1) * 127.5 for window in seen]
    assert starts == pytest.approx([0, 100, 16, 116], abs=1e-3)
    distance = VideoDistance()
    nothing = {"protocol": "tf", "rfvd": None, "pair_distance": None, "windows": 0, "window_frames": 16}
    assert distance.summary() == nothing
    distance.add(features)
    found = distance.summary()
    assert found["windows"] == 2
    shift = torch.cat(features.other).double().mean(0) - torch.cat(features.original).double().mean(0)
    assert found["rfvd"] == pytest.approx(shift.square().sum().item(), rel=1e-6)  # moved, not spread otherwise
    assert found["pair_distance"] == pytest.approx(found["rfvd"], rel=1e-6)


def test_frames_are_resized_whole_and_scaled():
    video = torch.zeros((1, 3, 1, 10, 30), dtype=torch.uint8)
    video[:, :, :, :, 15:] = 255
    found = to_i3d_input(video)
    assert found.shape == (1, 3, 1, 224, 224)
    assert found[..., 0, 0].unique().item() == -1
    assert found[..., 0, -1].unique().item() == 1
    assert found[0, 0, 0, 0].mean() == pytest.approx(0, abs=1e-6)


def test_same_padding_puts_the_odd_zero_at_the_end():
    line = torch.arange(1.0, 6.0).reshape(1, 1, 1, 1, 5)
    assert pad_same(line, (1, 1, 7), (1, 1, 2)).flatten().tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 0, 0, 0]
    assert pad_same(line[..., :4], (1, 1, 7), (1, 1, 2)).flatten().tolist() == [0, 0, 1, 2, 3, 4, 0, 0, 0]
    assert pool_same(line, (1, 1, 2), (1, 1, 2)).flatten().tolist() == [2, 4, 5]


def test_the_short_side_becomes_224_and_the_centre_is_cropped():
    video = torch.zeros((1, 3, 1, 10, 30), dtype=torch.uint8)
    video[:, :, :, :, 15:] = 255
    found = to_i3d_input(video, whole_frames=False)
    assert found.shape == (1, 3, 1, 224, 224)
    # 30 columns become 672, of which 224 to 447 are taken: the edge at 336 is their middle
    assert found[0, 0, 0, 0, [0, 100, 123, 223]].tolist() == [-1, -1, 1, 1]
    assert found[0, 0, 0, 0].mean() == pytest.approx(0, abs=1e-6)


def test_a_whole_clip_is_one_video_if_it_is_long_enough():
    def network(video_NCTHW):
        return torch.full((1, 400), float(video_NCTHW.shape[2]))

    counts = {}
    for frames in (8, 9, 33):
        features = WindowFeatures(network, PROTOCOLS["styleganv"])
        video = torch.zeros((3, frames, 12, 20), dtype=torch.uint8)
        for part in (video[:, :5], video[:, 5:5], video[:, 5:]):
            features.add(part, part)
        assert features.original == []
        features.finish()
        counts[frames] = [float(row[0, 0]) for row in features.original]
    assert counts == {8: [], 9: [9.0], 33: [33.0]}


def test_i3d_gives_the_published_ports_logits():
    """Logits of pytorch_i3d.py in WF-VAE's repository (VideoGPT's), with these weights and this video."""
    published = [3.09086, 5.52229, -4.81998, -7.55179, -0.10055, -7.32194, 12.2636, 12.24224]

    def scaled(key, values):
        if values.ndim > 1:
            return values / values[0].numel() ** 0.5
        if key.endswith("running_var"):
            return 0.02 + 0.01 * values.abs()
        return 0.2 + 0.05 * values if key.endswith("bn.weight") else 0.1 * values

    shapes = {key: value.shape for key, value in I3D().state_dict().items()}
    weights = wave_weights(shapes, scaled)
    weights = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    network = i3d_from_state_dict(weights, PROTOCOLS["videogpt"].norm_epsilon)
    with torch.inference_mode():
        logits = network((wave((1, 3, 9, 224, 224), 0) / 2).float())
    assert logits[0, :8].tolist() == pytest.approx(published, abs=2e-4)
    assert logits.norm().item() == pytest.approx(172.32124, rel=1e-5)


def fresh_weights():
    """Random weights under the published names, written from the network's shapes."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in I3D().state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        drawn = torch.randn(value.shape, generator=generator)
        fan = value[0].numel() if value.ndim > 1 else 1
        weights[key] = drawn / fan**0.5 if value.ndim > 1 else 1 + 0.1 * drawn.abs()
    return weights


def test_the_network_reads_published_names_and_gives_400_logits(tmp_path):
    weights = fresh_weights()
    # names and shapes as in the published port's state_dict
    for key, shape in {
        "Conv3d_1a_7x7.conv3d.weight": (64, 3, 7, 7, 7),
        "Conv3d_2c_3x3.bn.running_var": (192,),
        "Mixed_3b.b1b.conv3d.weight": (128, 96, 3, 3, 3),
        "Mixed_4f.b3b.bn.weight": (128,),
        "Mixed_5c.b0.conv3d.weight": (384, 832, 1, 1, 1),
        "logits.conv3d.weight": (400, 1024, 1, 1, 1),
        "logits.conv3d.bias": (400,),
    }.items():
        assert weights[key].shape == shape
    assert sum(value.numel() for value in weights.values()) == 12_697_264 + running_numbers(weights)
    save_file(weights, tmp_path / "i3d.safetensors")
    torch.save(weights, tmp_path / "i3d.pt")
    network = load_i3d(str(tmp_path / "i3d.safetensors"))
    video = to_i3d_input(torch.randint(0, 256, (1, 3, 9, 32, 32), dtype=torch.uint8))
    with torch.inference_mode():
        logits = network(video)
        assert logits.shape == (1, 400)
        assert logits.isfinite().all()
        assert torch.equal(load_i3d(str(tmp_path / "i3d.pt"))(video), logits)
        # the first unit by hand: same padding of 224 under a window of 7 with stride 2 is 2 before and 3 behind
        unit = network.Conv3d_1a_7x7
        plain = F.conv3d(F.pad(video, (2, 3, 2, 3, 3, 3)), weights["Conv3d_1a_7x7.conv3d.weight"], stride=2)
        scale = weights["Conv3d_1a_7x7.bn.weight"] / (weights["Conv3d_1a_7x7.bn.running_var"] + 1e-3).sqrt()
        moved = weights["Conv3d_1a_7x7.bn.bias"] - weights["Conv3d_1a_7x7.bn.running_mean"] * scale
        by_hand = (plain * scale.view(1, -1, 1, 1, 1) + moved.view(1, -1, 1, 1, 1)).relu()
        assert torch.allclose(unit(video), by_hand, atol=1e-4)


def running_numbers(weights):
    """Means and variances of batch norms, which are not parameters."""
    return sum(value.numel() for key, value in weights.items() if "running_" in key)


def test_files_that_are_not_i3d_are_refused(tmp_path):
    weights = fresh_weights()
    missing = {key: value for key, value in weights.items() if key != "Mixed_4b.b2a.conv3d.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match=r"Mixed_4b\.b2a\.conv3d\.weight"):
        load_i3d(str(tmp_path / "missing.safetensors"))
    wrong = {**weights, "logits.conv3d.bias": torch.zeros(600)}
    save_file(wrong, tmp_path / "classes.safetensors")
    with pytest.raises(ValueError, match=r"logits\.conv3d\.bias"):
        load_i3d(str(tmp_path / "classes.safetensors"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*TorchScript archive:UserWarning")
def test_a_torchscript_program_is_not_run(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "i3d.pt"))
    with pytest.raises(ValueError, match=r"i3d\.pt is not a readable checkpoint .*TorchScript"):
        load_i3d(str(tmp_path / "i3d.pt"))
