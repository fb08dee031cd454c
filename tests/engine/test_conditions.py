"""Conditions of image-to-video models, chunk by chunk: the bits of encoding them at once, with settled zeros copied, in every network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.colour import yuv_to_video
from pipeline.config import ModelConfig
from pipeline.encoder import Encoder
from pipeline.encoder.clip_states import ClipStates
from pipeline.encoder.conditions import Conditions
from pipeline.encoder.staging import HostStaging
from pipeline.records import FrameChunk
from tests.model.test_identity import network
from tests.tiny_corpus import TINY_NETWORK

CHUNKS = {"leanvae": 9, "wfvae": 11, "ivvae": 6, "wan-2.1": 13, "svd": 4}
"""Chunks of two groups of which the last repeat, for a tiny network of each family."""


pytestmark = pytest.mark.usefixtures("single_thread")


def clip(seed, spec, count):
    """Chunks of two groups of frames, the first with the lead frames besides, one latent pixel high."""
    rng, chunks = np.random.default_rng(seed), []
    for n in range(count):
        frames = 2 * spec.time_stride + spec.lead_frames * (n == 0)
        planes = rng.integers(16, 235, (frames, 3, spec.space_stride, 2 * spec.space_stride), np.uint8)
        chunks.append(FrameChunk(seed, planes, (0.0,) * frames, "bt709", n == 0, n == count - 1))
    return chunks


def at_once(vae, chunks):
    """The condition encoded in one piece."""
    planes = np.concatenate([chunk.planes_T3HW for chunk in chunks])
    video = yuv_to_video(torch.from_numpy(planes)[None], ["bt709"], vae.spec.value_range)
    video[:, :, 1:] = 0
    with torch.inference_mode():
        return vae.encode(video)[0].mean[0].float().numpy()


@pytest.mark.parametrize("name", CHUNKS)
def test_settled_zeros_are_copied_with_the_bits_of_encoding_all(name):
    vae = network(name)
    conditions, chunks = Conditions(vae, HostStaging(), ClipStates(vae, HostStaging())), clip(0, vae.spec, CHUNKS[name])
    before, parts = [None], []
    for chunk in chunks:
        with torch.inference_mode():
            before, results = conditions.launch([chunk], torch.from_numpy(chunk.planes_T3HW)[None], before)
        parts += results()
    assert before == [None]
    assert conditions.computed < len(chunks), "zeros settled"
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), at_once(vae, chunks))


def test_a_clip_that_reaches_the_settled_state_of_another_computes_no_further_chunk():
    encoder = Encoder(ModelConfig(name="leanvae", config=TINY_NETWORK, untrained=0), "cpu", "float32", conditions=True)
    first, second, third = (clip(seed, encoder.spec, 10) for seed in range(3))
    computed, found = [], {}
    for clips in ([first], [second, third]):
        states, before = [None] * len(clips), encoder._conditions.computed
        for chunks in zip(*clips, strict=True):
            launched = encoder.launch(chunks, states)
            states = launched.states
            for chunk, result in zip(chunks, launched.results(), strict=True):
                found.setdefault(chunk.clip, []).append(result.cond_Cthw)
        computed.append((encoder._conditions.computed - before) // len(clips))
    assert computed[1] + 1 == computed[0] < len(first)
    for chunks in (first, second, third):
        got = np.concatenate(found[chunks[0].clip], axis=1)
        np.testing.assert_array_equal(got, at_once(encoder._vae, chunks))


def test_a_longer_or_shorter_chunk_goes_on_in_the_same_period():
    """The last chunk of a clip is shorter; one that is too large for memory is encoded in two parts."""
    vae = network("leanvae")
    conditions, chunks = Conditions(vae, HostStaging(), ClipStates(vae, HostStaging())), clip(5, vae.spec, 12)
    before, parts = [None], []
    for frames in [8] * 9 + [12, 4, 8]:
        first = not parts
        planes = np.zeros((frames + first, *chunks[0].planes_T3HW.shape[1:]), np.uint8)
        planes[:1] = chunks[0].planes_T3HW[:1]
        chunk = FrameChunk(0, planes, (0.0,) * len(planes), "bt709", first, last=False)
        with torch.inference_mode():
            before, results = conditions.launch([chunk], torch.from_numpy(planes)[None], before)
        parts += results()
    assert before[0].repeated is not None
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), at_once(vae, chunks))
