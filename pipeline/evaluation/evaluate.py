"""`lathe evaluate`: entry point. Connects corpus, reader, decoders, network and metrics.

Takes an `EncodeJob` whose output is the folder to write, and files with weights for LPIPS and I3D. Returns a summary, and writes
`summary.json`, `clips.parquet`, `rejects.jsonl`, `sheet.png`, `plots/`. Clips are read, cut and converted as `lathe encode` does; each goes
through the network chunk by chunk, so memory depends neither on the corpus nor on a clip's length.
"""

from __future__ import annotations

import importlib.util
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.corpus import PassedOver, job_annotations, resolve_inputs
from pipeline.encoder.network import cuda_available, known_spec, resolve_device
from pipeline.errors import ConfigError, InputError, OutputError
from pipeline.video.clips import chunk_length, resolve_rules
from pipeline.video.image_rules import with_images

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.config import EncodeJob
    from pipeline.corpus import Annotations
    from pipeline.encoder import LatentSpec
    from pipeline.evaluation.measuring import Findings, Instruments
    from pipeline.evaluation.rows import ClipRows
    from pipeline.records import ClipRules

EXTRA = ("matplotlib",)
SMALLEST_SIDE = 11  # pixels of SSIM's window
NEWS_S = 15.0


def evaluate(
    job: EncodeJob,
    *,
    lpips: Sequence[str] = (),
    i3d: str | None = None,
    fvd: str = "tf",
    news: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measures every clip of the corpus and writes the folder `job.output`. `news` is called with a line every 15 seconds.

    `fvd` names the protocol of rFVD: `tf`, `styleganv` or `videogpt`.

    Raises:
        UsageError: the command is wrong, for example weights that do not fit; nothing was measured.
        InputError: no clip of the corpus is usable; gives the reasons.
        NonFiniteLatent: the network returned NaN or infinity.
    """
    folder = _checked_folder(job.output)
    _check_extra()
    if (known := known_spec(job.model)) is not None:
        _rules(job, known)  # rejects frame counts and sizes before anything is loaded
    with job_annotations(job) as tables:
        return _evaluate(job, folder, tables, lpips, i3d, fvd, news)


def _evaluate(
    job: EncodeJob,
    folder: Path,
    tables: Annotations,
    lpips: Sequence[str],
    i3d: str | None,
    fvd: str,
    news: Callable[[str], None],
) -> dict[str, Any]:
    shards = resolve_inputs(
        job.inputs, job.storage, passed_over := PassedOver(), job.images.policy, tables, job.member_rule
    )
    if job.strict:
        passed_over.refuse()
    if passed_over:
        news(passed_over.line())
    cuda = job.model.device.startswith("cuda") or (job.model.device == "auto" and cuda_available())
    device, dtype = resolve_device(job.model.device, job.model.compute_dtype, cuda=cuda)

    from pipeline.engine.decoders.sample_stream import SampleStream
    from pipeline.evaluation.measuring import Findings, Instruments
    from pipeline.evaluation.rows import ClipRows
    from pipeline.evaluation.samples import SamplesInProgress

    instruments = Instruments(job, device, dtype, lpips, i3d, fvd)
    rules = _rules(job, instruments.spec)
    _check_lpips(instruments, rules)
    _make(folder)
    findings = Findings(job.write.dtype, fvd)
    with ClipRows(folder / "clips.parquet", folder / "rejects.jsonl") as rows:
        samples = SamplesInProgress(instruments, findings, rows)
        spec = instruments.spec
        length = chunk_length(job.engine.chunk_frames, spec.time_stride, chunked=spec.chunking != "none")
        with SampleStream(job, shards, rules, length, device, with_rows=tables.with_rows) as stream:
            reported = time.monotonic()
            for event in stream:
                samples.take(event)
                if time.monotonic() - reported > NEWS_S:
                    reported = time.monotonic()
                    news(f"{findings.clips} clips so far, mean PSNR {findings.mean_psnr:.2f} dB")
    if not findings.clips:
        raise InputError(_no_clip_message(rows, samples.videos))
    summary = {
        "format_version": 1,
        "lathe_version": version("lathe"),
        "network": instruments.facts(),
        "conventions": instruments.conventions(),
        "inputs": list(job.inputs),
        "clips": rules.to_dict(),
        "lpips": list(lpips) or None,
        "i3d": i3d,
        "videos": samples.videos,
        **findings.summary(),
        "rejected": {"total": rows.rejected, "reasons": rows.reasons},
    }
    return _write(summary, findings, folder)


def _write(summary: dict[str, Any], findings: Findings, folder: Path) -> dict[str, Any]:
    """Writes pictures and then the summary: if the summary exists, everything does."""
    from pipeline.evaluation.plots import write_plots

    findings.write_sheet(folder / "sheet.png")
    write_plots(summary, folder / "plots")
    summary["folder"] = str(folder)
    summary["files"] = ["summary.json", "clips.parquet", "rejects.jsonl", "sheet.png", "plots/"]
    (folder / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False), encoding="utf-8")
    return summary


def _checked_folder(output: str) -> Path:
    if "://" in output:
        raise OutputError(f"--output {output}: an evaluation is written to a local folder; give its path")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--output {output}: is a file; give a new or empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"--output {output}: the folder is not empty; give a new one")
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {folder}: cannot be created ({error.strerror}); give another folder") from error


def _check_extra() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"evaluation needs {' and '.join(missing)}; install them: pip install 'lathe[training]'")


def _rules(job: EncodeJob, spec: LatentSpec) -> ClipRules:
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    rules = with_images(rules, job.images, job.clips, spec.network)
    sides = _sides(rules)
    if rules.area is not None and rules.multiple_of < SMALLEST_SIDE:
        enough = -(-SMALLEST_SIDE // spec.space_stride) * spec.space_stride
        raise ConfigError(
            f"clips.multiple_of: SSIM needs sides of at least {SMALLEST_SIDE} pixels, but with an area a side can be as small as "
            f"{rules.multiple_of}; set it to {enough}"
        )
    if min(sides, default=SMALLEST_SIDE) < SMALLEST_SIDE:
        raise ConfigError(
            f"clips.size, images.size: SSIM needs sides of at least {SMALLEST_SIDE} pixels, got {min(sides)}; use larger ones"
        )
    return rules


def _sides(rules: ClipRules) -> list[int]:
    """Sides of the buckets of videos and images, pixels."""
    buckets = (*rules.buckets, *(() if rules.images is None else rules.images.buckets))
    return [side for bucket in buckets for side in (bucket.height, bucket.width)]


def _check_lpips(instruments: Instruments, rules: ClipRules) -> None:
    if instruments.lpips is None:
        return
    smallest, label = instruments.lpips.backbone.smallest, instruments.lpips.backbone.label
    least = min(_sides(rules), default=rules.multiple_of)
    if least < smallest:
        raise ConfigError(
            f"clips.size: {label} needs sides of at least {smallest} pixels, got {least}; use larger ones (with an area: clips.multiple_of)"
        )


def _no_clip_message(rows: ClipRows, videos: int) -> str:
    if not rows.rejected:
        return f"no clip to measure: {videos} videos in the inputs have none"
    reasons = [
        f"{reason} {item['count']} ({', '.join(item['keys'])}: {item['message']})"
        for reason, item in rows.reasons.items()
    ]
    return f"no clip to measure, everything was rejected (each in rejects.jsonl of the output): {'; '.join(reasons)}"
