"""Page on a large snapshot: time and peak memory of `lathe report` without decoding, bytes of the page with pictures that compress worst.

Makes an output of 40 clips a tar with small latents, published, and reports on it in a process of its own. The pictures are noise.

    python -m benchmarks.report [--clips 100000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.write_only import clip
from benchmarks.written_tars import commit_tar, in_own_process
from pipeline.config import StorageConfig
from pipeline.ledger.receipts import Ledger
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.publish_checks import Limits
from pipeline.records import Bucket, Reject, video_counts
from pipeline.report.collect import ReportOptions, collect
from pipeline.report.page import page_of
from pipeline.report.pictures import EACH, FRAMES, LARGEST, PICTURE_BYTES, MeasuredClip, Pictures, clip_pictures
from pipeline.report.values import Clip, Report
from pipeline.storage import Store, open_store

A_TAR = 40
BUCKET = Bucket(17, 32, 32)
BARS = {"s": 60.0, "mb": 500.0, "page_mb": 8.0}
CAPTION = "a person walks along a street in the rain, seen from a window, while cars pass in both directions; number "


def make_output(store: Store, spool: Path, clips: int) -> None:
    """A published output of so many clips, with captions, two rejects a tar and a source for each tar."""
    Ledger(store).prepare("bench")
    array = np.random.default_rng(0).standard_normal((16, 5, 4, 4)).astype(np.float16)
    for number in range(max(1, clips // A_TAR)):
        uri = f"s3://a-bucket-with-a-name/corpora/videos/2026/11/{number:06d}.tar"
        made = []
        for n in range(A_TAR):
            one = clip(n, array, BUCKET, "float16")
            about = {"uri": uri, "caption": f"{CAPTION}{number} {n}", "key": f"{number:06d}/{n:04d}"}
            made.append(replace(one, id=f"{number:06d}-{n:04d}-0000", sample=replace(one.sample, **about)))
        known = {"video": video_counts(640, 480, 0.1), "buckets": {BUCKET.name: 1}}
        rejects = tuple(
            Reject(f"k{n}", "clips", "too_short", "got 3 frames", policy=True, uri=uri, **known) for n in range(2)
        )
        commit_tar(
            store, spool, uri, made, rejects=rejects, videos={"px480": A_TAR, "s10": A_TAR, "ms": A_TAR * 10_000}
        )
    publish(store, PublishOptions(limits=Limits(reject_budget=1.0), delta=False))


def noise_pictures() -> Pictures:
    """As many pictures as a page shows, of noise."""
    rng, made = np.random.default_rng(0), Pictures()
    video = rng.integers(0, 256, (FRAMES, LARGEST, LARGEST, 3), np.uint8)
    for n in range(4 * EACH):
        pictures = {"still": f"{n}-still", "play": f"{n}-play"}
        about = Clip(f"{n}", "k", "s", "b", "base", FRAMES, 8.0, None, 1.0, 0.1, (), (), "random", pictures)
        item = MeasuredClip(about, video, video, np.zeros((1, 1, 1, 1), np.float32))
        made.by_name.update(clip_pictures(item, PICTURE_BYTES // (4 * EACH)))
    return made


def shown_with(report: Report, pictures: Pictures) -> bytes:
    """The page with all these pictures."""
    clips = tuple(
        Clip(
            name,
            "k",
            "s",
            "b",
            "base",
            9,
            8.0,
            None,
            1.0,
            0.1,
            (),
            (),
            "random",
            {"still": name, "play": f"{name[:-5]}play"},
        )
        for name in pictures.by_name
        if name.endswith("-still")
    )
    return page_of(replace(report, decoded=replace(report.decoded, clips=clips)), pictures)


def measured(root: str) -> dict[str, float]:
    """The step, in this process."""
    begun = time.perf_counter()
    storage = StorageConfig()
    report, pictures = collect(open_store(root, storage), None, storage, ReportOptions(clips=0))
    page_of(report, pictures)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"s": seconds, "mb": peak, "page_mb": len(shown_with(report, noise_pictures())) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--folder", help="where to make the output; a temporary folder otherwise")
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measured(options.folder)))
        return
    root = Path(options.folder or tempfile.mkdtemp(prefix="lathe-report-"))
    try:
        make_output(open_store(str(root), StorageConfig()), root.with_name(f"{root.name}-spool"), options.clips)
        for name, value in in_own_process("report", "--step", "--folder", str(root)).items():
            print(f"RESULT {value:.2f} <= {BARS[name]:g} {name} of a report on {options.clips} clips")
    finally:
        shutil.rmtree(root.with_name(f"{root.name}-spool"), ignore_errors=True)
        if not options.folder:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
