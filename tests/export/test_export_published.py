"""`lathe export` of published outputs: rows through the loader, options, the command's lines, deltas over snapshots."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.export_wording import export_lines
from pipeline.config import WriteConfig
from pipeline.errors import ConfigError, InputError
from pipeline.export.dataset import PublishedRows
from pipeline.export.models import CUSTOM
from pipeline.export.run import Report
from pipeline.export.targets import TARGETS, Request, export_output
from pipeline.export.wds import Wds
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.publish import PublishOptions, publish
from tests.export.memory_rows import MemoryRows, files_in, run, wan_row
from tests.export.test_export_tars import loaded, samples_of
from tests.loader.outputs import SHORT, WIDE, clip_of, mixed_shards, write_output
from tests.pipeline.latent_clips import latent_values

NAMED = (("short", "another"),)  # besides the caption


def expected(clip):
    """Values that were written, float32, before rounding to the stored type."""
    return latent_values(clip.sample.index, clip.num_frames, clip.plan.bucket)


@pytest.fixture(scope="module", params=["parquet", "tar"])
def output(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output")
    stored = {"dtype": "float32", "moments": True, "store": ("first_frame", "i2v_cond")}
    config = WriteConfig(format=request.param, **stored)
    return write_output(folder / "out", folder / "spool", mixed_shards(**stored, captions=NAMED), config)


def test_rows_come_with_their_facts_and_in_any_choice(output):
    rows = PublishedRows(output.uri)
    listed = list(rows)
    assert {row.id for row in listed} == set(output.clips)
    for row in listed:
        clip = output.clips[row.id]
        assert (row.num_frames, row.height, row.width) == (
            clip.num_frames,
            clip.plan.bucket.height,
            clip.plan.bucket.width,
        )
        assert row.bucket == f"{row.num_frames}x{row.height}x{row.width}"
    chosen = [listed[n] for n in (7, 3, 20, 4)]
    for row, latent in zip(chosen, rows.latents(chosen), strict=True):
        assert np.array_equal(latent.mean.numpy(), expected(output.clips[row.id]))
        assert latent.logvar is not None
    rows.close()


def members_of(directory):
    tars = [directory / name for name in files_in(directory) if name.endswith(".tar")]
    return {key: members for path in tars for key, members in samples_of(path).items()}


def test_a_tar_export_of_a_filter_holds_the_latents(output, tmp_path):
    members = ("latent=latent.pt", "logvar=logvar.npy", "caption=prompt.txt", "captions=all.json", "metadata=json")
    members += ("i2v_cond=cond.pt", "first_frame=first.png")
    request = Request("wds", normalize="none", members=members, where="num_frames > 1")
    report = export_output(output.uri, str(tmp_path / "out"), request)
    found = members_of(tmp_path / "out")
    wanted = {name: clip for name, clip in output.clips.items() if clip.num_frames > 1}
    assert found.keys() == wanted.keys()
    assert report.rows == len(wanted)
    for name, clip in wanted.items():
        assert np.array_equal(loaded(found[name]["latent.pt"]).numpy(), expected(clip))
        assert np.load(io.BytesIO(found[name]["logvar.npy"])).shape == expected(clip).shape
        assert found[name]["prompt.txt"].decode() == (clip.sample.caption or "")
        named = {"captions": [clip.sample.caption, "another"], "names": ["caption", "short"]}
        assert json.loads(found[name]["all.json"]) == named
        facts = json.loads(found[name]["json"])
        assert (facts["num_frames"], facts["captions"]) == (clip.num_frames, named["captions"])
        assert np.array_equal(loaded(found[name]["cond.pt"]).numpy(), clip.cond_CTHW)
        assert found[name]["first.png"][:4] == b"\x89PNG"
        assert np.array_equal(pixels(found[name]["first.png"]), pixels(clip.first_frame))


def pixels(data):
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture)


def test_members_that_are_not_stored_are_refused(tmp_path):
    rows = MemoryRows(rows=[wan_row("a-0000-aa")])
    with pytest.raises(ConfigError, match="--member first_frame: the output does not store it; encode with --store"):
        run(Wds, rows, tmp_path, as_=CUSTOM, normalize="none", members=("first_frame=first.webp",))


def test_the_next_snapshot_is_a_delta(tmp_path):
    made = write_output(tmp_path / "out", tmp_path / "spool", [[clip_of(n, SHORT) for n in range(3)]])
    request = Request("wds", normalize="none")
    export_output(made.uri, str(tmp_path / "tars"), request)
    more = write_output(tmp_path / "out", tmp_path / "spool", [[clip_of(100 + n, WIDE) for n in range(2)]], first=1)
    publish(more.store, PublishOptions(delta=False))
    report = export_output(made.uri, str(tmp_path / "tars"), request)
    assert (report.kept, report.added, report.removed) == (3, 2, 0)
    report = export_output(f"{made.uri}@1", str(tmp_path / "tars"), request)
    assert (report.kept, report.added, report.removed) == (3, 0, 2)
    assert members_of(tmp_path / "tars").keys() == set(made.clips)


def test_rows_taken_down_since_the_snapshot_leave_the_folder(tmp_path):
    made = write_output(tmp_path / "out", tmp_path / "spool", [[clip_of(n, SHORT) for n in range(3)]])
    request = Request("wds", normalize="none")
    export_output(made.uri, str(tmp_path / "tars"), request)
    gone, *stay = sorted(made.clips)
    record_takedown(made.store, "asked", ids=[gone])
    report = export_output(made.uri, str(tmp_path / "tars"), request)
    assert (report.kept, report.added, report.removed) == (2, 0, 1)
    assert sorted(members_of(tmp_path / "tars")) == stay


def test_the_command_prints_what_it_did_and_refuses_in_one_line(output, tmp_path):
    command = ["export", "--to", "wds", "--normalize", "none", output.uri, str(tmp_path / "tars")]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "45 rows of snapshot 1 for wds (custom): 45 added, 0 kept, 0 removed" in first.stdout
    assert "  9x32x24: 18 rows" in first.stdout
    again = CliRunner().invoke(app, [*command, "--json"])
    assert json.loads(again.stdout)["kept"] == 45
    refused = CliRunner().invoke(app, ["export", "--to", "fastvideo", output.uri, str(tmp_path / "tars")])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("lathe: error: --as: none of the trainer's models")


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_has_its_next_step(target):
    values = Report(
        target, "wan", "out", 1, folders={f"{n}x32x32": 1 for n in range(20)}, caches_removed=["x"] * 20
    ).to_dict()
    lines = export_lines(values | {"repaired": 2, "notices": ["careful"]})
    assert "  and 8 more folders" in lines
    assert "  note: careful" in lines
    assert target == "wds" or any("train with" in line for line in lines)


def test_options_that_do_not_fit(output, tmp_path):
    for request, message in [
        (Request("finetrainers"), "--to: expected one of fastvideo, ltx2, musubi, automodel, megatron-bridge, wds"),
        (Request("wds"), "--normalize: say whether"),
        (Request("wds", normalize="yes"), "--normalize: expected model or none, got 'yes'"),
        (Request("wds", normalize="none", as_model="wan"), "--as: wds is for no model"),
        (Request("ltx2", members=("latent=x.pt",)), "--member: ltx2 decides it"),
        (Request("fastvideo"), "--as: none of the trainer's models is known to use latents of"),
        (Request("fastvideo", as_model="waan"), "--as: expected one of wan, hunyuan, cosmos, ltx2, custom, got 'waan'"),
        (Request("wds", normalize="none", members=("latent",)), "--member: expected CONTENT=SUFFIX"),
        (
            Request("wds", normalize="none", members=("latent=latent.txt",)),
            "expected a suffix that ends in pt, pth, npy",
        ),
        (Request("wds", normalize="none", members=("latent=a.pt", "caption=a.pt")), "ends in txt, json"),
        (Request("wds", normalize="none", members=("latent=a.pt", "latent=a.pt")), "a.pt is given twice"),
        (Request("wds", normalize="none", dtype="int8"), "--dtype: expected one of float32, float16, bfloat16"),
    ]:
        with pytest.raises(ConfigError, match=message):
            export_output(output.uri, str(tmp_path / "new"), request)
    with pytest.raises(ConfigError, match="give a local folder"):
        export_output(output.uri, "s3://bucket/prefix", Request("wds", normalize="none"))
    with pytest.raises(InputError, match="give the embeddings as --sidecar SET or --text-embeddings"):
        export_output(output.uri, str(tmp_path / "new"), Request("wds", normalize="none", members=("text=embed.pt",)))
    assert not (tmp_path / "new").exists()
