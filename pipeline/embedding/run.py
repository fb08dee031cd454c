"""Run of `lathe embed`: walks the rows of a snapshot, has what the set lacks encoded in this process or on Ray, makes a version of the set.

Run again, it goes on: what receipts name is not encoded again. Several runs at a time are safe; the first receipt of each unit counts.
"""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from pipeline.embedding.checkpoint import describe, find_files
from pipeline.embedding.units import Survey, caption_sources, coverage_of, image_units, text_units
from pipeline.embedding.worker import EmbeddingWorker
from pipeline.errors import ConfigError, TransientError
from pipeline.loader.captions import CaptionRule
from pipeline.loader.dataset import LatentDataset
from pipeline.sidecars.description import check_set
from pipeline.sidecars.file_index import packed_array
from pipeline.sidecars.versions import SetVersions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pipeline.config import EmbedJob
    from pipeline.embedding.worker import Unit
    from pipeline.sidecars.description import SidecarSet
    from pipeline.sidecars.receipts import SidecarReceipt

    Results = Iterator[tuple[SidecarReceipt, bool]]

TRIES, PAUSE_S = 4, 1.0  # of a unit in this process, after errors that may pass


@dataclass(slots=True)
class EmbedReport:
    """What a run did. `rows`: of the snapshot; `needed`: distinct texts, or images; `present`: those that the set had."""

    name: str
    output: str
    snapshot: int
    version: int = 0
    rows: int = 0
    without_caption: int = 0
    needed: int = 0
    present: int = 0
    encoded: int = 0
    by_others: int = 0  # encoded by another run at the same time
    tokens: int = 0
    truncated: int = 0
    files: int = 0
    bytes_written: int = 0
    seconds: float = 0.0
    tensors: dict[str, str] = field(default_factory=dict)
    captions: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def embed(job: EmbedJob, progress: Callable[[EmbedReport], None] | None = None) -> EmbedReport:
    """Encodes what the set lacks and makes the next version of it. `progress` is called after each unit.

    Raises:
        ConfigError: options that do not fit the encoder; a set of this name that was made differently.
        CheckpointError: files of the encoder that are missing or do not fit.
        InputError: nothing is published; no such column of images.
        LatheError: what a worker raised. What was encoded stays, and the same command goes on.
    """
    began = time.monotonic()
    sources = () if job.from_column else caption_sources(job.captions)
    rule = CaptionRule(sources or ("caption",))
    dataset = LatentDataset.open(job.output, columns=rule.columns, fingerprint=job.fingerprint, storage=job.storage)
    try:
        store = dataset.store
        survey, report = Survey(), EmbedReport(job.set_name, store.root, dataset.snapshot or 0, captions=sources)
        done: set[bytes] = set()
        units: Iterator[Unit] = (
            image_units(dataset, job.from_column, done, job.unit_rows, survey)
            if job.from_column
            else text_units(dataset, rule, done, job.unit_rows, survey)
        )
        described = describe(job, find_files(job))
        check_set(store, described)
        versions = SetVersions(store, job.set_name, job.drill)
        done.update(packed_array(versions.keys_done()))
        report.tensors = {name: str(kind) for name, kind in described.tensors.items()}
        if (first := next(units, None)) is not None:
            with _workers(job, described, store.root) as results:
                for receipt, ours in results(chain((first,), units)):
                    _count(report, receipt, ours=ours)
                    if progress is not None:
                        progress(report)
        report.rows, report.without_caption = survey.rows, survey.without_caption
        report.needed, report.present = survey.present + survey.missing, survey.present
        report.version = versions.publish(coverage_of(dataset, sources), sources).number
    finally:
        dataset.close()
    report.seconds = time.monotonic() - began
    return report


def _count(report: EmbedReport, receipt: SidecarReceipt, *, ours: bool) -> None:
    if not ours:
        report.by_others += receipt.rows
        return
    report.encoded += receipt.rows
    report.tokens += receipt.counts.get("tokens", 0)
    report.truncated += receipt.counts.get("truncated", 0)
    report.files += 1
    report.bytes_written += receipt.num_bytes + receipt.index_bytes


@contextmanager
def _workers(job: EmbedJob, described: SidecarSet, root: str) -> Iterator[Callable[[Iterable[Unit]], Results]]:
    """Function that gives the receipts of units."""
    if job.executor == "inline":
        make = functools.partial(EmbeddingWorker, job, described, root, _device(job, cuda=None))
        yield functools.partial(_in_this_process, make)
        return
    from pipeline.engine.ray import session
    from pipeline.engine.ray.task_pool import TaskPool

    cluster = session.connect(job.address, cpus=(job.encoders or 1) * job.encoder_cpus, object_store_bytes=0)
    try:
        device = _device(job, cuda=cluster.gpus >= 1)
        on_gpu = device.startswith("cuda")
        actors = job.encoders or (max(1, int(cluster.gpus)) if on_gpu else 1)
        make = functools.partial(EmbeddingWorker, job, described, root, device)
        pool = TaskPool(make, actors=actors, cpus=job.encoder_cpus, gpus=int(on_gpu))
        try:
            yield pool.results
        finally:
            pool.close()
    finally:
        session.disconnect()


def _in_this_process(make: Callable[[], EmbeddingWorker], units: Iterable[Unit]) -> Results:
    worker: EmbeddingWorker | None = None
    for unit in units:
        for attempt in range(1, TRIES + 1):
            try:
                worker = worker or make()
                result = worker.run(unit)
            except TransientError:
                if attempt == TRIES:
                    raise
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            else:
                yield result
                break


def _device(job: EmbedJob, *, cuda: bool | None) -> str:
    from pipeline.encoder import cuda_available

    there = cuda_available() if cuda is None else cuda
    if job.device == "auto":
        return "cuda" if there else "cpu"
    if job.device.startswith("cuda") and cuda is None and not there:
        raise ConfigError(f"device: {job.device} was asked for, and this machine has no CUDA device; use cpu or auto")
    return job.device
