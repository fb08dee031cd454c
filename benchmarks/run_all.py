"""Runs the benchmarks behind the README's numbers and prints one table of their results: `make bench`.

    python -m benchmarks.run_all [--quick] [--only NAME,...] [--videos FILE ...]

Each benchmark is a process of its own that prints lines `RESULT VALUE [>= BAR | <= BAR] NAME`; they become the table. Run it on an idle
machine. `--quick` runs the smallest settings to see that everything works; its numbers mean nothing and bars are left out. Benchmarks that
cannot run here are listed with the reason. Exit code 1 if a benchmark fails, or if a bar is missed without `--quick`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = re.compile(r"RESULT (\S+)(?: (>=|<=) (\S+))? (.+)")


@dataclass(frozen=True)
class Entry:
    """A benchmark with its arguments for README numbers and for `--quick`. `needs`: `gpu`, `videos` or nothing."""

    script: str
    arguments: str = ""
    quick: str = ""
    needs: str = ""


ENTRIES = (
    Entry(
        "networks",
        "--networks leanvae-dim16 --sizes 17x256x256,17x512x512 --no-decode",
        "--networks leanvae-dim16 --sizes 5x32x32 --repeats 1 --no-decode --no-memory",
    ),
    Entry(
        "networks",
        "--networks wfvae-s,ivvae-z4 --sizes 17x256x256 --dtypes float32 --repeats 1 --budget 600 --no-decode --memory-size 64x64",
        "--networks wfvae-s --sizes 5x32x32 --dtypes float32 --repeats 1 --no-decode --no-memory",
    ),
    Entry("networks", "--device cuda", "--device cuda --sizes 17x256x256 --repeats 1 --no-memory", needs="gpu"),
    Entry("compiled", "", "--networks leanvae-mini-dim16 --clip 5x32x32 --dtypes float32"),
    Entry("end_to_end", "", "--videos 4 --executor inline"),
    Entry("long_video", "", "--minutes 0.05,0.1 --formats parquet --size 32x32"),
    Entry("tiny_shards", "", "--shards 4"),
    Entry("uniform_clips", "", "--minutes 1 --repeats 1"),
    Entry("slow_store", "", "--shards 1 --repeats 1 --latency 0.01"),
    Entry("start", "", "--files 1000 --folders 10"),
    Entry("scale", "", "--shards 400 --workers 2,4 --shard-seconds 1 --seconds 1"),
    Entry("delta_log", "", "--files 100"),
    Entry("publish", "", "--shards 100"),
    Entry("compact", "", "--mebibytes 2 --file-mebibytes 1"),
    Entry("report", "", "--clips 400"),
    Entry("loader", "", "--quick"),
    Entry("decode_only", "", "--seconds 1.2 --repeats 1"),
    Entry("write_only", "", "--mebibytes 4"),
    Entry("quality", "--videos", "--videos", needs="videos"),
)
# Benchmarks that print figures without a bar, for people who change what they measure.
NOT_RUN = {
    "precision": "states errors, no bar",
    "storage_types": "states sizes and errors, no bar",
    "synthetic_rate": "states a rate, no bar",
    "training_memory": "states memory, no bar",
    "loss_curve": "draws a picture",
    "letter_statistics": "writes data of the reader, measures nothing",
    "clients": "compares values, see `make clients`",
    "loader_peers": "part of loader",
}
REASONS = {"gpu": "no CUDA device", "videos": "needs --videos hiker.mp4 nasa_13013.mp4"}


@dataclass(frozen=True)
class Result:
    """One number of a benchmark. `relation` and `bar` are empty where the benchmark only states it."""

    name: str
    value: str
    relation: str = ""
    bar: str = ""

    @property
    def verdict(self) -> str:
        """`ok`, `MISSED`, or nothing where there is no bar."""
        if not self.bar:
            return ""
        value, bar = float(self.value), float(self.bar)
        return "ok" if (value >= bar if self.relation == ">=" else value <= bar) else "MISSED"


def results(output: str) -> list[Result]:
    """The RESULT lines of a benchmark's output."""
    found = [match for line in output.splitlines() if (match := RESULT.fullmatch(line.strip()))]
    return [
        Result(name, value, relation or "", bar or "") for value, relation, bar, name in (m.groups() for m in found)
    ]


def table(rows: list[Result]) -> str:
    """Name, value, bar and verdict in columns."""
    cells = [
        ("what", "value", "bar", ""),
        *((row.name, row.value, f"{row.relation} {row.bar}".strip(), row.verdict) for row in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in cells)


def run(entry: Entry, arguments: list[str]) -> tuple[int, list[Result]]:
    """Runs one benchmark, passing its output on. Returns its exit code and results."""
    command = [sys.executable, "-m", f"benchmarks.{entry.script}", *arguments]
    print(f"== {' '.join(command[1:])}", flush=True)
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            lines.append(line)
            if not line.startswith("RESULT "):
                print(line, end="", flush=True)
    return process.returncode, results("".join(lines))


def available(need: str, options: argparse.Namespace) -> bool:
    """Whether this machine and these options have what an entry needs."""
    if need == "gpu":
        import torch

        return torch.cuda.is_available()
    return need != "videos" or bool(options.videos)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="The benchmarks behind the README's numbers, with one table at the end."
    )
    parser.add_argument("--quick", action="store_true", help="smallest settings: does everything run?")
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--videos", nargs="+", default=[], help="real videos for `quality`")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [entry.script for entry in ENTRIES]
    rows, notes = [], []
    for entry in (entry for entry in ENTRIES if entry.script in wanted):
        if not available(entry.needs, options):
            notes.append(f"{entry.script}: left out, {REASONS[entry.needs]}")
            continue
        arguments = (entry.quick if options.quick else entry.arguments).split()
        code, found = run(entry, [*arguments, *(options.videos if entry.needs == "videos" else [])])
        rows += [Result(row.name, row.value) for row in found] if options.quick else found
        if code:
            notes.append(f"{entry.script}: FAILED with exit code {code}")
    print(f"\n{table(rows)}\n")
    print(
        "\n".join([*notes, *(["quick settings: the numbers mean nothing, bars are left out"] if options.quick else [])])
    )
    failed = any("FAILED" in note for note in notes)
    missed = any(row.verdict == "MISSED" for row in rows)
    return int(failed or missed)


if __name__ == "__main__":
    sys.exit(main())
