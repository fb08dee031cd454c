"""LPIPS compared with its formula, its files and refusals; the pyramid on hand-made images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model.metrics import perceptual
from tests.model.waves import wave, wave_weights


def vgg_and_heads(seed=0):
    """Random weights under the published names: torchvision's convolutions, the lpips package's heads."""
    draw = torch.Generator().manual_seed(seed)
    features, channels, index = {}, 3, 0
    for entry in perceptual.VGG16:
        if isinstance(entry, int):
            spread = (2 / (9 * channels)) ** 0.5
            features[f"features.{index}.weight"] = torch.randn(entry, channels, 3, 3, generator=draw) * spread
            features[f"features.{index}.bias"] = 0.1 * torch.randn(entry, generator=draw)
            channels, index = entry, index + 2
        else:
            index += 1
    widths = enumerate((64, 128, 256, 512, 512))
    return features, {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1, generator=draw) for k, width in widths}


@pytest.fixture(scope="module")
def files():
    return vgg_and_heads()


def plain_lpips(x, y, features, heads):
    """The formula of the papers, layer by layer."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((part - shift[:, None, None]) / scale[:, None, None] for part in (x, y))
    total, conv = 0.0, 0
    for block, convs in enumerate((2, 2, 3, 3, 3)):
        if block:
            x, y, conv = F.max_pool2d(x, 2), F.max_pool2d(y, 2), conv + 1
        for _ in range(convs):
            weight, bias = features[f"features.{conv}.weight"], features[f"features.{conv}.bias"]
            x, y = (F.relu(F.conv2d(part, weight, bias, padding=1)) for part in (x, y))
            conv += 2
        normed = [part / ((part**2).sum(1, keepdim=True) ** 0.5 + 1e-10) for part in (x, y)]
        total = total + F.conv2d((normed[0] - normed[1]) ** 2, heads[f"lin{block}.model.1.weight"]).mean((1, 2, 3))
    return total


def test_lpips_equals_its_formula(files):
    network = perceptual.lpips_from_state_dict(files[0] | files[1])
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 16, 32, generator=draw) * 2 - 1 for _ in range(2))
    y.requires_grad_()
    distance = network(x, y)
    assert torch.allclose(distance, plain_lpips(x, y.detach(), *files), rtol=1e-4)
    distance.sum().backward()
    assert y.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network(x, x).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("backbone", "published"),
    [("vgg", (2.8029727935791016, 2.528829336166382)), ("alex", (1.277819275856018, 1.3294761180877686))],
)
def test_lpips_gives_the_published_packages_distances(backbone, published):
    """Numbers of lpips 0.1.4 with torchvision 0.28's networks, these weights and images; AlexNet with spatial=True, then the mean."""

    def scaled(key, values):
        if values.ndim > 1 and values.shape[0] > 1:
            return values * (2 / values[0].numel()) ** 0.5
        return values.abs() if key.startswith("heads") else 0.1 * values

    network = perceptual.LPIPS(backbone)
    network.load_state_dict(wave_weights({key: v.shape for key, v in network.state_dict().items()}, scaled))
    with torch.inference_mode():
        distances = network(*((wave((2, 3, 48, 64), phase) / 2).float() for phase in (0, 1)))
    assert distances.tolist() == pytest.approx(published, rel=1e-5)


def test_lpips_takes_alexnet_only_where_it_is_asked_for():
    network = perceptual.LPIPS("alex")
    weights = {perceptual._published(key): value for key, value in network.state_dict().items()}
    assert perceptual.lpips_from_state_dict(weights, backbones=("vgg", "alex")).backbone.label == "LPIPS-Alex"
    with pytest.raises(ValueError, match="do not fit LPIPS-VGG"):
        perceptual.lpips_from_state_dict(weights)
    with pytest.raises(ValueError, match="at least 31"):
        network(torch.zeros(1, 3, 30, 40), torch.zeros(1, 3, 30, 40))
    assert network(torch.zeros(1, 3, 31, 31), torch.zeros(1, 3, 31, 31)).tolist() == [0.0]


def test_lpips_of_black_features_has_a_gradient(files):
    silent = {key: torch.zeros_like(value) for key, value in files[0].items()}
    network = perceptual.lpips_from_state_dict(silent | files[1])
    y = torch.zeros(1, 3, 16, 16, requires_grad=True)
    network(torch.ones(1, 3, 16, 16), y).sum().backward()
    assert torch.isfinite(y.grad).all()


def test_lpips_loads_from_one_file_or_two(files, tmp_path):
    features, heads = files
    small = {key: value for key, value in features.items() if key in ("features.0.weight", "features.0.bias")}
    torch.save(features | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.pth")
    save_file(heads, tmp_path / "heads.safetensors")
    network = perceptual.load_lpips(str(tmp_path / "vgg16.pth"), str(tmp_path / "heads.safetensors"))
    assert torch.equal(network.features[0].weight, features["features.0.weight"])
    assert torch.equal(network.heads[4], heads["lin4.model.1.weight"])
    with pytest.raises(ValueError, match=r"do not fit LPIPS-VGG: 5 missing: lin0\.model\.1\.weight"):
        perceptual.load_lpips(str(tmp_path / "vgg16.pth"))
    save_file(small, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match="24 missing"):
        perceptual.load_lpips(str(tmp_path / "part.safetensors"), str(tmp_path / "heads.safetensors"))


def test_lpips_loads_the_packages_state_dict(files):
    starts, whole = (0, 4, 9, 16, 23), {}
    for key, value in files[0].items():
        _, index, kind = key.split(".")
        whole[f"net.slice{sum(start <= int(index) for start in starts)}.{index}.{kind}"] = value
    whole |= files[1] | {f"lins.{key.removeprefix('lin')}": value for key, value in files[1].items()}
    whole["scaling_layer.shift"] = torch.zeros(1, 3, 1, 1)
    network = perceptual.lpips_from_state_dict(whole)
    assert torch.equal(network.features[28].bias, files[0]["features.28.bias"])


def test_lpips_refuses_files_that_do_not_match(files):
    features, heads = files
    with pytest.raises(ValueError, match="extra: surprise"):
        perceptual.lpips_from_state_dict(features | heads | {"surprise": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"misshapen: lin2\.model\.1\.weight is \(1, 4, 1, 1\)"):
        perceptual.lpips_from_state_dict(features | heads | {"lin2.model.1.weight": torch.zeros(1, 4, 1, 1)})
    with pytest.raises(ValueError, match="NaN"):
        perceptual.lpips_from_state_dict(features | heads | {"features.0.bias": torch.full((64,), torch.nan)})


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ((1, 3, 16, 16), (2, 3, 16, 16), "same shape"),
        ((1, 1, 16, 16), (1, 1, 16, 16), "same shape"),
        ((1, 3, 8, 16), (1, 3, 8, 16), "at least 16"),
    ],
)
def test_lpips_refuses_invalid_images(one, other, message):
    with pytest.raises(ValueError, match=message):
        perceptual.LPIPS()(torch.zeros(one), torch.zeros(other))


def test_pyramid_weights_every_level_equally():
    x = torch.zeros(2, 3, 8, 8)
    flat = x + torch.tensor([0.5, 0.0])[:, None, None, None]
    assert perceptual.pyramid_distance(x, flat).tolist() == [0.5, 0.0]  # no detail differs, only the last means
    columns = torch.tensor([1.0, -1.0]).repeat(4).expand(2, 3, 8, 8)
    assert perceptual.pyramid_distance(x, columns).tolist() == [1.0, 1.0]  # all of it in the finest band
    halves = torch.tensor([1.0, -1.0]).repeat_interleave(4).expand(2, 3, 8, 8)
    assert perceptual.pyramid_distance(x, halves).tolist() == [1.0, 1.0]  # all of it in the coarsest band


def test_pyramid_refuses_indivisible_sizes():
    with pytest.raises(ValueError, match="multiples of 8"):
        perceptual.pyramid_distance(torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match="at least one level"):
        perceptual.pyramid_distance(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), levels=0)
