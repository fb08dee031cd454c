"""One batch of mutants in a real build, with the checks that must hold for any mutants.

Every sample is encoded or rejected with a reason; the counts add up; the run neither crashes nor hangs; the output is valid; nothing
outside of it is written, and no file that a mutant names is read.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pipeline
from pipeline.config import StorageConfig
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests.fuzz.mutations import mutate, mutate_tar, name_a_path
from tests.odd_inputs import archives
from tests.odd_inputs.table import ALL, Odd, small
from tests.tiny_corpus import receipts, rows, tiny_job

ROOT = Path(__file__).resolve().parents[2]
SLUG = re.compile(r"[a-z][a-z0-9_]*")
LARGEST_SEED = 70_000  # bytes
SELECTS = ("tile", "uniform:3", "whole", "slide:7")
LIMITS = {
    "decode.timeout_s": 30,
    "decode.max_pixels": 1 << 20,
    "decode.max_duration_s": 3600,
    "decode.max_frames": 20_000,
    "decode.memory_bytes": 1 << 30,
    "clips.upscale": True,
    "reject_budget": 1,
}


def seeds() -> list[Odd]:
    """Small files of every container."""
    return [odd for odd in ALL if 0 < len(odd.data()) <= LARGEST_SEED]


def known_reasons() -> set[str]:
    """Reasons that `docs/rejects.md` explains."""
    document = ROOT / "docs" / "rejects.md"
    return set(re.findall(r"^\| `([a-z0-9_]+)` \|", document.read_text(), re.MULTILINE)) if document.exists() else set()


@dataclass
class Batch:
    """Mutants made from a seed, and their folder."""

    seed: int
    folder: Path
    keys: set[str] = field(default_factory=set)  # of samples that must be accounted for
    tars: int = 0

    @property
    def inputs(self) -> Path:
        return self.folder / "in"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    @property
    def secret(self) -> Path:
        """A good video that must not be read. Mutants name it as it is seen from the inputs' folder, where the build runs."""
        return self.folder / "secret.mp4"


def make(folder: Path, seed: int, *, mutants: int, files: int, tars: int) -> Batch:
    """Writes a tar of `mutants` mutated videos, `files` mutated plain videos, and `tars` mutated tars."""
    batch, rng = Batch(seed, folder), random.Random(seed)
    batch.inputs.mkdir(parents=True)
    batch.secret.write_bytes(small())
    extra = (name_a_path(["../secret.mp4", "file:../secret.mp4", "secret.mp4"]),)
    sources = seeds()

    def videos(count: int, letter: str) -> Iterator[tuple[str, bytes]]:
        for n in range(count):
            odd = rng.choice(sources)
            yield (
                f"{letter}{n:04d}.{odd.suffix if odd.suffix in ('mkv', 'ts', 'avi', 'flv') else 'mp4'}",
                mutate(odd.data(), rng, extra),
            )

    def members(count: int, letter: str) -> Iterator[tuple[str, bytes]]:
        for name, data in videos(count, letter):
            yield name, data
            yield f"{name[:5]}.txt", mutate(b"a caption, gr\xc3\xb6\xc3\x9fer", rng)
            yield f"{name[:5]}.json", mutate(b'{"caption": "words", "number": [1, 2, {"a": null}]}', rng)

    (batch.inputs / "mutants.tar").write_bytes(archives.tar(members(mutants, "m")))
    for name, data in videos(files, "f"):
        (batch.inputs / name).write_bytes(data)
    for n in range(tars):
        sound = archives.tar([*members(3, "t"), ("t9999.mp4", small())])
        (batch.inputs / f"tar{n:03d}.tar").write_bytes(mutate_tar(sound, rng, extra))
    (batch.inputs / "ordinary.mp4").write_bytes(small())
    batch.keys = {f"m{n:04d}" for n in range(mutants)} | {f"f{n:04d}" for n in range(files)} | {"ordinary"}
    batch.tars = tars + 1
    return batch


def surroundings(batch: Batch) -> set[str]:
    """Names in the folders where files could be left over, without the batch's own folders."""
    found = {str(path) for path in batch.folder.parent.rglob("*") if batch.output not in (path, *path.parents)}
    return found | {name for name in os.listdir(tempfile.gettempdir()) if "escape" in name}


def forget_reading(batch: Batch) -> None:
    """Sets the secret's time of access before its time of change: the next read renews it, on file systems that keep such times."""
    os.utime(batch.secret, ns=(1, 2))


def was_read(batch: Batch) -> bool:
    """Whether the secret was read since `forget_reading`."""
    return os.stat(batch.secret).st_atime_ns != 1


def check(batch: Batch) -> tuple[list[str], Counter[str]]:
    """Builds the batch; returns failed checks as text, and the number of rejects by reason."""
    before = surroundings(batch)
    forget_reading(batch)
    select = SELECTS[batch.seed % len(SELECTS)]
    job = tiny_job(batch.inputs, batch.output, **{"clips.select": select, **LIMITS})
    try:
        with contextlib.chdir(batch.inputs):
            report = pipeline.encode(job)
    except Exception as error:  # noqa: BLE001 - whatever ends the run is the finding
        return [f"the run ended with {type(error).__name__}: {error}"], Counter()
    found = [f"not finished: {report.failed} {report.refused}"] if not report.ok else []
    if was_read(batch):
        found.append("a file outside of the inputs was read")
    if left := surroundings(batch) ^ before:
        found.append(f"left behind or gone: {sorted(left)}")
    return found + list(_faults(batch)), Counter(report.rejects)


def _faults(batch: Batch) -> Iterator[str]:
    """Failed checks of receipts and rows, as text."""
    known, done = known_reasons(), receipts(batch.output)
    accounted = {str(row["source_key"]) for row in rows(batch.output).values()}
    if len([receipt for receipt in done if receipt.shard.kind == "tar"]) != batch.tars:
        yield f"{len(done)} receipts, expected those of {batch.tars} tars and of the plain files"
    for receipt in done:
        try:
            receipt.counts.check()
        except ValueError as error:
            yield f"{receipt.shard.name}: {error}"
        for reject in receipt.rejects:
            accounted.add(reject.key or "")
            if not SLUG.fullmatch(reject.reason) or (known and reject.reason not in known) or not reject.message:
                yield f"{receipt.shard.name} {reject.key}: unknown reason {reject.reason!r}: {reject.message!r}"
            if reject.reason == "decode_timeout" or "decoder failed with" in reject.message:
                yield f"{receipt.shard.name} {reject.key}: {reject.reason}: {reject.message}"
    if lost := batch.keys - accounted:
        yield f"neither encoded nor rejected: {sorted(lost)}"
    audit = verify_output(open_store(str(batch.output), StorageConfig()))
    if audit.problems:
        yield f"the output is not sound: {audit.problems}"


def keep(batch: Batch, folder: Path) -> Path:
    """Copies the inputs of a batch to a folder that is kept."""
    target = folder / f"seed-{batch.seed}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(batch.inputs, target)
    return target
