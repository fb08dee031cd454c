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
from examples.flow import draw, flow_loss, sample

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
    words_BS = caption_words(["a caption", ""], CONFIG.vocabulary)
    for shape in ((2, 4, 1, 4, 4), (2, 4, 3, 6, 4)):
        assert torch.equal(network(torch.randn(shape), torch.rand(2), words_BS), torch.zeros(shape))
    with pytest.raises(ValueError, match="3x5x4 frames, rows, columns: expected multiples of the patch"):
        network(torch.zeros(2, 4, 3, 5, 4), torch.rand(2), words_BS)
    with pytest.raises(ValueError, match="width 24: expected a multiple of 16 x 2 heads"):
        DiTConfig(4, width=24, heads=2)


def test_words_of_a_caption_do_not_depend_on_its_neighbours_or_its_case():
    (alone,) = caption_words(["Two Balls"], 100).tolist()
    assert caption_words(["a red ball, far", "two balls.", ""], 100).tolist()[1:] == [
        [*alone, PADDING, PADDING],
        [NO_CAPTION, PADDING, PADDING, PADDING],
    ]


def test_draws_of_a_latent_follow_from_seed_step_and_id():
    like = torch.zeros(3, 4, 2, 4, 4)
    noise_BCTHW, time_B = draw(1, 7, ["a", "b", "c"], like)
    alone_BCTHW, alone_B = draw(1, 7, ["c"], like[:1])
    assert torch.equal(alone_BCTHW[0], noise_BCTHW[2])
    assert alone_B[0] == time_B[2]
    for seed, step in ((1, 8), (2, 7)):
        assert not torch.equal(draw(seed, step, ["c"], like[:1])[0], alone_BCTHW)
    _, times_B = draw(0, 0, [str(n) for n in range(400)], torch.zeros(400, 1, 1, 1, 1))
    assert 0 < times_B.min() < 0.5 < times_B.median() < 0.9 < times_B.max() < 1


def test_the_loss_is_zero_and_sampling_arrives_for_a_network_that_knows_the_latent():
    latent_BCTHW = torch.randn(1, 4, 2, 4, 4)

    def network(noisy_BCTHW, time_B, words_BS):
        return latent_BCTHW.expand_as(noisy_BCTHW)

    words_BS = torch.tensor([[1], [2]])
    noise_BCTHW, time_B = draw(0, 0, ["a"], latent_BCTHW)
    assert flow_loss(network, latent_BCTHW, words_BS[:1], noise_BCTHW, time_B.clamp(min=0.2)) < 1e-9
    found_BCTHW = sample(network, words_BS, torch.zeros_like(words_BS), (4, 2, 4, 4), steps=4)
    torch.testing.assert_close(found_BCTHW, latent_BCTHW.expand(2, -1, -1, -1, -1))


def test_an_untrained_network_has_the_loss_of_the_latent_alone():
    """Zero is predicted for the latent, so the velocity is wrong by `x / t`."""
    latents_BCTHW = torch.randn(2, 4, 2, 4, 4)
    noise_BCTHW, time_B = torch.randn_like(latents_BCTHW), torch.tensor([0.5, 1.0])
    loss = flow_loss(DiT(CONFIG), latents_BCTHW, torch.tensor([[1], [2]]), noise_BCTHW, time_B)
    expected = (latents_BCTHW / time_B.view(-1, 1, 1, 1, 1)).square().mean()
    torch.testing.assert_close(loss.detach(), expected)
