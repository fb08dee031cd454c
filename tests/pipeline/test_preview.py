"""`lathe preview` on small outputs: every pixel of the sheet against an independent computation, refusals, missing sources."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import model
import pipeline
from model.colour import yuv_to_video
from model.metrics.fidelity import ClipMeter
from model.metrics.frames import frame_psnr
from pipeline.cli.app import app
from pipeline.cli.preview_wording import preview_lines
from pipeline.config import DecodeConfig, DrillConfig, StorageConfig
from pipeline.encoder.network import network_of
from pipeline.errors import CheckpointError, InputError, NotFound, OutputError
from pipeline.format.index import IndexRow
from pipeline.look.originals import Originals
from pipeline.look.preview import preview
from pipeline.look.showing import LatentDecoder
from pipeline.look.stored import StoredClip, choose, facts, in_turns, latent_bytes
from pipeline.records import FrameChunk, Sample
from pipeline.storage import open_store
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from tests.tiny_corpus import TINY_NETWORK, tiny_job, video_bytes, write_tar

GAP, LINE, FRAME_GAP = 8, 16, 2  # of a sheet: around blocks, the title, between pictures


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def vae():
    return model.load("leanvae", config=TINY_NETWORK, untrained=0)


VIDEOS = {"a": video_bytes(13, seed=1), "b": video_bytes(9, 64, 144, seed=2), "c": video_bytes(9, seed=3)}


@pytest.fixture(scope="module")
def tar_job(tmp_path_factory):
    """Two tars into tars: 13 frames square and 9 wider than their bucket in one, 9 square in the other; moments, bfloat16."""
    folder = tmp_path_factory.mktemp("tars")
    (folder / "corpus").mkdir()
    first = {"0": {"mp4": b"not a video" * 9}, **{key: {"mp4": VIDEOS[key]} for key in "ab"}}
    write_tar(
        folder / "corpus" / "000.tar", first
    )  # samples without a video count: numbers do not start with the first clip
    write_tar(folder / "corpus" / "001.tar", {"c": {"mp4": VIDEOS["c"]}})
    flags = {"clips.size": "32x32,32x64", "write.format": "tar", "write.dtype": "bfloat16", "write.moments": True}
    job = tiny_job(folder / "corpus", folder / "out", **flags)
    pipeline.encode(job)
    return job


@pytest.fixture(scope="module")
def file_job(tmp_path_factory):
    """Two plain files into Parquet, float32, sampled faster than their frames come, so that some stay for two positions."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "corpus").mkdir()
    for key in "ac":
        (folder / "corpus" / f"{key}.mp4").write_bytes(VIDEOS[key])
    job = tiny_job(folder / "corpus", folder / "out", "clips.min_fps_ratio=0.5", **{"clips.fps": "10"})
    pipeline.encode(job)
    return job


def seen(job, vae, key, number):
    """Planes `T 3 H W` and matrix of clip `number` of a video, as a decoder process cuts them for the encoder."""
    spec = vae.spec
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    cutter = Cutter(CutRequest(Sample(key, 0, key, VIDEOS[key], "mp4"), rules, DecodeConfig(), 0, DrillConfig()))
    cutter.open()
    while isinstance(chunk := cutter.next(), FrameChunk):
        if chunk.clip == number:
            cutter.close()
            return torch.from_numpy(chunk.planes_T3HW), chunk.color_matrix
    raise AssertionError(f"{key} has no clip {number}")


def eight_bits(video, vae):
    low, high = vae.spec.value_range
    return ((video - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)[0]


def stored(job):
    """(key, clip number) -> the clip, where it lies."""
    store = open_store(job.output, StorageConfig())
    found = {}
    for clip in in_turns(store, choose(store).receipts):
        row = facts(store, clip)
        found[row["source_key"], row["clip_index"]] = store, clip, row
    return found


def latent_of(store, clip):
    data = np.frombuffer(latent_bytes(store, clip), {"float32": "<f4", "bfloat16": "<u2"}[clip.row.dtype])
    if clip.row.dtype == "bfloat16":
        data = (data.astype("<u4") << 16).view("<f4")
    return torch.from_numpy(data.reshape(clip.row.shape).copy())


def block(picture, left, row):
    """Original and decoded frames of the sheet's block at `left`: uint8 `3 T H W` of the three shown."""
    height, width = row["crop"][2:]
    pixels = torch.from_numpy(np.asarray(picture).copy())
    tops = GAP + LINE, GAP + LINE + height + FRAME_GAP
    lefts = [left + i * (width + FRAME_GAP) for i in range(3)]
    return [torch.stack([pixels[y : y + height, x : x + width].permute(2, 0, 1) for x in lefts], dim=1) for y in tops]


@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_sheet_shows_the_original_above_the_decoded_latent(container, request, vae, tmp_path):
    job = request.getfixturevalue("tar_job" if container == "tar" else "file_job")
    account = preview(job.output, StorageConfig(), sheet=str(tmp_path / "sheet.png"))
    clips, picture, left = stored(job), Image.open(account["sheet"]), GAP
    in_turn = {
        "tar": ["a0", "b0", "c0", "a1"],
        "parquet": ["a0", "c0", "a1", "c1", "a2"],
    }  # buckets, then shards, then videos
    assert [f"{row['key']}{row['clip']}" for row in account["clips"]] == in_turn[container]
    assert len(clips) == len(in_turn[container])
    for shown in account["clips"]:
        store, clip, row = clips[shown["key"], shown["clip"]]
        planes, matrix = seen(job, vae, shown["key"], shown["clip"])
        latent = latent_of(store, clip)
        if container == "parquet":  # float32 keeps what the encoder gave: the planes are the ones it got
            assert torch.equal(vae.encode_planes(planes[None], [matrix])[0].mean[0], latent)
        original = eight_bits(yuv_to_video(planes[None], [matrix], vae.spec.value_range), vae)
        decoded = eight_bits(vae.decode(latent[None])[0], vae)
        above, below = block(picture, left, row)
        assert torch.equal(above, original[:, [0, 2, 4]])
        assert torch.equal(below, decoded[:, [0, 2, 4]])
        assert not torch.equal(above, below)
        meter = ClipMeter(1, 4)
        meter.add(original, decoded)
        assert shown["psnr"] == pytest.approx(meter.result().psnr, abs=1e-5)  # float32 logarithms there
        assert (shown["bucket"], shown["frames"]) == (f"v5x32x{row['crop'][3]}", 5)
        left += 3 * (row["crop"][3] + FRAME_GAP) - FRAME_GAP + GAP
    assert picture.size == (left, 2 * GAP + LINE + 2 * 32 + FRAME_GAP)
    assert account["without_original"] == []
    assert account["notices"] == ["UNTRAINED random weights (seed 0): the decoded pictures are meaningless"]


def test_psnr_equals_values_computed_by_hand():
    """A frame 10 too dark everywhere: 10 log10(255^2 / 100). One equal frame: 100 dB. One value of twelve wrong by 6: 255^2 / 3."""
    original, other = torch.full((3, 3, 2, 2), 50, dtype=torch.uint8), torch.full((3, 3, 2, 2), 50, dtype=torch.uint8)
    other[:, 0] = 40
    other[1, 2, 1, 1] = 56
    assert frame_psnr(original, other) == pytest.approx([28.130803608679106, 100.0, 43.35959106148165])


class NumberedFrames:
    """Grey frames, each four code values brighter than the one before."""

    matrix = "bt709"

    def __init__(self):
        self.taken = 0

    def take(self, count):
        numbers = np.arange(self.taken, self.taken + count, dtype=np.uint8)
        self.taken += count
        planes_T3HW = np.full((count, 3, 32, 32), 128, np.uint8)
        planes_T3HW[:, 0] = 16 + 4 * numbers[:, None, None]
        return planes_T3HW


@pytest.mark.parametrize("network", ["leanvae", "wfvae", "ivvae"])
def test_decoding_in_parts_equals_decoding_at_once(network):
    """Also where the decoder holds frames back: originals wait for them."""
    fixture = Path(__file__).parents[1] / "fixtures" / f"{network}-tiny.json"
    vae = model.load(network, config=json.loads(fixture.read_text())["config"], untrained=0)
    found = network_of(vae.identity(), moments=False)
    encoder = {**found.identity, "numerics": vae.numerics - 1, "checkpoint": found.provenance}
    screen = LatentDecoder(encoder, None, "cpu")
    assert "version" in screen.notices[1]  # of the arithmetic
    latent = torch.randn((vae.spec.latent_channels, 11, 4, 4), generator=torch.Generator().manual_seed(3))
    row = IndexRow(
        "x", 0, 0, 0, "", None, None, None, tuple(latent.shape), "float32", "vnx32x32", 41, "u", "k", "", None
    )
    shown = screen.show(StoredClip(None, None, row), latent.numpy().tobytes(), NumberedFrames())
    at_once = eight_bits(vae.decode(latent[None])[0], vae)
    assert torch.equal(shown.decoded_CTHW, at_once[:, [0, 16, 40]])
    luma = [round(4 * number * 255 / 219) for number in (0, 16, 40)]
    assert shown.original_CTHW.flatten(2).unique(dim=2).squeeze(2).tolist() == [luma] * 3
    numbered = yuv_to_video(torch.from_numpy(NumberedFrames().take(41))[None], ["bt709"], vae.spec.value_range)
    assert shown.psnr == pytest.approx(np.mean(frame_psnr(eight_bits(numbered, vae), at_once)))


@contextmanager
def moved(path, other=None):
    """The file is away, or has the bytes `other`, for as long as the context lasts."""
    aside = path.with_suffix(".aside")
    path.rename(aside)
    if other is not None:
        path.write_bytes(other)
    try:
        yield
    finally:
        aside.replace(path)


def source(job, name):
    return Path(job.inputs[0]) / name


def test_clip_without_its_source_is_reported_and_the_next_one_shown(file_job, tmp_path):
    with moved(source(file_job, "a.mp4")):
        account = preview(file_job.output, StorageConfig(), sheet=str(tmp_path / "p.png"), clips=1)
    assert [(row["key"], row["clip"]) for row in account["clips"]] == [("c", 0)]
    assert account["clips"][0]["psnr"] > 0
    (passed,) = account["without_original"]
    assert (passed["key"], passed["bucket"]) == ("a", "v5x32x32")
    assert passed["reason"] == f"{source(file_job, 'a.mp4')} does not exist"


def test_missing_source_is_looked_up_once(file_job):
    _, clip, row = stored(file_job)["a", 0]
    originals = Originals(StorageConfig())
    with moved(source(file_job, "a.mp4")):
        with pytest.raises(NotFound), originals.open(clip, row):
            pass
    with pytest.raises(NotFound), originals.open(clip, row):  # though it is back
        pass


def test_source_with_other_contents_is_reported(file_job, tmp_path):
    with moved(source(file_job, "a.mp4"), VIDEOS["b"]):
        account = preview(file_job.output, StorageConfig(), sheet=str(tmp_path / "p.png"), clips=1)
    assert [row["key"] for row in account["clips"]] == ["c"]
    assert account["without_original"][0]["reason"].startswith(
        f"a of {source(file_job, 'a.mp4')} has changed: its hash"
    )


def test_copied_source_is_accepted(file_job, tmp_path):
    with moved(source(file_job, "a.mp4"), VIDEOS["a"]):  # another time, the same contents
        account = preview(file_job.output, StorageConfig(), sheet=str(tmp_path / "p.png"), clips=1)
    assert ([row["key"] for row in account["clips"]], account["without_original"]) == (["a"], [])


def test_rewritten_tar_gives_the_videos_it_still_has(tar_job, tmp_path):
    again, sheet = tmp_path / "again.tar", str(tmp_path / "p.png")

    def shown(contents):
        write_tar(again, {key: {"mp4": video} for key, video in contents.items()})
        with moved(source(tar_job, "000.tar"), again.read_bytes()):
            account = preview(tar_job.output, StorageConfig(), sheet=sheet)
        reasons = {f"{row['key']}{row['clip']}": row["reason"] for row in account["without_original"]}
        return [f"{row['key']}{row['clip']}" for row in account["clips"]], reasons

    assert shown({"b": VIDEOS["b"], "a": VIDEOS["a"]}) == (["a0", "b0", "c0", "a1"], {})
    keys, reasons = shown({"a": VIDEOS["c"]})
    assert keys == ["c0"]
    where = source(tar_job, "000.tar")
    assert reasons["a0"].startswith(f"a of {where} has changed: its hash is ")
    assert reasons["b0"] == f"b of {where} is no longer there: no sample of that key can be read"


def test_decoded_pictures_are_shown_alone_without_any_source(tar_job, vae, tmp_path):
    with moved(source(tar_job, "000.tar")), moved(source(tar_job, "001.tar")):
        account = preview(tar_job.output, StorageConfig(), sheet=str(tmp_path / "p.png"), clips=2)
    assert [(row["key"], row["psnr"]) for row in account["clips"]] == [("a", None), ("b", None)]
    assert any(text.startswith("NO ORIGINALS") for text in account["notices"])
    lines = preview_lines({**account, "without_original": account["without_original"] * 4})
    assert sum(line.endswith("decoded only") for line in lines) == 2
    assert sum("skipped: " in line for line in lines) == 8
    assert "  and 8 more without a source" in lines
    store, clip, row = stored(tar_job)["a", 0]
    above, below = block(Image.open(account["sheet"]), GAP, row)
    assert above.unique().tolist() == [255]
    assert torch.equal(below, eight_bits(vae.decode(latent_of(store, clip)[None])[0], vae)[:, [0, 2, 4]])


def weights_of(path, seed):
    network = model.load("leanvae", config=TINY_NETWORK, untrained=seed).network
    save_file({key: value.detach().clone() for key, value in network.state_dict().items()}, path)
    return str(path)


def test_only_the_recorded_weights_are_used(file_job, tmp_path):
    sheet = str(tmp_path / "p.png")
    right, wrong = weights_of(tmp_path / "right.safetensors", 0), weights_of(tmp_path / "wrong.safetensors", 1)
    account = preview(file_job.output, StorageConfig(), sheet=sheet, clips=1, checkpoint=right)
    assert account["network"]["checkpoint"]["uri"] == right
    assert account["notices"] == []  # a file with these values, wherever they are from
    Path(sheet).unlink()
    with pytest.raises(
        CheckpointError, match=r"the weights of .*wrong\.safetensors are not those the latents were made with: .*\w{64}"
    ):
        preview(file_job.output, StorageConfig(), sheet=sheet, clips=1, checkpoint=wrong)
    newest = choose(open_store(file_job.output, StorageConfig())).newest
    encoder = newest.fingerprint_parts["encoder"] | {"untrained": False}
    recorded = {"uri": str(tmp_path / "moved.safetensors"), "config": TINY_NETWORK}
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at .*moved\.safetensors.*--checkpoint where they are now"
    ):
        LatentDecoder({**encoder, "checkpoint": recorded}, None, "cpu")
    assert not Path(sheet).exists()


def test_a_damaged_latent_is_not_shown(file_job, tmp_path):
    output = shutil.copytree(file_job.output, tmp_path / "out")
    _, clip, _ = stored(file_job)["a", 0]
    with open(output / clip.file.key, "r+b") as file:
        file.seek(clip.row.latent_offset)
        first = file.read(1)
        file.seek(clip.row.latent_offset)
        file.write(bytes([first[0] ^ 1]))
    with pytest.raises(InputError, match=f"the latent of {clip.row.id} is damaged"):
        preview(str(output), StorageConfig())
    assert not (output / "preview.png").exists()


def test_unfinished_output_shows_its_clips_and_an_empty_one_is_an_error(tar_job, tmp_path):
    output = shutil.copytree(tar_job.output, tmp_path / "out")
    done = stored(tar_job)["c", 0][1].receipt.shard_id
    for path in (output / "_receipts").iterdir():
        if done not in path.name:
            path.unlink()
    account = preview(str(output), StorageConfig())
    assert [row["key"] for row in account["clips"]] == ["c"]
    assert account["sheet"] == str(output / "preview.png")
    shutil.rmtree(output / "_receipts")
    with pytest.raises(InputError, match="has no finished shard yet"):
        preview(str(output), StorageConfig())
    with pytest.raises(OutputError, match="is not a latent set"):
        preview(str(tmp_path / "nothing"), StorageConfig())


def test_latents_of_the_newest_network_are_shown(tar_job, tmp_path):
    output = shutil.copytree(tar_job.output, tmp_path / "out")
    other = stored(tar_job)["a", 0][1].receipt.shard_id
    path = output / "_receipts" / f"{other}.json"
    receipt = json.loads(path.read_text())
    receipt["fingerprint_parts"]["encoder"]["latent_weights_sha256"] = "0" * 64
    path.write_text(json.dumps(receipt | {"created": "2001-01-01T00:00:00+00:00"}))
    account = preview(str(output), StorageConfig())
    assert [row["key"] for row in account["clips"]] == ["c"]
    assert "the output holds latents of 2 networks; only those of the newest are shown" in account["notices"]


def test_the_command_ends_with_the_path_of_the_sheet(tar_job):
    result = CliRunner().invoke(app, ["preview", tar_job.output, "--clips", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "leanvae, UNTRAINED random weights, float32 on cpu"
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["a,", "clip", "0", "v5x32x32"],
        ["b,", "clip", "0", "v5x32x64"],
    ]
    assert all(line.endswith(" dB") for line in lines[1:3])
    assert lines[3].startswith("UNTRAINED")
    assert lines[-1] == str(Path(tar_job.output) / "preview.png")
    with Image.open(lines[-1]) as picture:
        assert picture.format == "PNG"
    answer = json.loads(CliRunner().invoke(app, ["preview", tar_job.output, "--clips", "1", "--json"]).stdout)
    assert [row["key"] for row in answer["clips"]] == ["a"]
    assert lines[1].endswith(f"{answer['clips'][0]['psnr']:.2f} dB")


@pytest.mark.parametrize(
    ("sheet", "complaint"),
    [
        ("s3://bucket/p.png", "expected a local file"),
        ("p.jpg", "ends in .png"),
        ("nowhere/p.png", "folder does not exist"),
    ],
)
def test_invalid_sheet_path_is_refused_first(sheet, complaint, tar_job):
    result = CliRunner().invoke(app, ["preview", tar_job.output, "--sheet", sheet])
    assert (result.exit_code, complaint in result.stderr) == (2, True), result.output


@pytest.mark.s3
@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_sheet_of_a_remote_output_is_in_the_current_folder(container, request, s3, tmp_path, monkeypatch):
    job = request.getfixturevalue("tar_job" if container == "tar" else "file_job")
    bucket = open_store(f"{s3.root}/out", s3.config())
    for path in (path for path in Path(job.output).rglob("*") if path.is_file() and path.suffix != ".png"):
        bucket.upload(path, path.relative_to(job.output).as_posix())
    monkeypatch.chdir(tmp_path)
    there, here = preview(f"{s3.root}/out", s3.config(), clips=2), preview(job.output, StorageConfig(), clips=2)
    assert (there["sheet"], there["clips"]) == (str(tmp_path / "preview.png"), here["clips"])
