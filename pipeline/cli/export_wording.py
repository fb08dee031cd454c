"""Result of `lathe export` as lines of text, with what to set in the trainer."""

from __future__ import annotations

from typing import Any

from pipeline.units import quantity

LISTED_FOLDERS = 12


def export_lines(values: dict[str, Any]) -> list[str]:
    """Lines for the `to_dict` of a `Report`."""
    changes = f"{values['added']} added, {values['kept']} kept, {values['removed']} removed"
    rows = f"{quantity(values['rows'], 'row')} of snapshot {values['snapshot']}"
    lines = [f"{values['directory']}: {rows} for {values['target']} ({values['model']}): {changes}"]
    if values["repaired"]:
        lines.append(f"  {quantity(values['repaired'], 'row')} had lost files, or files of another size: written again")
    folders = list(values["folders"].items())
    lines += [f"  {name}: {quantity(rows, 'row')}" for name, rows in folders[:LISTED_FOLDERS] if name != "."]
    if len(folders) > LISTED_FOLDERS:
        lines.append(f"  and {len(folders) - LISTED_FOLDERS} more folders")
    lines += [f"  removed {name}, made before this change" for name in values["caches_removed"][:LISTED_FOLDERS]]
    if len(values["caches_removed"]) > LISTED_FOLDERS:
        lines.append(f"  and {len(values['caches_removed']) - LISTED_FOLDERS} more files of the trainer's caches")
    lines += [f"  note: {notice}" for notice in values["notices"]]
    return [*lines, *_next(values)]


def _next(values: dict[str, Any]) -> list[str]:
    place, folders = values["directory"], list(values["folders"])
    first = f"{place}/{folders[0]}" if folders else place
    return {
        "fastvideo": [f"train with --data_path {first}: one bucket at a time, rows of a batch have one shape"],
        "ltx2": [
            f"train with preprocessed_data_root: {place}"
            + ("; batch_size 1, since there are several buckets" if len(folders) > 1 else "")
        ],
        "musubi": [f"train with --dataset_config {place}/dataset.toml"],
        "automodel": [f"train with cache_dir: {first}: one number of frames at a time"],
        "megatron-bridge": [
            f"run `energon prepare {place} --split-parts 'train:.*'` (Crude sample)",
            f"train with dataset.path={place} and dataset.seq_length of at least {values['numbers'].get('tokens', 0)}",
        ],
        "wds": [],
    }[values["target"]]
