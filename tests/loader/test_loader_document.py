"""Every Python block of docs/loader.md runs; that of ray.data where a session of Ray is open, in tests/pipeline/test_delta_log.py."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace

import pytest

from pipeline.config import StorageConfig, WriteConfig
from pipeline.errors import LatheError, StorageUnavailable
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import LatentDataset, LatentLoader
from pipeline.operate.publish import PublishOptions, publish
from pipeline.storage.batched_reads import BatchedReads
from pipeline.storage.local_errors import translated
from pipeline.storage.range_reader import LocalRangeReader
from tests.loader.document import DOCUMENT, blocks
from tests.loader.outputs import SHORT, clip_of, commit_files, mixed_shards, write_output


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(("container", "reader"), [("parquet", "datasets"), ("tar", "webdataset")])
def test_blocks_of_the_document_run(tmp_path, monkeypatch, container, reader):
    config = WriteConfig(format=container)
    output = write_output(tmp_path / "out", tmp_path, mixed_shards(2), config, publishing=False)
    for shard, numbers in enumerate(([900, 901, 902], [902, 903])):  # video 902 is in two files and counts in one
        commit_files(output.store, tmp_path, numbers, config, shard=shard)
    publish(output.store, PublishOptions(delta=False))
    ids = sorted({*output.clips, *(f"video{n:05d}-0000" for n in range(900, 904))} - {"video00105-0000"})
    record_takedown(output.store, "asked", ids=["video00105-0000"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    scope: dict[str, object] = {}
    for block in blocks(reader):
        exec(block, scope)
    assert (scope["resumed"].step, scope["loader"].step) == (3, 4)  # the loader went on as an iterable dataset
    assert len(scope["latents_BCthw"]) == len(scope["captions"]) == 2
    assert scope["first"].shape[1] == 4
    assert sorted(name for _, name in scope["hidden"]) == ["video00105-0000", "video00902-0000"]
    assert sorted(scope["ids"]) == ids == sorted(row.id for row in scope["dataset"])


def rows_of_what_can_go_wrong():
    """What a user sees by the last table of the document, as patterns of messages without backquotes."""
    seen = re.findall(r"^\| `(.+?)` \|", DOCUMENT.read_text().partition("## What can go wrong")[2], re.MULTILINE)
    return [re.sub(r"\d+", r"\\d+", re.escape(text).replace("…", ".*")) for text in seen]


def unavailable(*_):
    raise StorageUnavailable("Input/output error")


def test_each_message_of_the_document_is_given_for_its_cause(films, tmp_path, monkeypatch):
    output = write_output(tmp_path / "out", tmp_path, [[clip_of(n, SHORT) for n in range(3)]], publishing=False)
    dataset = LatentDataset.open(films["parquet"].uri)
    foreign = LatentDataset.open(films["parquet"].uri)
    foreign.spec = replace(foreign.spec, fingerprint="b" * 32)

    def loader(*datasets, **options):
        return LatentLoader(datasets or dataset, **{"batch": 3, "epochs": 1, **options})

    def unpublished():
        LatentDataset.open(output.uri)

    def orders_of_ranks():
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
        monkeypatch.setattr(
            "torch.distributed.all_gather_object", lambda found, mine, group: found.__setitem__(slice(2), [mine, {}])
        )
        loader().check_ranks()

    def read_twice():
        made = loader()
        assert list(made)
        list(made)

    def too_many_files():
        with translated("a file"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def another_seed():
        loader(seed=1).load_state_dict(loader().state_dict())

    def damaged():
        publish(output.store, PublishOptions(delta=False))
        made = LatentDataset.open(output.uri)
        key, start = made.files.value("key", 0), made.indexes.get(0).offset(0)
        data = bytearray(output.store.read(key))
        data[start] ^= 1
        output.store.write(key, bytes(data))
        list(loader(made, verify="always"))

    def away():
        monkeypatch.setattr(LocalRangeReader, "read_into", unavailable)
        monkeypatch.setattr(BatchedReads, "read", lambda _, reads: [False] * len(reads))
        list(loader(LatentDataset.open(films["parquet"].uri, storage=StorageConfig(max_attempts=1))))

    causes = (
        unpublished,
        lambda: loader(batch=6, dp_world=4),
        lambda: loader(batch=14),
        orders_of_ranks,
        read_twice,
        too_many_files,
        lambda: loader(variants="flip"),
        lambda: loader(batch=1000),
        another_seed,
        lambda: LatentDataset.open(films["parquet"].uri, where="num_frames > 1000"),
        lambda: loader(dataset, foreign),
        damaged,
        away,
    )
    for row, cause in zip(rows_of_what_can_go_wrong(), causes, strict=True):
        with pytest.raises(LatheError) as raised:
            cause()
        assert re.search(row, str(raised.value).replace("`", ""))
