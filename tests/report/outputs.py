"""Published outputs for tests of reports, written directly: no build runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from pipeline.config import WriteConfig
from pipeline.ledger.receipts import Ledger
from pipeline.operate.publish_checks import Limits
from pipeline.records import Reject, video_counts
from pipeline.storage import Store
from tests.pipeline.latent_clips import SMALL, latent_clip, local_store, write_shard
from tests.pipeline.published import publish_all

SCRIPT = "</script><script>window.broken=1</script><img src=x onerror=window.broken=2>"
TURNED = "invoice\u202egpj.exe"
HOSTILE = (
    SCRIPT,
    TURNED,
    "مرحبا \u200fبالعالم",
    "'\"><svg/onload=window.broken=3>",
    "{{ 7 * 7 }}{% raw %}",
    "\x1b[31mred\x00",
    "<!--",
    None,
)


def source(number: int) -> str:
    return f"s3://corpus/shard-{number:03d}.tar"


def add_shard(
    store: Store, folder: Path, number: int, captions: tuple[str | None, ...], format: str = "parquet"
) -> None:
    """Commits a tar with one clip for each caption, from videos of 20 s in 640x480; one is rejected for its length of 0.3 s."""
    clips = [latent_clip(100 * number + n, uri=source(number), caption=caption) for n, caption in enumerate(captions)]
    rejects = (
        Reject(
            f"short-{number}",
            "clips",
            "too_short",
            "got 3 frames, expected 17",
            policy=True,
            uri=source(number),
            video=video_counts(640, 480, 0.3),
            buckets={SMALL.name: 1},
        ),
        Reject(SCRIPT, "decode", "undecodable", f"no index {SCRIPT}", policy=False, uri=source(number)),
    )
    made = write_shard(store, folder / "spool", WriteConfig(format=format), clips, shard=number, rejects=rejects)
    videos = Counter[str]()
    for _ in captions:
        videos.update(video_counts(640, 480, 20.0))
    warnings = {"no_caption": captions.count(None)} if None in captions else {}
    Ledger(store).commit(replace(made, warnings=warnings, videos=(dict(videos),)))


def hostile_output(folder: Path) -> Store:
    """Two snapshots: of a shard with hostile captions, then with a second shard and one caption of 16 MB."""
    store = local_store(folder / "out")
    Ledger(store).prepare(f"films {SCRIPT} {TURNED}")
    add_shard(store, folder, 0, HOSTILE)
    publish(store)
    add_shard(store, folder, 1, ("plain", "<b>" + "x" * 16_000_000))
    publish(store)
    return store


def publish(store: Store) -> None:
    """Publishes all there is, whatever share of it was rejected."""
    publish_all(store, limits=Limits(reject_budget=1.0))
