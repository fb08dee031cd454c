"""`examples/dit.py` and `examples/flow.py`: arithmetic of the network, and random numbers that follow a latent, not its batch."""

import pytest
import torch

from examples.dit import (
    NO_CAPTION,
    PADDING,
    DiT,
    DiTConfig,
    caption_words,
    from_patches,
    rotated,
    rotations,
    to_patches,
)
from examples.flow import draw, sample

CPU = torch.device("cpu")
CONFIG = DiTConfig(4, width=32, depth=2, heads=2)


def test_patches_are_put_back_where_they_were():
    latent_BCTHW = torch.randn(2, 3, 4, 6, 8)
    patches_BLP = to_patches(latent_BCTHW, (2, 3, 2))
    assert patches_BLP.shape == (2, 2 * 2 * 4, 3 * 2 * 3 * 2)
    assert torch.equal(patches_BLP[0, 5].reshape(3, 2, 3, 2), latent_BCTHW[0, :, :2, 3:6, 2:4])
    assert torch.equal(from_patches(patches_BLP, (2, 3, 2), (2, 2, 4)), latent_BCTHW)


def test_attention_sees_only_the_distance_of_two_tokens():
    grid = (3, 4, 4)
    query_K, key_K = torch.randn(2, 32)
    rotation = rotations(grid, 32, CPU)
    turned = [rotated(values_K.expand(1, 1, 48, 32), rotation).view(*grid, 32) for values_K in (query_K, key_K)]
    one = turned[0][0, 0, 0] @ turned[1][1, 2, 1]
    assert torch.allclose(turned[0][1, 1, 2] @ turned[1][2, 3, 3], one, atol=1e-4)
    assert not torch.allclose(turned[0][1, 1, 2] @ turned[1][2, 3, 2], one, atol=1e-2)


def test_an_untrained_network_is_zero_and_any_size_of_latent_fits():
    network = DiT(CONFIG)
    words_BS = caption_words(["a caption", None], CONFIG.vocabulary)
    for shape in ((2, 4, 1, 4, 4), (2, 4, 3, 6, 4)):
        assert torch.equal(network(torch.randn(shape), torch.rand(2), words_BS), torch.zeros(shape))
    with pytest.raises(ValueError, match="3x5x4 frames, rows, columns: expected multiples of the patch"):
        network(torch.zeros(2, 4, 3, 5, 4), torch.rand(2), words_BS)
    with pytest.raises(ValueError, match="width 24: expected a multiple of 16 x 2 heads"):
        DiTConfig(4, width=24, heads=2)


def test_words_of_a_caption_do_not_depend_on_its_neighbours_or_its_case():
    (alone,) = caption_words(["Two Balls"], 100).tolist()
    assert caption_words(["a red ball, far", "two balls.", "", None], 100).tolist()[1:] == [
        [*alone, PADDING, PADDING],
        *[[NO_CAPTION, PADDING, PADDING, PADDING]] * 2,
    ]


def test_draws_of_a_latent_follow_from_seed_step_and_id():
    like = torch.zeros(3, 4, 2, 4, 4)
    together = draw(1, 7, ["a", "b", "c"], like, caption_dropout=0.5)
    alone = draw(1, 7, ["c"], like[:1], caption_dropout=0.5)
    assert torch.equal(alone.noise_BCTHW[0], together.noise_BCTHW[2])
    assert (alone.time_B[0], alone.drop[0]) == (together.time_B[2], together.drop[2])
    for seed, step in ((1, 8), (2, 7)):
        assert not torch.equal(draw(seed, step, ["c"], like[:1], 0.5).noise_BCTHW, alone.noise_BCTHW)
    many = draw(0, 0, [str(n) for n in range(400)], torch.zeros(400, 1, 1, 1, 1), caption_dropout=0.25)
    assert 60 < sum(many.drop) < 140
    assert 0 < many.time_B.min() < 0.3 < 0.7 < many.time_B.max() < 1


def test_sampling_follows_the_velocity_to_the_latent():
    """With the exact velocity of a single latent, Euler's method arrives at it from any noise."""
    latent_BCTHW = torch.randn(1, 4, 2, 4, 4)

    def velocity(noisy_BCTHW, time_B, words_BS):
        return (noisy_BCTHW - latent_BCTHW) / time_B.view(-1, 1, 1, 1, 1)

    found_BCTHW = sample(velocity, ["one", "other"], (4, 2, 4, 4), 100, CPU, steps=4)
    torch.testing.assert_close(found_BCTHW, latent_BCTHW.expand(2, -1, -1, -1, -1))
