"""Picture sheet of a few stored clips: original above, decoded below.

Takes an output, finished or not. Writes a PNG and returns a JSON-ready description. The choice of clips depends on the output only: buckets
in turn, within a bucket shards in turn, within a shard videos in turn. A clip whose source is gone or has changed is named and skipped; if
all are, decoded pictures are shown alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, OutputError
from pipeline.ledger.addresses import open_output
from pipeline.look.originals import UNAVAILABLE, Originals
from pipeline.look.stored import choose, encoder_of, facts, in_turns, latent_bytes
from pipeline.records import BASE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.config import StorageConfig
    from pipeline.look.showing import LatentDecoder, Picture
    from pipeline.look.stored import StoredClip
    from pipeline.storage import Store

FILE_NAME = "preview.png"
MISSES = 8  # clips without a source that are skipped, for each clip asked for


@dataclass(slots=True)
class _Shown:
    """Clips on the sheet, and clips that were skipped."""

    pictures: list[Picture] = field(default_factory=list)
    clips: list[dict[str, Any]] = field(default_factory=list)
    passed: list[tuple[StoredClip, dict[str, Any], str]] = field(default_factory=list)

    def add(self, picture: Picture, row: dict[str, Any]) -> None:
        self.pictures.append(picture)
        self.clips.append({**_names(row), "psnr": picture.psnr})


def preview(
    output: str,
    storage: StorageConfig,
    *,
    sheet: str | None = None,
    clips: int = 6,
    checkpoint: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Writes the sheet. Returns `sheet` (its path), `clips`, `without_original`, `network`, `notices`.

    Args:
        output: folder or `s3://bucket/prefix` that `lathe encode` wrote; `OUTPUT@3` for snapshot 3.
        storage: access to the output and the sources.
        sheet: a local file; None: `preview.png` in the output, or in the current folder if that is not local.
        clips: how many to show at most.
        checkpoint: present place of the weights, instead of the URI in the data files.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: no clip to show, weights that are missing or not those of the latents, a sheet that cannot be written.
        NonFiniteLatent: the network gave NaN or infinity.
    """
    if clips < 1:
        raise ConfigError(f"--clips: expected at least 1, got {clips}")
    store, number = open_output(output, storage)
    path = _sheet_path(sheet, store)
    chosen = choose(store, number)

    from pipeline.look.showing import LatentDecoder, save_sheet

    decoder = LatentDecoder(encoder_of(store, chosen.receipts, storage), checkpoint, device)
    notices = list(decoder.notices)
    if chosen.other_networks:
        notices.append(
            f"the output holds latents of {chosen.other_networks + 1} networks; only those of the newest are shown"
        )
    shown = _show_clips(store, in_turns(store, chosen.receipts), decoder, storage, clips)
    if not shown.clips:
        notices.append("NO ORIGINALS: no source could be read, so decoded pictures are shown alone")
        for clip, row, _ in shown.passed[:clips]:
            shown.add(decoder.show(clip, latent_bytes(store, clip), None), row)
    save_sheet(path, shown.pictures, [_title(row) for row in shown.clips])
    return {
        "output": store.root,
        "network": decoder.facts(),
        "clips": shown.clips,
        "without_original": [{**_names(row), "reason": reason} for _, row, reason in shown.passed],
        "notices": notices,
        "sheet": str(path),
    }


def _show_clips(
    store: Store, offered: Iterable[StoredClip], decoder: LatentDecoder, storage: StorageConfig, wanted: int
) -> _Shown:
    """Clips beside their originals until there are `wanted`, or too many without one."""
    originals, shown = Originals(storage), _Shown()
    for clip in offered:
        if len(shown.clips) == wanted or len(shown.passed) == MISSES * wanted:
            break
        row = facts(store, clip)
        latent = latent_bytes(store, clip)
        try:
            with originals.open(clip, row) as frames:
                shown.add(decoder.show(clip, latent, frames), row)
        except UNAVAILABLE as error:
            shown.passed.append((clip, row, error.message))
    return shown


def _sheet_path(sheet: str | None, store: Store) -> Path:
    """Where the sheet goes, checked before anything is loaded."""
    if sheet is None:
        return Path.cwd() / FILE_NAME if "://" in store.root else Path(store.root) / FILE_NAME
    if "://" in sheet or not sheet.lower().endswith(".png"):
        raise OutputError(f"--sheet {sheet}: expected a local file whose name ends in .png")
    if not Path(sheet).absolute().parent.is_dir():
        raise OutputError(f"--sheet {sheet}: its folder does not exist; make it, or name another file")
    return Path(sheet).absolute()


def _names(row: dict[str, Any]) -> dict[str, Any]:
    """Names and numbers of a clip, for the report."""
    named = {"key": row["source_key"], "clip": row["clip_index"], "variant": row["variant"], "bucket": row["bucket"]}
    return {"id": row["id"], **named, "frames": row["num_frames"], "fps": row["fps"], "source": row["source_uri"]}


def _title(row: dict[str, Any]) -> str:
    quality = "no original" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
    variant = "" if row["variant"] == BASE else f", {row['variant']}"
    return f"{quality}  {row['bucket']}  {row['key']}, clip {row['clip']}{variant}"
