"""Orders and batch rules that are refused, with what to change."""

import pytest

from pipeline.errors import ConfigError
from pipeline.loader.mixture import Weights
from pipeline.loader.order import Order
from pipeline.loader.rules import Pack, Tokens, parse_rule
from tests.loader.test_order import dataset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rule": 1000},
            r"not one global batch; it has 9x64x64 \(20 rows, batch of 1000\); lower the batch size to at most 20, or",
        ),
        ({"rule": Tokens(48 * 30)}, r"\(20 rows, batch of 30\); lower Tokens.budget, for a batch of at most 20, or"),
        ({"rule": Pack(48, sequences=30)}, r"it has 9x64x64 \(20 rows\); lower Pack.sequences \(30\), or"),
        ({"rule": {"5x8x8": 4}}, r"no dataset has bucket 5x8x8; there are 9x64x64"),
        ({"rule": {"9x64x64": (4, 1.5)}}, r"bucket 9x64x64: expected a number >= 1, or with .*keep.*got \(4, 1.5\)"),
        ({"rule": {"9x64x64": (4, 0)}}, r"bucket 9x64x64: expected a keep probability in \(0, 1\], got 0"),
        ({"rule": {"9x64x64": "4"}}, r"bucket 9x64x64: expected a number >= 1, or with .*got '4'"),
        ({"rule": {"9x64x64": 4, "v9x64x64": 2}}, r"bucket 9x64x64 is given twice, as 9x64x64 and as v9x64x64"),
        ({"rule": Tokens(10)}, r"1 latents of bucket 9x64x64 have 48 tokens, the budget is 10"),
        ({"rule": Pack(40)}, r"bucket 9x64x64 has 48 tokens, more than Pack.seq_len 40"),
        ({"rule": 0}, r"batch: expected a whole number >= 1, got 0"),
        ({"rule": True}, r"batch: expected a whole number >= 1, got True"),
        ({"seed": 5.0}, r"seed: expected a whole number, got 5.0"),
        ({"seed": True}, r"seed: expected a whole number, got True"),
        ({"shuffle": 64}, r"expected none, full or window:N with N >= 1 files, got 64"),
        ({"epochs": 2.0}, r"epochs: expected a number >= 1 or None for each of 1 datasets, got 2.0"),
        ({"epochs": [1, 2]}, r"epochs: expected .* for each of 1 datasets, got \[1, 2\]"),
        ({"weights": [Weights(0, (float("inf"),))]}, r"weights: expected a number >= 0, got inf"),
        ({"weights": [Weights(0, ("x",))]}, r"weights: expected a number >= 0, got 'x'"),
        ({"weights": [Weights(0.5, (1,))]}, r"weights: step: expected a whole number >= 0, got 0.5"),
        ({"image_ratio": "x"}, r"image_ratio: expected a number from 0 to 1, got 'x'"),
        ({"small_buckets": "keep"}, r"small_buckets: expected error or drop, got 'keep'"),
        ({"rule": "16"}, r"expected a number, a mapping of bucket to number, Tokens\(…\) or Pack\(…\), got str"),
        ({"shuffle": "window:0"}, r"expected none, full or window:N with N >= 1 files, got 'window:0'"),
        ({"weights": [Weights(0, (1.0, 1.0))]}, r"weights: expected 1, one for each dataset, got 2"),
        ({"weights": [Weights(0, (0.0,))]}, r"not all zero"),
        ({"epochs": 0}, r"epochs: expected a number >= 1 or None"),
        ({"image_ratio": 0.5}, r"not one global batch of images; it has nothing; leave image_ratio out"),
    ],
)
def test_what_cannot_be_an_order_is_refused(options, message):
    options = {"rule": 4, **options}
    with pytest.raises(ConfigError, match=message):
        Order([dataset(short=[20])], parse_rule(options.pop("rule")), **options)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Tokens(36.5), r"Tokens.budget: expected a whole number >= 1, got 36.5"),
        (lambda: Tokens(36, patch=(1, 2)), r"Tokens.patch: expected \(frames, height, width\), got \(1, 2\)"),
        (lambda: Pack(36, patch=2), r"Pack.patch: expected \(frames, height, width\), got 2"),
        (lambda: Pack("36"), r"Pack.seq_len: expected a whole number >= 1, got '36'"),
    ],
)
def test_what_cannot_be_a_rule_is_refused(made, message):
    with pytest.raises(ConfigError, match=message):
        made()


def test_buckets_too_small_for_a_batch_are_named_and_left_out_only_if_asked():
    sets = [dataset(images=[3], short=[20], long=[4])]
    with pytest.raises(
        ConfigError,
        match=r"buckets of dataset a are too small for one batch.*: 17x64x96 \(4 rows, batch of 8\), 1x64x64 \(3 rows, batch of 8\); "
        r'give each a batch that fits, \{"17x64x96": …\}, or small_buckets="drop" to leave them out, or drop_last=False',
    ):
        Order(sets, parse_rule(8))
    with pytest.raises(ConfigError, match=r"too small for one batch.*: 1x64x64 \(0 of 3 rows kept, batch of 2\)"):
        Order(sets, parse_rule({"1x64x64": (2, 0.1), "9x64x64": 4}), drop_last=False)
    with pytest.raises(ConfigError, match=r"too small for one batch.*1x64x64 \(3 rows"):
        Order([*sets, dataset("b", images=[50])], parse_rule(4), image_ratio=0.5)
    with pytest.raises(ConfigError, match=r"9x64x64 \(0 of 20 rows kept, batch of 2\); keep more of one of them"):
        Order([dataset(short=[20])], parse_rule({"9x64x64": (2, 0.01)}))
    with pytest.raises(
        ConfigError, match=r"dataset b gives .* it has nothing; leave it out, or open a snapshot that has rows"
    ):
        Order([*sets, dataset("b")], parse_rule(1))
    order = Order(sets, parse_rule(8), epochs=1, small_buckets="drop")
    assert {order.batch(step).content.bucket for step in range(order.total())} == {"9x64x64"}


def test_the_same_dataset_is_given_once():
    with pytest.raises(ConfigError, match=r"datasets: a is given twice.*give it once, with a larger weight"):
        Order([dataset("a", short=[20]), dataset("b", short=[20]), dataset("a", short=[20])], parse_rule(4))


def test_a_world_that_cannot_share_a_batch_is_told_which_could():
    order = Order([dataset(short=[20])], parse_rule(6))
    order.check_world(3)
    with pytest.raises(
        ConfigError, match=r"bucket 9x64x64 has 6 latents, which 4 ranks cannot share.*divide 6: 1, 2, 3, 6"
    ):
        order.check_world(4)
    with pytest.raises(ConfigError, match=r"batch: Pack.sequences is 6, which 4 ranks cannot share equally; expected"):
        Order([dataset(short=[20])], Pack(48, sequences=6)).check_world(4)
    with pytest.raises(ConfigError, match=r"has 6 latents, which 4 ranks .*; give Tokens\(…, multiple=12\) \(worlds"):
        Order([dataset(short=[20])], Tokens(48 * 6, multiple=6)).check_world(4)
