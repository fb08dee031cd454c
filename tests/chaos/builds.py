"""Two and three builds of one output at once, with other groups of files, as retries of Kubernetes are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.chaos.checks import assert_published, assert_readers_see
from tests.chaos.corpus import encode_arguments

if TYPE_CHECKING:
    from tests.chaos.commands import Commands
    from tests.chaos.corpus import UploadedCorpus

GROUPS = (("--set", "storage.files_per_shard=1"), (), ("--set", "storage.files_per_shard=2"))


def at_once(corpus: UploadedCorpus, commands: Commands, count: int) -> str:
    """`count` builds that begin together, then a publication. Returns URI of the output.

    Raises:
        AssertionError: one failed, or readers do not see each row once.
    """
    output = corpus.output()
    flags = [("--executor", "inline", *GROUPS[number % len(GROUPS)]) for number in range(count)]
    runs = [commands.start(*encode_arguments(corpus, output, *extra)) for extra in flags]
    codes = [run.wait() for run in runs]
    assert codes == [0] * count, commands.printed()[-4000:]
    assert commands.start("publish", output, corpus.inputs, "--canary", "0").wait() == 0, commands.printed()[-4000:]
    assert_published(corpus.store(output), corpus.clean)
    assert_readers_see(corpus, output, corpus.clean)
    return output
