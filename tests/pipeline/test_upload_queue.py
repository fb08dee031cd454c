"""Uploads beside building: bounds, order, failures, and what an abort leaves."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DrillConfig
from pipeline.errors import LatheError, StorageUnavailable
from pipeline.records import WrittenFile
from pipeline.storage.local import LocalStore
from pipeline.writer.upload_queue import UPLOAD_THREADS, FinishedFile, UploadQueue


class GatedStore(LocalStore):
    """Uploads wait until `gate` is set; `most` is how many were under way at once."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.gate = threading.Event()
        self.guard = threading.Lock()
        self.now = self.most = 0

    def upload(self, local_path: Any, key: str, *, progress: Any = None) -> Any:
        with self.guard:
            self.now += 1
            self.most = max(self.most, self.now)
        assert self.gate.wait(60)
        with self.guard:
            self.now -= 1
        return super().upload(local_path, key, progress=progress)


@pytest.fixture
def store(tmp_path: Path) -> GatedStore:
    return GatedStore(tmp_path / "out")


def finished(folder: Path, number: int, num_bytes: int = 1000) -> FinishedFile:
    folder.mkdir(exist_ok=True)
    path, index_path = folder / f"{number}.bin", folder / f"{number}.idx"
    path.write_bytes(bytes(num_bytes))
    index_path.write_bytes(bytes(100))
    written = WrittenFile(f"data/{number}", f"_index/{number}", "b", num_bytes, 100, 1, "", "")
    return FinishedFile(path, index_path, written)


def queue_of(store: LocalStore, **options: Any) -> UploadQueue:
    return UploadQueue(store, **{"most_bytes": 10_000, "drill": DrillConfig(), **options})


def keys(store: LocalStore) -> list[str]:
    return [info.key for info in store.list()]


def test_put_waits_while_too_many_bytes_are_finished(store: GatedStore, tmp_path: Path) -> None:
    queue = queue_of(store, most_bytes=2500)
    for number in range(2):
        queue.put(finished(tmp_path / "spool", number))
    taken = threading.Event()

    def put_third() -> None:
        queue.put(finished(tmp_path / "spool", 2))
        taken.set()

    thread = threading.Thread(target=put_third)
    thread.start()
    assert not taken.wait(0.3)
    store.gate.set()
    assert taken.wait(60)
    thread.join()
    queue.finish()
    assert keys(store) == [f"{kind}/{n}" for kind in ("_index", "data") for n in range(3)]
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_file_larger_than_the_bound_is_taken_alone(store: GatedStore, tmp_path: Path) -> None:
    store.gate.set()
    queue = queue_of(store, most_bytes=10)
    for number in range(3):
        queue.put(finished(tmp_path / "spool", number))
    queue.finish()
    assert len(keys(store)) == 6
    assert store.most == 1


def test_several_files_are_on_their_way_at_once_and_no_thread_stays(store: GatedStore, tmp_path: Path) -> None:
    queue = queue_of(store, most_bytes=100_000)
    for number in range(UPLOAD_THREADS + 3):
        queue.put(finished(tmp_path / "spool", number))
    while store.now < UPLOAD_THREADS:
        time.sleep(0.005)
    store.gate.set()
    queue.finish()
    assert store.most == UPLOAD_THREADS
    while any(thread.name == "upload" for thread in threading.enumerate()):
        time.sleep(0.005)


def test_progress_is_what_was_sent_and_never_negative(tmp_path: Path) -> None:
    class Rewinding(LocalStore):
        def upload(self, local_path: Any, key: str, *, progress: Any = None) -> Any:
            for n in (500, -500, 500):  # as s3transfer reports a part that is sent again
                progress(n)
            return super().upload(local_path, key)

    seen: list[int] = []
    queue = queue_of(Rewinding(str(tmp_path / "out")), progress=seen.append)
    queue.put(finished(tmp_path / "spool", 0))
    queue.finish()
    assert seen == [500, 0, 500] * 2


def test_a_failure_reaches_put_check_and_finish_and_no_later_file_is_sent(tmp_path: Path) -> None:
    class Refusing(LocalStore):
        asked = 0

        def upload(self, local_path: Any, key: str, *, progress: Any = None) -> Any:
            self.asked += 1
            raise StorageUnavailable("503")

    store = Refusing(str(tmp_path / "out"))
    queue = queue_of(store)
    queue.put(finished(tmp_path / "spool", 0))
    for call in (queue.finish, queue.check, lambda: queue.put(finished(tmp_path / "spool", 1))):
        with pytest.raises(StorageUnavailable, match="503"):
            call()
    queue.abort()
    assert store.asked == 1
    assert list((tmp_path / "spool").iterdir()) == []


def test_stop_ends_a_put_and_a_finish_that_wait(store: GatedStore, tmp_path: Path) -> None:
    for call in ("put", "finish"):
        queue = queue_of(store, most_bytes=1)
        queue.put(finished(tmp_path / "spool", 0))
        ended = threading.Event()

        def wait(queue: UploadQueue = queue, call: str = call, ended: threading.Event = ended) -> None:
            with pytest.raises(LatheError, match="stopped"):
                queue.put(finished(tmp_path / "spool", 1)) if call == "put" else queue.finish()
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        queue.stop()
        assert ended.wait(60)
        thread.join()
    store.gate.set()


def test_an_abort_whose_delete_fails_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path / "out"))
    queue = queue_of(store)
    queue.put(finished(tmp_path / "spool", 0))
    queue.finish()

    def refuse(self: LocalStore, key: str) -> None:
        raise StorageUnavailable("503")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "delete", refuse)
        with pytest.raises(StorageUnavailable):
            queue.abort()
    assert len(keys(store)) == 2
    queue.abort()
    assert keys(store) == []
