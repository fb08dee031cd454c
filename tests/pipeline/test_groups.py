"""Plain files are grouped once: whoever lists what, and whenever, every file is in one shard and everybody means the same shards."""

import threading

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import group_files
from pipeline.errors import OutputError
from pipeline.groups import agreed_groups
from pipeline.records import SourceObject
from pipeline.storage import open_store


def files(*numbers, etag="e"):
    return [SourceObject(f"/videos/{n:03d}.mp4", 10, etag) for n in numbers]


def names(shards):
    return [[source.uri[-7:-4] for source in shard.objects] for shard in shards]


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path), StorageConfig())


def groups(store, listed, per_shard=2):
    return agreed_groups(store, "f" * 32, listed, lambda fresh: group_files(fresh, per_shard))


def test_a_file_that_arrives_does_not_move_the_others(store):
    assert names(groups(store, files(1, 3, 5))) == [["001", "003"], ["005"]]
    grown = groups(store, files(1, 2, 3, 5))
    assert names(grown) == [["001", "003"], ["005"], ["002"]]
    # A run that listed before the file came, and one with other settings, mean the same shards.
    assert groups(store, files(1, 3, 5)) == grown[:2]
    assert groups(store, files(1, 2, 3, 5), per_shard=50) == grown


def test_a_replaced_file_is_a_new_one(store):
    groups(store, files(1, 2))
    assert names(groups(store, [*files(1), *files(2, etag="new")])) == [["001", "002"], ["002"]]


def test_runs_at_once_agree(tmp_path):
    listings = [files(*range(n, n + 12)) for n in range(8)]
    found = [None] * 8

    def run(n):
        found[n] = groups(open_store(str(tmp_path), StorageConfig()), listings[n], per_shard=1 + n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everything = {shard for shards in found for shard in shards}
    held = [source for shard in everything for source in shard.objects]
    assert len(held) == len(set(held))  # no file in two shards, whoever asks
    for n in range(8):
        assert set(listings[n]) <= {source for shard in found[n] for source in shard.objects}


def test_a_broken_list_is_named(store):
    store.write("groups/" + "f" * 32 + "/000000.json", b"{}{")
    with pytest.raises(OutputError, match=r"000000\.json"):
        groups(store, files(1))
