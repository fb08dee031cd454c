"""Several reads in one system call: the bytes of `preadv`, and nothing where the kernel does not offer it or a read is not whole."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import random
import sys
import threading
from pathlib import Path

import pytest

from pipeline.storage import batched_reads
from pipeline.storage.batched_reads import MOST_BUFFERS, MOST_READS, BatchedReads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
LENGTH = 400_000


@pytest.fixture
def files(tmp_path):
    """Descriptors of three files of random bytes, and the bytes."""
    data = [random.Random(n).randbytes(LENGTH) for n in range(3)]
    for n, one in enumerate(data):
        (tmp_path / str(n)).write_bytes(one)
    descriptors = [os.open(tmp_path / str(n), os.O_RDONLY) for n in range(3)]
    yield descriptors, data
    for one in descriptors:
        os.close(one)


def read_of(descriptor, start, *lengths):
    return descriptor, start, [memoryview(bytearray(length)) for length in lengths]


def contexts():
    """Contexts of this process, each of which has a ring of events in memory."""
    return sum("[aio]" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("seed", range(8))
def test_many_reads_of_several_files_and_buffers_get_the_bytes_of_each(files, seed):
    descriptors, data = files
    draw = random.Random(seed)
    reads, expected = [], []
    for _ in range(draw.randint(2, MOST_READS)):
        number, lengths = draw.randrange(3), [draw.choice([1, 7, 4096, 30_001]) for _ in range(draw.randint(1, 6))]
        start = draw.randrange(LENGTH - sum(lengths))
        reads.append(read_of(descriptors[number], start, *lengths))
        expected.append(data[number][start : start + sum(lengths)])
    batched = BatchedReads()
    for _ in range(2):  # memory for what is submitted is used again
        assert batched.read(reads) == [True] * len(reads)
        assert [b"".join(buffers) for _, _, buffers in reads] == expected


def test_reads_that_end_early_or_fail_are_left_and_those_after_them_are_right(files, tmp_path):
    (first, second, _), data = files
    folder = os.open(tmp_path, os.O_RDONLY)
    reads = [
        read_of(first, 10, 100),
        read_of(second, LENGTH - 50, 60),
        read_of(second, LENGTH + 50, 60),
        read_of(second, 7, 9),
        read_of(folder, 0, 10),  # the kernel refuses it and begins none after it
        read_of(first, 3, 4),
    ]
    assert BatchedReads().read(reads)[:5] == [True, False, False, True, False]
    assert (bytes(reads[0][2][0]), bytes(reads[3][2][0])) == (data[0][10:110], data[1][7:16])
    os.close(folder)


def test_one_read_too_many_reads_and_too_many_buffers_are_left(files):
    descriptor = files[0][0]
    batched = BatchedReads()
    assert batched.read([read_of(descriptor, 0, 1)]) == [False]
    assert batched.read([read_of(descriptor, 0, 1)] * (MOST_READS + 1)) == [False] * (MOST_READS + 1)
    assert batched.read([read_of(descriptor, 0, *[1] * MOST_BUFFERS), read_of(descriptor, 0, 1)]) == [False, False]


def test_a_kernel_that_does_not_offer_it_leaves_all(files, monkeypatch):
    reads = [read_of(files[0][0], 0, 5)] * 2
    with monkeypatch.context() as patched:
        patched.setattr(batched_reads, "_CALLS", {})
        assert BatchedReads().read(reads) == [False, False]
    with monkeypatch.context() as patched:
        patched.setattr(sys, "maxsize", 2**31 - 1)  # of a 32-bit Python, whose system calls have other numbers
        assert BatchedReads().read(reads) == [False, False]
    assert bytes(reads[0][2][0]) == bytes(5)
    for refused in ("setup", "submit", "getevents"):  # a number that no call has: ENOSYS
        calls = {name: one._replace(**{refused: 100_000}) for name, one in batched_reads._CALLS.items()}
        with monkeypatch.context() as patched:
            patched.setattr(batched_reads, "_CALLS", calls)
            batched, before = BatchedReads(), contexts()
            for _ in range(2):
                assert batched.read(reads) == [False, False]
            del batched
            assert contexts() <= before  # what was submitted was waited for, so nothing is written any more


def test_empty_reads_are_read_in_full(files):
    descriptors, data = files
    reads = [read_of(descriptors[0], 5, 0), read_of(descriptors[0], 5, 0, 3, 0), read_of(descriptors[1], 7, 4)]
    assert BatchedReads().read(reads) == [True, True, True]
    assert (bytes(reads[1][2][1]), bytes(reads[2][2][0])) == (data[0][5:8], data[1][7:11])


def test_what_was_begun_is_waited_for_also_through_signals(files, monkeypatch):
    """Memory must not be given back while the kernel may write into it."""
    original, interrupted = batched_reads._Context._call, []

    def call(self, number, *arguments):
        if number == self._calls.getevents and len(interrupted) < 3:
            interrupted.append(number)
            ctypes.set_errno(4)
            return -1
        return original(self, number, *arguments)

    monkeypatch.setattr(batched_reads._Context, "_call", call)
    descriptors, data = files
    reads = [read_of(descriptors[0], 5, 10), read_of(descriptors[1], 6, 10)]
    assert BatchedReads().read(reads) == [True, True]
    assert (bytes(reads[1][2][0]), len(interrupted)) == (data[1][6:16], 3)


@pytest.mark.parametrize("when", ["submit", "getevents"])
def test_an_exception_between_reads_and_their_end_leaves_nothing_for_the_next_call(files, monkeypatch, when):
    """As Ctrl-C, which Python raises when the system call is over."""
    descriptors, data = files
    batched, before = BatchedReads(), contexts()
    assert batched.read([read_of(descriptors[0], 0, 10)] * 2) == [True, True]
    original = batched_reads._Context._call

    def call(self, number, *arguments):
        found = original(self, number, *arguments) if when == "submit" else 0
        if number == getattr(self._calls, when):
            raise KeyboardInterrupt
        return found if when == "submit" else original(self, number, *arguments)

    reads = [read_of(descriptors[0], 0, 10)] * MOST_READS
    with monkeypatch.context() as patched:
        patched.setattr(batched_reads._Context, "_call", call)
        with pytest.raises(KeyboardInterrupt):
            batched.read(reads)
    late = [read_of(descriptors[1], LENGTH + 5, 10), read_of(descriptors[1], 7, 10)]
    for _ in range(2):
        assert batched.read(late) == [False, True]
    assert bytes(late[1][2][0]) == data[1][7:17]
    assert contexts() == before + 1


def test_each_thread_has_a_context_which_goes_with_it(files):
    descriptors, data = files
    batched, before, most = BatchedReads(), contexts(), []
    together = threading.Barrier(4)

    def work(number):
        for start in range(0, 3000, 10):
            reads = [read_of(descriptors[number % 3], start, 10), read_of(descriptors[0], start, 5)]
            assert batched.read(reads) == [True, True]
            assert bytes(reads[0][2][0]) == data[number % 3][start : start + 10]
        together.wait(60)
        most.append(contexts())
        together.wait(60)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    gc.collect()
    assert most == [before + 4] * 4
    assert contexts() == before


def test_a_forked_process_makes_its_own(files):
    descriptors, data = files
    batched = BatchedReads()
    assert batched.read([read_of(descriptors[0], 0, 5)] * 2) == [True, True]

    def child():
        reads = [read_of(descriptors[1], 5, 10), read_of(descriptors[2], 6, 10)]
        whole = batched.read(reads) == [True, True] and bytes(reads[1][2][0]) == data[2][6:16]
        os._exit(0 if whole else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert batched.read([read_of(descriptors[0], 0, 5)] * 2) == [True, True]
