"""Two and three builds of one output at once, with other groups of files, as retries of Kubernetes are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos.ground import assert_published, assert_readers_see, encode_arguments

if TYPE_CHECKING:
    from tests.chaos.ground import Ground, Place

GROUPS = (("--set", "storage.files_per_shard=1"), (), ("--set", "storage.files_per_shard=2"))


def at_once(ground: Ground, place: Place, count: int) -> str:
    """`count` builds that begin together, then a publication. Returns URI of the output.

    Raises:
        AssertionError: one failed, or readers do not see each row once.
    """
    output = ground.output()
    flags = [("--executor", "inline", *GROUPS[number % len(GROUPS)]) for number in range(count)]
    runs = [place.start(*encode_arguments(ground, output, *extra)) for extra in flags]
    codes = [run.wait() for run in runs]
    assert codes == [0] * count, place.printed()[-4000:]
    assert place.start("publish", output, ground.inputs, "--canary", "0").wait() == 0, place.printed()[-4000:]
    assert_published(ground.store(output), ground.clean)
    assert_readers_see(ground, output, ground.clean)
    return output
