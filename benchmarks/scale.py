"""The driver at the size of a cluster: CPU, memory, decisions a second; resume of a finished build. No video, no encoder, no GPU.

    python -m benchmarks.scale [--shards 100000] [--workers 100,1000] [--shard-seconds 60] [--seconds 60] [--profile] [--json FILE]

The real `Build`, with its dispatcher, outage watch, reject budget and heartbeat, drives simulated encoders (`simulated_workers.py`): 1 % of
the attempts fail, half of them in the store of the inputs, and encoders are preempted every two hours. Each part is a process of its own:

- `build`: all shards, on a clock that jumps. CPU microseconds a shard with few and with many encoders, peak memory of the process (torch,
  which identifies the network, and a connected Ray included), decisions a CPU second.
- `steady`: `--seconds` of the machine's clock with the most encoders and shards of `--shard-seconds`. Share of one core.
- `calls`: the same build over the real `RayPool` and actors that end a shard at once: CPU a shard with Ray. Times the event rate of
  `steady`, this is what Ray adds.
- `resume`: `pipeline.encode` over an output that has a receipt for every tar: with the cache of receipts that a build keeps, and without
  it, as after a build that was killed in its first ten minutes. The network is identified meanwhile; torch is most of that.

Results are CPU seconds of the driver's process, so that other work on the machine matters little.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import json
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.simulated_workers import COUNTS, Enough, SimulatedPool, clock_of
from benchmarks.tiny_shards import TINY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import EncodeJob
    from pipeline.engine.driver.build import Build
    from pipeline.engine.driver.report import BuildReport
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.engine.worker.pool import WorkerPool

BARS = {"core_percent": 30.0, "rss_mb": 500.0, "ratio": 1.5, "resume_s": 10.0}
WARM_UP_S = 10.0  # encoders come up over 5 s
CALLED_SHARDS = 3000
PROFILED = 10
LINKS = 1000  # names of one file


def job_of(inputs: str, output: str) -> EncodeJob:
    """A job whose network takes no time to identify."""
    from pipeline.config import build_job

    network = {
        "model.name": "leanvae",
        "model.config": TINY,
        "model.untrained": 0,
        "clips.frames": "9",
        "clips.size": "32x32",
    }
    return build_job({"inputs": [inputs], "output": output, "engine.executor": "inline", "progress": "none", **network})


def context_of(job: EncodeJob) -> BuildContext:
    """What `encode` makes of the job."""
    from pipeline import encoder
    from pipeline.engine.worker.build_context import make_context
    from pipeline.video.clips import resolve_rules

    network = encoder.identify(job.model)
    spec = network.spec
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    return make_context(job, rules, network, "cpu", "float32")


class Prepared:
    """Builds over `shards` tars that do not exist: the pool decides how an attempt ends."""

    def __init__(self, folder: str, shards: int) -> None:
        self.context = context_of(job_of(f"{folder}/in", f"{folder}/out"))
        self._folder, self._shards = folder, shards

    def build(self, pool: WorkerPool) -> tuple[Build, BuildReport]:
        """The build with this pool, not begun."""
        from pipeline.engine.driver.build import Build
        from pipeline.engine.driver.progress import Silent
        from pipeline.engine.driver.report import BuildReport
        from pipeline.records import Shard, SourceObject
        from pipeline.storage.local import LocalStore

        class Given:
            def meters(self) -> None:
                return None

            def pool(self, _context: BuildContext) -> WorkerPool:
                return pool

        todo = [
            Shard(
                "tar",
                f"in/{n:06d}.tar",
                (SourceObject(f"{self._folder}/in/{n:06d}.tar", 10**9 + n % 997, f"{10**18 + n}-{10**9 + n % 997}"),),
            )
            for n in range(self._shards)
        ]
        report = BuildReport(self._folder, self.context.fingerprint, "leanvae", True, "cpu", self._shards, 0)
        given: Any = Given()
        store = LocalStore(f"{self._folder}/out")
        return Build(todo, self.context, given, store, Silent(), report, time.monotonic()), report


def whole_build(folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Part `build`."""
    from pipeline.engine.ray import session

    session.connect("local", cpus=1, object_store_bytes=0)  # a driver has it in memory
    try:
        made = Prepared(folder, options.shards)
        before_mb = rss_mb()
        pool = SimulatedPool(made.context.fingerprint, int(options.workers), options.shard_seconds)
        begun = time.process_time()
        build, report = made.build(pool)
        with clock_of(pool), profiled(options):
            build.run()
        used = time.process_time() - begun - pool.cpu_s
    finally:
        session.disconnect()
    if (
        report.shards_done + len(report.failed) != options.shards
        or report.counts.clips != report.shards_done * COUNTS.clips
    ):
        raise SystemExit(f"{report.shards_done} done and {len(report.failed)} given up of {options.shards} shards")
    decisions = pool.counts["assigned"] + pool.counts["ended"] + pool.counts["preempted"]
    return {
        "workers": float(options.workers),
        "cpu_us_a_shard": used / options.shards * 1e6,
        "cpu_us_an_event": used / (decisions + pool.counts["pulses"]) * 1e6,
        "core_percent": 100 * used / pool.now(),
        "decisions_a_cpu_s": decisions / used,
        "before_mb": before_mb,
        "rss_mb": rss_mb(),
        **pool.counts,
        "given_up": len(report.failed),
        "hours": pool.now() / 3600,
    }


def steady(folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Part `steady`."""
    made = Prepared(folder, options.shards)
    limits = (WARM_UP_S, WARM_UP_S + options.seconds)
    pool = SimulatedPool(
        made.context.fingerprint, int(options.workers), options.shard_seconds, real=True, measured=limits
    )
    build, _ = made.build(pool)
    try:
        build.run()
    except Enough:
        pass
    else:
        raise SystemExit(f"{options.shards} shards ended within {limits[1]:g} s; give more shards or fewer --seconds")
    return {
        "core_percent": 100 * pool.measured_cpu_s / options.seconds,
        "ended_a_s": pool.counts["ended"] / options.seconds,
        "pulses_a_s": pool.counts["pulses"] / options.seconds,
    }


def instant_actor() -> Any:
    """Actor class with the calls of `EncoderActor` and no work."""
    import ray

    from pipeline.engine.ray.actors import Place
    from pipeline.engine.worker.shard_result import ShardResult
    from pipeline.engine.worker.worker_stats import WorkerStats
    from pipeline.records import Timings

    @ray.remote(num_cpus=0, max_concurrency=4)
    class Instant:
        """Actor with the calls of `EncoderActor` and no work."""

        def __init__(self, context: Any, _decoders: int, _threads: int) -> None:
            self._fingerprint = context.fingerprint

        def where(self) -> Place:
            return Place(str(ray.get_runtime_context().get_node_id()), "host", (), "no record")

        def load(self) -> dict[str, Any]:
            return {}

        def stats(self) -> WorkerStats:
            return WorkerStats(bytes_done={"0" * 32: 1, "1" * 32: 2})

        def run_shard(self, shard: Any, _blamed: Any, _ticket: int) -> ShardResult:
            shard_id = shard.id(self._fingerprint)
            return ShardResult(shard_id, True, COUNTS, COUNTS, Timings(), 10**9, {"too_short": 10}, 1)

        def hand_back(self, _shard_ids: list[str]) -> None:
            pass

        def shutdown(self) -> None:
            pass

    return Instant


def with_ray(folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Part `calls`."""
    from pipeline.engine.ray import session

    shards = min(options.shards, CALLED_SHARDS)
    cluster = session.connect("local", cpus=4, object_store_bytes=0)  # as two encoders and their decoders need
    try:
        from pipeline.engine.ray import pool as ray_pool

        ray_pool.EncoderActor = instant_actor()  # type: ignore[misc]
        made = Prepared(folder, shards)
        engine = made.context.job.engine.model_copy(update={"encoders": 2, "decoders": 1})
        job = made.context.job.model_copy(update={"engine": engine})
        made.context = dataclasses.replace(made.context, job=job)
        build, report = made.build(ray_pool.RayPool(made.context, cluster))
        begun = time.process_time()
        build.run()
        used = time.process_time() - begun
    finally:
        session.disconnect()
    if report.shards_done != shards:
        raise SystemExit(f"{report.shards_done} of {shards} shards done")
    return {"shards": shards, "cpu_us_a_shard": used / shards * 1e6}


def make_finished(folder: str, shards: int) -> None:
    """Tars of one byte in `in/`, and a receipt of each in `out/`, written plainly: flushing them to disk is not what is measured."""
    from benchmarks.publish import receipt_of
    from pipeline.corpus import resolve_inputs
    from pipeline.format.layout import CURRENT
    from pipeline.ledger.receipts import Ledger
    from pipeline.storage.local import LocalStore

    inputs, output = Path(folder, "in"), Path(folder, "out")
    inputs.mkdir()
    for n in range(shards):
        path = inputs / f"{n:06d}.tar"
        if n % LINKS:
            path.hardlink_to(inputs / f"{n // LINKS * LINKS:06d}.tar")
        else:
            path.write_bytes(b"x")
    job = job_of(str(inputs), str(output))
    context = context_of(job)
    Ledger(LocalStore(str(output))).prepare("benchmark")
    (output / CURRENT.receipts).mkdir()
    rng = np.random.default_rng(0)
    for n, shard in enumerate(resolve_inputs(job.inputs, job.storage)):
        made = dataclasses.replace(
            receipt_of(n, 0, rng),
            shard=shard,
            shard_id=shard.id(context.fingerprint),
            fingerprint=context.fingerprint,
            fingerprint_parts=context.fingerprint_parts,
            digests={shard.objects[0].uri: "0" * 32},
            limits=job.limits(),
        )
        (output / CURRENT.receipt_key(made.shard_id)).write_bytes(made.to_json())


def resume(folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Part `resume`: one run of `encode` that finds everything done, and its first two steps alone."""
    import pipeline
    from pipeline.corpus import resolve_inputs
    from pipeline.ledger.summaries import Summaries
    from pipeline.storage.local import LocalStore

    job = job_of(f"{folder}/in", f"{folder}/out")
    begun, cpu = time.perf_counter(), time.process_time()
    with profiled(options):
        report = pipeline.encode(job)
    found = {"wall_s": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu, "rss_mb": rss_mb()}
    if report.shards_before != options.shards:
        raise SystemExit(f"{report.shards_before} of {options.shards} shards were done before")
    begun = time.perf_counter()
    resolve_inputs(job.inputs, job.storage)
    listed = time.perf_counter()
    Summaries(LocalStore(f"{folder}/out")).all()
    return {**found, "list_s": listed - begun, "cached_summaries_s": time.perf_counter() - listed}


# --- running the parts ------------------------------------------------------------------------------------------------


@contextmanager
def profiled(options: argparse.Namespace) -> Iterator[None]:
    """With `--profile`: the functions that took most time themselves, on stderr."""
    profile = cProfile.Profile()
    if options.profile:
        profile.enable()
    yield
    profile.disable()
    if options.profile:
        pstats.Stats(profile, stream=sys.stderr).strip_dirs().sort_stats("tottime").print_stats(PROFILED)


def rss_mb() -> float:
    """Peak of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


PARTS = {"build": whole_build, "steady": steady, "calls": with_ray, "resume": resume}


def measured(part: str, folder: str, options: argparse.Namespace, workers: int, shard_s: float) -> dict[str, float]:
    """A part in a fresh process."""
    flags = {"part": part, "folder": folder, "shards": options.shards, "workers": workers}
    flags |= {"shard-seconds": shard_s, "seconds": options.seconds}
    command = [sys.executable, "-m", "benchmarks.scale", *(f"--{name}={value}" for name, value in flags.items())]
    child = subprocess.run(
        [*command, *(["--profile"] if options.profile else [])], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    print(part, workers, json.dumps({name: round(value, 3) for name, value in found.items()}), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", default="100,1000", help="numbers of encoders, the fewest first")
    parser.add_argument("--shard-seconds", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long `steady` measures")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--profile", action="store_true", help="cProfile's top ten of `build` and `resume`, on stderr")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder, options)))
        return
    wanted = options.only.split(",")
    fewest, most = (int(n) for n in (options.workers.split(",")[0], options.workers.split(",")[-1]))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lathe-scale-") as folder:
        if "build" in wanted:
            for n in (fewest, most):  # with shards that are as much shorter, fewer encoders end as many in a second
                found[f"build {n}"] = measured("build", folder, options, n, options.shard_seconds * n / most)
        for part in ("steady", "calls"):
            if part in wanted:
                found[part] = measured(part, folder, options, most, options.shard_seconds)
    if "resume" in wanted:
        with tempfile.TemporaryDirectory(prefix="lathe-scale-") as folder:
            make_finished(folder, options.shards)
            for what in ("uncached", "cached"):
                found[f"resume, {what}"] = measured("resume", folder, options, most, options.shard_seconds)
    print("\n".join(results(found, options, fewest, most)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


def results(found: dict[str, Any], options: argparse.Namespace, fewest: int, most: int) -> list[str]:
    """The lines that `run_all` reads."""
    lines = []
    if f"build {most}" in found:
        small, large = found[f"build {fewest}"], found[f"build {most}"]
        # Not of a shard: up to 200 encoders, more of them send more pulses a second, beyond that the pulses of each become rarer.
        ratio = large["cpu_us_an_event"] / small["cpu_us_an_event"]
        lines += [
            f"RESULT {large['rss_mb']:.0f} <= {BARS['rss_mb']:.0f} MB in the driver, {options.shards} shards, {most} encoders",
            f"RESULT {ratio:.2f} <= {BARS['ratio']} CPU of an event in the driver, of that with {fewest} encoders",
            f"RESULT {large['decisions_a_cpu_s']:.0f} decisions of the driver a CPU second, {most} encoders",
        ]
    if "steady" in found:
        share = found["steady"]["core_percent"]
        rate = found["steady"]["ended_a_s"] + found["steady"]["pulses_a_s"]
        lines += [f"RESULT {share:.1f} % of one core, {most} encoders, {rate:.0f} events a second, without Ray"]
        if "calls" in found:
            share += 100 * rate * found["calls"]["cpu_us_a_shard"] / 1e6
            lines += [
                f"RESULT {share:.1f} <= {BARS['core_percent']:g} % of one core with Ray's calls, shards of {options.shard_seconds:g} s"
            ]
    for what, bar in (("uncached", ""), ("cached", f" <= {BARS['resume_s']:g}")):
        if f"resume, {what}" in found:
            seconds, cpu_s = (found[f"resume, {what}"][name] for name in ("wall_s", "cpu_s"))
            lines.append(
                f"RESULT {cpu_s:.1f}{bar} CPU s to resume {options.shards} finished shards, receipts {what} ({seconds:.1f} s)"
            )
    return lines


if __name__ == "__main__":
    main()
