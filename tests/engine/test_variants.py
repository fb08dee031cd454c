"""A build with variants: rows, latents, counts, places in files, and what reads them. A decoder that dies changes nothing."""

from __future__ import annotations

import dataclasses
import io
from itertools import groupby

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import model
import pipeline
from pipeline.cli.why_wording import why_lines
from pipeline.config import StorageConfig
from pipeline.errors import DamagedInput
from pipeline.forecast.survey import forecast_job
from pipeline.format.index import read_index
from pipeline.ledger.candidate import gather
from pipeline.look.canary import canary_check
from pipeline.look.originals import Originals
from pipeline.look.preview import preview
from pipeline.look.stored import choose, facts, in_turns
from pipeline.operate.inspect import inspect_output
from pipeline.operate.verify import verify_output
from pipeline.operate.verify_files import misplaced_variant
from pipeline.operate.why import why
from pipeline.records import Reject, split_id
from pipeline.storage import open_store
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.writer import ShardWriter
from tests.pipeline.latent_clips import FINGERPRINT, METADATA, latent_clip
from tests.pipeline.test_cutting import by_clip, planes_of
from tests.tiny_corpus import TINY_NETWORK, receipts, rows, tiny_job, video_bytes, write_tar

VARIANTS = ("crop1", "crop2", "crop1-flip", "crop2-flip")
VIDEOS = {"a": video_bytes(11, 64, 144, seed=1), "b": video_bytes(5, 64, 144, seed=2), "c": video_bytes(5, seed=3)}


pytestmark = pytest.mark.usefixtures("single_thread")


def job_of(folder, *, output="out", **flags):
    flags = {"clips.crop": "random:2", "clips.variants": "flip", **flags}
    return tiny_job(folder / "000.tar", folder / output, **flags)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Clips of five frames: two of `a`, one of `b`, one of `c`, which leaves no choice of places. Four rows of each."""
    folder = tmp_path_factory.mktemp("variants")
    write_tar(folder / "000.tar", {key: {"mp4": data} for key, data in VIDEOS.items()})
    job = job_of(folder)
    pipeline.encode(job)
    return folder, job


@pytest.fixture(scope="module")
def stored(built):
    return rows(built[1].output)


def test_each_clip_has_a_row_for_each_variant(stored):
    found = {(row["source_key"], row["clip_index"], row["variant"]) for row in stored.values()}
    assert found == {(key, clip, name) for key, clip in (("a", 0), ("a", 1), ("b", 0), ("c", 0)) for name in VARIANTS}
    assert len(stored) == 16
    for name, row in stored.items():
        assert split_id(name)[1] == row["variant"]
        assert ("random_crops:1/2" in row["warnings"]) == (row["source_key"] == "c")


def test_latents_are_those_of_the_cropped_and_mirrored_frames(stored):
    """Encoded here in one piece; the frames are cut out of the scaled frame of another job, which has no variants."""
    network = model.load("leanvae", config=TINY_NETWORK, untrained=0)
    job = tiny_job("unused", "unused", **{"clips.size": "32x72"})
    rules = resolve_rules(job.clips, 4, 8, "leanvae", 1)
    for key in "ab":
        sample = pipeline.records.Sample(key, 0, "a.tar", VIDEOS[key], "mp4")
        cutter = Cutter(CutRequest(sample, rules, job.decode, 0, job.drill))
        opened = cutter.open()
        planes = by_clip([cutter.next() for _ in opened.clips])
        cutter.close()
        for row in (row for row in stored.values() if row["source_key"] == key):
            top, left, height, width = row["crop"]
            window = planes_of(planes[row["clip_index"]])[..., top : top + height, left : left + width]
            window = window[..., ::-1] if row["variant"].endswith("flip") else window
            with torch.inference_mode():
                posterior, _ = network.encode_planes(
                    torch.from_numpy(np.ascontiguousarray(window))[None], ["bt601"], None, moments=False
                )
            wanted = posterior.mean[0].numpy()
            latent = np.frombuffer(row["vae_latent_bytes"], "<f4").reshape(row["vae_latent_shape"])
            assert np.array_equal(latent, wanted)


def test_variants_are_neighbours_in_their_file_and_verify_looks_for_it(built):
    store = open_store(built[1].output, StorageConfig())
    (receipt,) = receipts(built[1].output)
    assert receipt.counts.clips == receipt.counts.clips_planned == 16
    assert receipt.fingerprint_parts["variant"] == ",".join(VARIANTS)
    for item in receipt.files:
        names = [split_id(row.id) for row in read_index(store.read(item.index_key))[0]]
        assert [variant for _, variant in names] == list(VARIANTS) * (len(names) // 4)
        assert all(len(list(group)) == 4 for _, group in groupby(names, key=lambda name: name[0]))
        index = read_index(store.read(item.index_key))[0]
    assert verify_output(store).ok
    assert misplaced_variant(index, VARIANTS) is None
    assert misplaced_variant(index[1:], VARIANTS)[0].startswith("row 0 is variant crop2 of ")
    assert misplaced_variant(index[:-1], VARIANTS) == (
        f"{len(index) - 1} rows",
        f"4 for each clip: {', '.join(VARIANTS)}",
    )
    assert misplaced_variant([*index[:4], index[5], index[4]], VARIANTS) is not None
    (made,) = inspect_output(store)["fingerprints"]
    assert made["fingerprint_parts"]["variant"] == ",".join(VARIANTS)


def test_a_plan_counts_rows_and_bytes_of_all_variants(built, stored):
    plan = forecast_job(built[1])
    assert (plan.clips, plan.frames) == (16, 80)
    assert plan.latent_bytes == sum(len(row["vae_latent_bytes"]) for row in stored.values())
    assert plan.warnings["random_crops"] == 1 == receipts(built[1].output)[0].warnings["random_crops"]


def test_variants_are_encoded_again_and_shown_from_their_source(built, tmp_path):
    store = open_store(built[1].output, StorageConfig())
    parts = gather(store, None, tmp_path).fresh_parts(store, 8)
    numbers = canary_check(StorageConfig(), clips=16)(store, parts).numbers
    assert (numbers["clips"], numbers["bit_exact"]) == (16, 16)
    originals, shown = Originals(StorageConfig()), {}
    for clip in in_turns(store, choose(store).receipts):
        row = facts(store, clip)
        if row["source_key"] == "b":
            with originals.open(clip, row) as frames:
                shown[row["variant"]] = frames.take(5)
    assert np.array_equal(shown["crop2-flip"], shown["crop2"][..., ::-1])
    assert not np.array_equal(shown["crop1"], shown["crop2"])
    found = preview(built[1].output, StorageConfig(), sheet=str(tmp_path / "sheet.png"), clips=3)
    shown = {row["key"]: row["variant"] for row in found["clips"]}
    assert shown == {"a": "crop1", "b": "crop2", "c": "crop1-flip"}  # a few clips are of all variants


def test_the_story_of_an_input_names_clip_and_variant_of_a_reject(built):
    story = why(open_store(built[1].output, StorageConfig()), "a", StorageConfig())
    reject = Reject("a", "decode", "corrupt_stream", "damaged", False, clip=6)
    story["versions"][0]["rejects"] = [dataclasses.asdict(reject)]
    assert "    reject    a clip 1 (crop1-flip): corrupt_stream (damaged): damaged" in why_lines(story)


def test_a_decoder_that_dies_between_variants_changes_no_row(built, stored, tmp_path):
    flags = {"drill.point": "in_decoder", "drill.marker_dir": str(tmp_path), "drill.times": 2}
    job = job_of(built[0], output="died", **flags)
    pipeline.encode(job)
    assert len(list(tmp_path.iterdir())) == 2
    assert rows(job.output) == stored
    assert verify_output(open_store(job.output, StorageConfig())).ok


def test_crops_do_not_depend_on_the_other_variants_and_other_rules_are_other_work(built, stored):
    job = job_of(built[0], **{"clips.crop": "random:1", "clips.variants": ""})
    pipeline.encode(job)
    found = {name: row for name, row in rows(job.output).items() if name not in stored}
    assert len(found) == 4
    first = {
        (row["source_key"], row["clip_index"]): (row["crop"], row["vae_latent_bytes"])
        for row in stored.values()
        if row["variant"] == "crop1"
    }
    again = {(row["source_key"], row["clip_index"]): (row["crop"], row["vae_latent_bytes"]) for row in found.values()}
    assert again == first
    assert len({row["fingerprint"] for row in (*found.values(), *stored.values())}) == 2


def test_variants_are_written_together_or_not_at_all(tmp_path):
    """A row group has space for three rows: clips of two are not divided, and one with a value that is not finite leaves nothing."""
    store = open_store(str(tmp_path / "out"), StorageConfig())
    job = tiny_job("unused", "unused", **{"write.dtype": "float16", "write.row_group_bytes": 128 * 1024})

    def clip(seed: int, **changes: object) -> list:
        made = latent_clip(seed, bucket=pipeline.records.Bucket(17, 256, 256), **changes)
        pair = [
            dataclasses.replace(
                made, id=f"{made.id}{end}", plan=dataclasses.replace(made.plan, index=n, variant=name, variants=2)
            )
            for n, (name, end) in enumerate((("base", ""), ("flip", "-flip")))
        ]
        return pair

    with ShardWriter(
        store,
        tmp_path / "spool",
        job.write,
        shard_id="0" * 32,
        attempt="attempt",
        fingerprint=FINGERPRINT,
        metadata=METADATA,
        layout=pipeline.format.layout.CURRENT,
        drill=job.drill,
    ) as writer:
        writer.add(*clip(2))
        bad = clip(0)
        array = bad[1].latent_CTHW.copy()
        array[0, 0, 0, 0] = np.inf
        with pytest.raises(DamagedInput, match="latent of clip 1 has values from"):
            writer.add(bad[0], dataclasses.replace(bad[1], latent_CTHW=array))
        writer.add(*clip(0))
        writer.add(*reversed(clip(1)))
        (written,), _ = writer.finish()
    file = pq.ParquetFile(io.BytesIO(store.read(written.key)))
    names = [name for group in range(file.num_row_groups) for name in file.read_row_group(group)["id"].to_pylist()]
    assert sorted(names) == sorted(f"video0000{n}-0000{end}" for n in range(3) for end in ("", "-flip"))
    assert all(second == f"{first}-flip" for first, second in zip(names[::2], names[1::2], strict=True))
    assert all(file.metadata.row_group(group).num_rows % 2 == 0 for group in range(file.num_row_groups))
