"""Record of why an encoder process ended, read after it has ended."""

import os
import signal
import subprocess
import sys

import pytest

from pipeline.engine.worker import death_record
from pipeline.engine.worker.blamed_video import StepVideo
from pipeline.engine.worker.death_record import count_oom_kills, oom_file, take_death
from pipeline.engine.worker.load_progress import LoadProgress

PROGRAM = """
import os, sys
from pipeline.engine.worker.blamed_video import StepVideo
from pipeline.engine.worker.death_record import DeathRecord
record = DeathRecord()
print(record.path, flush=True)
record.stage("encode", [StepVideo("id", "s3://b/x.tar", "größer")] * 2)
os.kill(os.getpid(), int(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("number", "crash"), [(signal.SIGKILL, None), (signal.SIGSEGV, "segmentation fault (SIGSEGV)")]
)
def test_record_outlives_its_process_and_is_taken_once(number, crash):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(number))], capture_output=True, text=True, check=False
    )
    path = ended.stdout.strip()
    death = take_death(path)
    assert death is not None, ended.stderr
    assert (death.crash, death.stage) == (crash, "encode")
    assert death.videos == (StepVideo("id", "s3://b/x.tar", "größer"),)
    assert death.oom_file
    assert not [name for name in os.listdir(os.path.dirname(path)) if name.startswith(os.path.basename(path))]
    assert take_death(path) is None


class Crash:
    def __init__(self, path):
        self.path = path


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A record in this process; `events` counts memory kills."""
    events = tmp_path / "memory.events"
    events.write_text("low 0\nhigh 3\noom 1\noom_kill 4\noom_group_kill 0\n")
    monkeypatch.setattr(death_record, "CrashReport", lambda: Crash(str(tmp_path / "report")))
    monkeypatch.setattr(death_record, "oom_file", lambda: str(events))
    return death_record.DeathRecord(), events


def test_memory_kills_since_the_last_look_are_counted(record):
    made, events = record
    made.stage("encode")
    events.write_text("oom_kill 6\n")
    made.refresh()
    events.write_text("oom_kill 7\n")
    death = take_death(made.path)
    assert (death.oom_kills, death.oom_file) == (1, str(events))


def test_a_process_that_ends_in_good_order_leaves_nothing(record, tmp_path):
    made, events = record
    made.close()
    assert list(tmp_path.iterdir()) == [events]


def test_a_step_of_many_videos_with_endless_names_still_names_its_stage(record):
    made, _ = record
    made.stage("encode", [StepVideo("id", "u" * 3000, str(n)) for n in range(60)])
    death = take_death(made.path)
    assert (death.stage, death.videos) == ("encode", ())


def test_a_record_that_a_kill_cut_in_two_names_nothing(record):
    made, _ = record
    made.stage("encode")
    made._map[:4] = bytes(4)
    assert take_death(made.path).stage == ""


@pytest.mark.parametrize(
    ("line", "file", "text"),
    [
        ("0::/pod/box", "cg/pod/box/memory.events", "oom 1\noom_kill 5\n"),
        ("0::/../outside", "cg/memory.events", "oom_kill 5\n"),  # in a container the path may not exist
        ("11:cpu:/x\n4:memory:/box", "cg/memory/box/memory.oom_control", "under_oom 0\noom_kill 5\n"),
        ("11:cpu:/x", "proc/vmstat", "nr_free_pages 9\noom_kill 5\n"),
    ],
)
def test_memory_kills_are_read_from_the_cgroup_of_either_version_or_from_the_machine(tmp_path, line, file, text):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    found = oom_file(str(tmp_path / "proc"), str(tmp_path / "cg"))
    assert found == str(tmp_path / file)
    assert count_oom_kills(found) == 5
    assert count_oom_kills(str(tmp_path / "gone")) == 0


def test_progress_of_a_load_grows_with_work_of_its_thread_and_with_bytes_read_by_any(tmp_path):
    progress = LoadProgress()
    before = progress.value
    while progress.value == before:
        sum(range(10_000))
    file = tmp_path / "weights"
    file.write_bytes(bytes(4 << 20))
    before = progress.value
    file.read_bytes()
    assert progress.value >= before + 4
