"""One process at a time holds a lease, on stores that decide races and on those that do not."""

import json
import os
import socket
import threading

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import LeaseHeld, LeaseLost, NotFound, OutputError, StorageUnavailable
from pipeline.ledger.lease import Lease, LeaseRecord, newest
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from pipeline.storage.s3 import S3Store
from tests.careless_store import CarelessStore

STORES = ["local", "moto", "s3", "careless", "refusing"]
KILLED = LeaseRecord("night", "old", "lathe nightly", "ann", "far", 7, "2026-01-01", "2026-01-01", ttl_s=-10.0)
"""What a killed holder leaves; its duration is over at once."""


@pytest.fixture
def careless(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with CarelessStore() as server:
        yield server


@pytest.fixture
def refusing(careless):
    careless.put_answers = [501] * 99
    return careless


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    if request.param == "local":
        return open_store(str(tmp_path / "out"), StorageConfig())
    if request.param in ("careless", "refusing"):
        endpoint = request.getfixturevalue(request.param).endpoint
        return open_store("s3://bucket/out", StorageConfig(endpoint_url=endpoint))
    server = request.getfixturevalue(request.param)
    return open_store(f"{server.root}/out", server.config())


@pytest.fixture
def local(tmp_path):
    return LocalStore(str(tmp_path / "out"))


def lease(store, command="lathe nightly", **options):
    return Lease(store, "night", command, **{"settle_s": 0.0, **options})


def test_second_process_is_told_who_holds_the_lease_and_gets_it_when_it_is_released(store):
    with lease(store, "lathe nightly a.yaml") as held:
        with pytest.raises(LeaseHeld) as refused, lease(store):
            pass
        words = str(refused.value)
        assert f"lathe nightly a.yaml of {refused.value.record['user']} on {socket.gethostname()}" in words
        assert f"(process {os.getpid()})" in words
        assert refused.value.record["started"] in words
        with Lease(store, "other", "lathe compact", settle_s=0.0):
            held.check()
    with lease(store) as again:
        again.check()
    assert [info.key for info in store.list("_leases/night/")] == [again.key], "older objects are gone"


def test_lease_of_a_killed_holder_is_taken_over(local, moto, s3):
    for store in (local, *(open_store(f"{server.root}/out", server.config()) for server in (moto, s3))):
        store.write("_leases/night/4.json", KILLED.to_json())
        with lease(store) as held:
            held.check()
            assert held.key == "_leases/night/5.json"
            with pytest.raises(LeaseHeld), lease(store):
                pass


@pytest.mark.parametrize("store", ["local", "moto", "s3"], indirect=True)
def test_one_of_several_at_once_gets_the_lease(store):
    """Swift takes several create-only puts at once; what is read back after they all are done decides."""
    start, taken = threading.Barrier(4), threading.Barrier(4)
    store.__class__ = meeting(type(store), start, taken)
    results, done = [], threading.Event()

    def contend():
        try:
            with lease(store) as held:
                results.append(held.key)
                done.wait(60)
        except LeaseHeld:
            results.append(None)
        if results.count(None) == 3:
            done.set()

    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(results, key=str) == [None, None, None, "_leases/night/1.json"]


def meeting(kind, start, taken):
    """A store on which all contenders create the first lease object at once, and none reads it back before all have tried."""

    class Meeting(kind):
        def put_if_absent(self, key, data):
            if not key.endswith("/1.json"):
                return super().put_if_absent(key, data)
            start.wait(60)
            created = super().put_if_absent(key, data)
            taken.wait(60)
            return created

    return Meeting


def test_one_of_two_at_once_gets_the_lease_on_a_store_without_conditions(careless):
    config = StorageConfig(endpoint_url=careless.endpoint)
    store = meeting(S3Store, threading.Barrier(2), threading.Barrier(2))("s3://bucket/out", config)
    results = []
    both = threading.Barrier(2)

    def contend():
        try:
            with lease(store) as held:
                results.append(held.key)
                both.wait(60)
        except LeaseHeld:
            results.append(None)
            both.wait(60)

    threads = [threading.Thread(target=contend) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(results, key=str) == [None, "_leases/night/1.json"]


def test_holder_that_was_taken_over_is_told_by_whom_and_leaves_the_new_lease_alone(local):
    with lease(local, "first") as first:
        stop_renewing(first, local)
        with lease(local, "second") as second:
            lapse(first)
            with pytest.raises(LeaseLost, match=r"second on .* took it over"):
                first.check()
            with pytest.raises(LeaseLost):
                first.check()
            first.release()
            second.check()
            with pytest.raises(LeaseHeld, match="second"), lease(local):
                pass


def stop_renewing(held, store):
    """As if the machine of the holder had slept: the object is old."""
    os.utime(store.uri(held.key), (0, 0))


def lapse(held):
    held._confirmed = float("-inf")


def test_holder_that_renews_in_the_last_moment_keeps_the_lease(local):
    with lease(local, "first") as first:
        stop_renewing(first, local)

        class Slow(LocalStore):
            def put_if_absent(self, key, data):
                lapse(first)
                first.check()  # renews after the contender found the lease old
                return super().put_if_absent(key, data)

        with pytest.raises(LeaseHeld, match="first"), lease(Slow(local.root)):
            pass
        lapse(first)
        first.check()
        assert newest(local, "night").number == 1


def test_lease_is_renewed_while_it_is_held(local):
    with lease(local, ttl_s=0.2) as held:
        before = local.stat(held.key).modified
        renewed = threading.Event()
        while local.stat(held.key).modified == before:
            assert not renewed.wait(0.02)
        held.check()


def test_lapsed_lease_of_a_store_that_is_away_is_not_trusted(local, monkeypatch):
    def away(key, data):
        raise StorageUnavailable("503")

    with lease(local) as held:
        lapse(held)
        with monkeypatch.context() as patch:
            patch.setattr(local, "write", away)
            with pytest.raises(StorageUnavailable):
                held.check()
        held.check()


def test_lease_that_was_removed_is_lost(local):
    with lease(local) as held:
        local.delete(held.key)
        lapse(held)
        with pytest.raises(LeaseLost, match="it was removed"):
            held.check()
    with pytest.raises(NotFound):
        local.stat(held.key)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_lease_is_released_when_its_block_fails(local, error):
    with pytest.raises(error), lease(local) as held:
        raise error
    assert json.loads(local.read(held.key))["released"] is True


def test_interrupted_contender_leaves_no_lease(local, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.ledger.lease.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt), lease(local, settle_s=1.0):
        pass
    assert newest(local, "night") is None


@pytest.mark.parametrize("error", [StorageUnavailable("503"), KeyboardInterrupt()])
def test_process_that_cannot_tidy_up_after_a_killed_holder_does_not_keep_the_lease(local, monkeypatch, error):
    delete = LocalStore.delete

    def failing(self, key):
        if key.endswith("/4.json"):
            raise error
        delete(self, key)

    local.write("_leases/night/4.json", KILLED.to_json())
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", failing)
        with pytest.raises(type(error)), lease(local):
            pass
    with lease(local) as held:
        held.check()


def test_unreadable_lease_is_named(local):
    local.write("_leases/night/1.json", b'{"half')
    with pytest.raises(OutputError, match=r"_leases/night/1.json cannot be read as a lease.*remove it"), lease(local):
        pass
