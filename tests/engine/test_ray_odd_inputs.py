"""Odd inputs through a build on Ray actors: the rows and rejects of the inline executor. Other places: `test_odd_inputs_places`."""

import pytest

import pipeline
from tests.engine.test_inline import assert_same_rows
from tests.odd_inputs import archives
from tests.odd_inputs.table import small
from tests.pipeline.test_odd_inputs_places import BY_NAME, write_folder
from tests.tiny_corpus import receipts, rows, tiny_flags, tiny_job

pytestmark = pytest.mark.ray

SAMPLE_OF_ROWS = (
    *("ts-restarts", "mkv-open-gop-cut", "ts-fields", "mkv-hidden-vp9", "palette-png", "mp4-two-edits"),
    *("h264-mkv-one-packet", "hevc-ts-one-packet--1", "encrypted-libx264", "audio-only"),
)


def test_both_executors_give_the_same_rows_and_rejects(ray_cluster, tmp_path):
    odds = [BY_NAME[name] for name in SAMPLE_OF_ROWS]
    folder = write_folder(tmp_path / "in", odds[::2])
    (folder / "rest.tar").write_bytes(archives.tar((odd.file_name, odd.data()) for odd in odds[1::2]))
    (folder / "ordinary.mp4").write_bytes(small())
    (folder / "deep.tar").write_bytes(archives.nested_json())
    settings = ("reject_budget=1", "clips.select=uniform:3")
    pipeline.encode(tiny_job(folder, tmp_path / "inline", *settings))
    flags = ["--executor", "ray", "--address", ray_cluster.address, "--set", "engine.decoder_cpus=0.5"]
    flags += [part for text in settings for part in ("--set", text)]
    run = ray_cluster.lathe("encode", folder, tmp_path / "ray", *tiny_flags(*flags))
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    inline, ray = (rows(tmp_path / executor) for executor in ("inline", "ray"))
    assert_same_rows(inline, ray)
    rejected = [
        sorted((r.key, r.clip, r.reason) for receipt in receipts(tmp_path / executor) for r in receipt.rejects)
        for executor in ("inline", "ray")
    ]
    assert rejected[0] == rejected[1]
    accounted = {row["source_key"] for row in inline.values()} | {key for key, _, _ in rejected[0]}
    assert {odd.name for odd in odds} | {"a", "deep", "z"} <= accounted
