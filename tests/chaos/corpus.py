"""Corpus on an S3 server with the rows of a clean run."""

from __future__ import annotations

import io
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

import pipeline
from pipeline.storage import Store, open_store
from tests.tiny_corpus import make_corpus, tiny_flags, tiny_job, video_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import S3Server

SHARDS, SAMPLES, FILMS = 2, 3, 2
Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class UploadedCorpus:
    """`server` has the corpus below `inputs`. `clean`: rows of a clean run, by id. `taken`: key of a sample that is taken down."""

    server: S3Server
    inputs: str
    clean: Rows
    taken: str

    @property
    def kept(self) -> Rows:
        """Rows that are left after the takedown."""
        return {name: row for name, row in self.clean.items() if row["source_key"] != self.taken}

    def output(self) -> str:
        """URI of a fresh output."""
        return f"{self.server.root}/out-{uuid.uuid4().hex[:8]}"

    def store(self, uri: str) -> Store:
        """The output, without a relay."""
        return open_store(uri, self.server.config())


def upload_corpus(server: S3Server, folder: Path) -> UploadedCorpus:
    """Uploads tars and plain films and encodes them undisturbed."""
    made = make_corpus(folder / "corpus", shards=SHARDS, samples=SAMPLES)
    for number in range(FILMS):
        (made / f"film{number}.mp4").write_bytes(video_bytes(9 + 4 * number, seed=90 + number))
    inputs = open_store(f"{server.root}/in", server.config())
    for path in sorted(made.iterdir()):
        inputs.upload(path, path.name)
    output = f"{server.root}/clean"
    pipeline.encode(tiny_job(f"{server.root}/in", output, **{"storage.endpoint_url": server.endpoint}))
    store = open_store(output, server.config())
    clean = {
        row["id"]: row for key in store.keys("data/") for row in pq.read_table(io.BytesIO(store.read(key))).to_pylist()
    }
    return UploadedCorpus(server, f"{server.root}/in", clean, "000000")


def encode_arguments(corpus: UploadedCorpus, output: str, *flags: str) -> list[str]:
    """Of the build of the corpus: tars are a shard each, films together one."""
    return ["encode", corpus.inputs, output, *tiny_flags(*(flags or ("--executor", "inline")))]
