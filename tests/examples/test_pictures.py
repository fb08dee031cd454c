"""Pictures of a training run: what a run on latents of real videos leaves, and constants that are undone."""

from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from examples import pictures
from examples.train_dit import Options, train
from pipeline.operate.publish import PublishOptions, publish
from pipeline.storage.local import LocalStore
from tests.tiny_corpus import tiny_job, video_bytes


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run of two steps on clips of five frames of a real video."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "film.mp4").write_bytes(video_bytes(21))
    (folder / "film.txt").write_text("a film")
    pipeline.encode(tiny_job(str(folder / "film.mp4"), folder / "out"))
    publish(LocalStore(str(folder / "out")), PublishOptions())
    sizes = {"width": 32, "depth": 1, "heads": 2}
    train(Options(str(folder / "out"), str(folder / "run"), steps=2, batch=2, samples=2, normalize="none", **sizes))
    return folder / "run"


def test_a_run_leaves_videos_a_sheet_and_a_loss_curve(run):
    with av.open(str(run / "samples" / "1.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 8
    assert np.stack(frames).shape == (5, 32, 32, 3)
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["0.mp4", "1.mp4"]
    with Image.open(run / "samples.png") as sheet, Image.open(run / "loss.png") as curve:
        assert sheet.height > 2 * 32
        assert curve.size > (400, 200)


def test_constants_that_the_loader_applies_are_undone(output):
    dataset = pipeline.LatentDataset.open(str(output))
    applied, stored = (
        next(iter(pipeline.LatentLoader(dataset, batch=4, normalize=normalize))).latents
        for normalize in ("model", "none")
    )
    assert not torch.allclose(applied.float(), stored.float(), atol=0.1)
    found = torch.stack([pictures.denormalised(latent.float(), dataset.spec) for latent in applied])
    torch.testing.assert_close(found, stored.float(), rtol=1e-2, atol=1e-2)


def test_constants_of_channels_are_undone():
    latent_CTHW = torch.randn(2, 1, 2, 2)
    spec = SimpleNamespace(mean=(1.0, 2.0), std=(3.0, 0.5))
    applied = torch.stack([(latent_CTHW[0] - 1.0) / 3.0, (latent_CTHW[1] - 2.0) / 0.5])
    torch.testing.assert_close(pictures.denormalised(applied, spec), latent_CTHW)


def test_a_film_has_the_frames_and_the_rate_it_was_given(tmp_path):
    video_3THW = torch.full((3, 4, 16, 32), 200, dtype=torch.uint8)
    pictures.write_mp4(tmp_path / "grey.mp4", video_3THW, 30000 / 1001)
    with av.open(str(tmp_path / "grey.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == Fraction(30000, 1001)
    assert abs(np.stack(frames).astype(int) - 200).max() <= 3
