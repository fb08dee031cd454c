"""Published latents for the examples."""

from collections.abc import Iterator

import pytest

from pipeline.config import WriteConfig
from pipeline.ledger.receipts import Ledger
from pipeline.records import Bucket
from tests.pipeline.latent_clips import latent_clip, local_store, write_shard
from tests.pipeline.published import publish_all
from tests.threads import one_thread


@pytest.fixture(scope="package", autouse=True)
def single_thread() -> Iterator[None]:
    """Every test runs with one thread, as the processes do that it starts."""
    with one_thread():
        yield


@pytest.fixture(scope="package")
def output(tmp_path_factory):
    """Twenty-four latents of two buckets, published."""
    folder = tmp_path_factory.mktemp("latents")
    store = local_store(folder / "out")
    for shard in range(3):
        clips = [
            latent_clip(10 * shard + n, bucket=Bucket(frames, 32, 32), num_frames=frames, caption=f"clip {n}")
            for n, frames in enumerate([9, 5] * 4)
        ]
        Ledger(store).commit(write_shard(store, folder / "spool", WriteConfig(), clips, shard=shard))
    publish_all(store)
    return folder / "out"
