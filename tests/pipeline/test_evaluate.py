"""`lathe evaluate` on real files: every number compared with a separate computation, refusals, decoders that die."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import model
from pipeline.cli.app import app
from pipeline.config import DecodeConfig, DrillConfig, build_job
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import _check_lpips, evaluate
from pipeline.records import FrameChunk, Sample, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from tests.tiny_corpus import TINY_NETWORK, write_tar
from tests.video_files import encode, textured

SIDE = 48


@functools.cache  # the encoder's bytes are not the same twice
def picture(frames, start=0):
    """Gradients and a moving block, as 64x64 H.264."""
    return encode([textured(start + n, 64, 64) for n in range(frames)])


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder with a network's configuration and weights."""
    network = model.load("leanvae", config=TINY_NETWORK, untrained=0)
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(network.config))
    weights = network.network.state_dict()
    save_file({key: value.detach().clone() for key, value in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards; 9, 18, 3 frames and rubbish in the first, 9 in the second."""
    folder = tmp_path_factory.mktemp("corpus")
    first = {"a": picture(9), "b": picture(18, 5), "c": picture(3), "d": b"not a video" * 100}
    write_tar(folder / "000.tar", {key: {"mp4": video} for key, video in first.items()})
    write_tar(folder / "001.tar", {"e": {"mp4": picture(9, 30)}})
    return folder


def job_of(corpus, output, checkpoint, **flags):
    values = {
        "inputs": [str(corpus)],
        "output": str(output),
        "model.name": "leanvae",
        "model.checkpoint": str(checkpoint),
        "clips.frames": "5,9",
        "clips.size": f"{SIDE}x{SIDE}",
        "clips.select": "tile",
        "engine.decoders": 1,
        **flags,
    }
    return build_job(values)


@pytest.fixture(scope="module")
def run(corpus, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "folder"
    return evaluate(job_of(corpus, folder, checkpoint)), folder


def by_hand(video, plan_rules, vae):
    """PSNR per frame and clip, from the decoder's planes through the network's public methods, in numpy."""
    sample = Sample("x", 0, "x", video, "mp4")
    cutter = Cutter(CutRequest(sample, plan_rules, DecodeConfig(), 0, DrillConfig()))
    cutter.open()
    found = []
    while not isinstance(chunk := cutter.next(), VideoEnded):
        assert isinstance(chunk, FrameChunk)
        planes = torch.from_numpy(chunk.planes_T3HW)[None]
        decoded = vae.decode(vae.encode_planes(planes, [chunk.color_matrix])[0].mean)[0][0].double().numpy()
        kr, kb = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}[chunk.color_matrix]
        y, u, v = (chunk.planes_T3HW[:, i].astype(float) - (16, 128, 128)[i] for i in range(3))
        y, u, v = y / 219, u / 224, v / 224
        red, blue = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
        green = (y - kr * red - kb * blue) / (1 - kr - kb)
        original = np.clip(np.rint(np.stack([red, green, blue]) * 255), 0, 255)
        other = np.clip(np.rint((decoded + 0.5) * 255), 0, 255)
        found.append(10 * np.log10(255**2 / np.square(original - other).mean((0, 2, 3))))
    return found


def test_every_row_equals_a_plain_computation(run, corpus, checkpoint):
    _, folder = run
    rows = pq.read_table(folder / "clips.parquet").to_pylist()
    assert [(row["key"], row["clip"], row["bucket"]) for row in rows] == [
        *(("a", 0, f"9x{SIDE}x{SIDE}"), ("b", 0, f"9x{SIDE}x{SIDE}"), ("b", 1, f"9x{SIDE}x{SIDE}")),
        ("e", 0, f"9x{SIDE}x{SIDE}"),
    ]
    vae = model.load("leanvae", str(checkpoint))
    job = job_of(corpus, "x", checkpoint)
    rules = resolve_rules(job.clips, 4, 8, "leanvae", 1)
    want = [
        *by_hand(picture(9), rules, vae),
        *by_hand(picture(18, 5), rules, vae),
        *by_hand(picture(9, 30), rules, vae),
    ]
    for row, frames in zip(rows, want, strict=True):
        # a pixel whose value lies on the edge between two 8-bit ones may round either way
        assert row["frame_psnr"] == pytest.approx(frames.tolist(), abs=1e-3)
        assert row["psnr"] == pytest.approx(frames.mean(), abs=1e-3)
        assert row["psnr_of_mse"] == pytest.approx(-10 * np.log10(np.mean(10 ** (-frames / 10))), abs=1e-3)
        assert len(row["frame_ssim"]) == 9
        assert row["ssim"] == pytest.approx(np.mean(row["frame_ssim"]), abs=1e-6)
        assert row["ssim_by_position"] == pytest.approx(
            [np.mean(row["frame_ssim"][1 + p :: 4]) for p in range(4)], abs=1e-6
        )
        assert row["lpips"] is None


def test_the_summary_agrees_with_rows_and_rejects(run):
    summary, folder = run
    rows = pq.read_table(folder / "clips.parquet").to_pylist()
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    overall = summary["overall"]
    assert (overall["clips"], overall["frames"], summary["videos"]) == (4, 36, 5)
    for name in ("psnr", "psnr_of_mse", "ssim"):
        assert overall[name]["mean"] == pytest.approx(np.mean([row[name] for row in rows]))
    assert 0 < overall["degree"] < 1
    # 4 channels x 3 x 6 x 6 in 16 bits for 9 x 48 x 48 pixels
    assert overall["bits_per_pixel"] == pytest.approx(4 * 3 * 36 * 16 / (9 * SIDE * SIDE))
    assert overall["compression_ratio"] == pytest.approx(24 / overall["bits_per_pixel"])
    assert len(summary["latents"]["mean"]) == 4
    assert summary["latents"]["values_per_channel"] == 4 * 3 * 36
    assert (summary["lpips"], summary["rfvd"]["rfvd"]) == (None, None)
    reasons = summary["rejected"]["reasons"]
    assert summary["rejected"]["total"] == 2
    assert reasons["too_short"] | {"message": ""} == {"count": 1, "policy": True, "keys": ["c"], "message": ""}
    (damage,) = (item for item in reasons.values() if not item["policy"])
    assert damage["keys"] == ["d"]
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["c", "d"]


def test_pictures_are_drawn(run):
    _, folder = run
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    assert sheet.shape[0] >= 2 * SIDE
    assert sheet.shape[1] >= 4 * 3 * SIDE
    names = ["psnr_by_frame.png", "psnr_histogram.png", "ssim_by_position.png"]
    assert sorted(path.name for path in (folder / "plots").iterdir()) == names
    for name in names:
        assert np.asarray(Image.open(folder / "plots" / name).convert("L")).std() > 5


def test_chunk_size_decoders_and_a_dying_decoder_change_no_number(run, corpus, checkpoint, tmp_path):
    flags = {"engine.decoders": 2, "engine.chunk_frames": 4, "drill.point": "in_decoder"}
    flags |= {"drill.marker_dir": str(tmp_path / "markers")}
    again = evaluate(job_of(corpus, tmp_path / "out", checkpoint, **flags))
    assert len(list((tmp_path / "markers").iterdir())) == 1
    assert again["rejected"] == run[0]["rejected"]
    assert again["overall"]["psnr"] == run[0]["overall"]["psnr"]
    for name, values in run[0]["latents"].items():
        assert again["latents"][name] == pytest.approx(values)  # merged in other parts
    tables = [pq.read_table(folder / "clips.parquet") for folder in (tmp_path / "out", run[1])]
    exact = [name for name in tables[0].column_names if "ssim" not in name]  # its sums are float32
    assert tables[0].select(exact).equals(tables[1].select(exact))
    ours, theirs = (table.column("frame_ssim").combine_chunks().flatten().to_numpy() for table in tables)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_the_command_prints_a_table_or_json_with_lpips_and_rfvd_if_weights_are_given(
    corpus, checkpoint, tmp_path, monkeypatch
):
    from model.metrics import i3d
    from model.metrics.perceptual import LPIPS

    monkeypatch.setattr(i3d, "SIDE", 32)  # a window of 224 pixels is most of a test's time
    lpips, heads, network = LPIPS().state_dict(), {}, i3d.I3D().state_dict()
    for key in [key for key in lpips if key.startswith("heads.")]:
        heads[f"lin{key.removeprefix('heads.')}.model.1.weight"] = lpips.pop(key)
    for name, weights in (("vgg", lpips), ("heads", heads), ("i3d", network)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    arguments = ["evaluate", str(corpus / "000.tar"), "--model", "leanvae", "--checkpoint", str(checkpoint)]
    arguments += ["--frames", "9", "--size", "32x32", "--clips", "tile", "--set", "engine.decoders=1"]
    arguments += ["--lpips", str(tmp_path / "vgg.safetensors"), "--lpips", str(tmp_path / "heads.safetensors")]
    arguments += ["--i3d", str(tmp_path / "i3d.safetensors"), "--fvd", "styleganv"]
    answer = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out"), "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["overall"]["lpips"]["mean"] > 0
    assert found["rfvd"]["windows"] == 3
    assert found["rfvd"]["rfvd"] >= 0
    assert (found["rfvd"]["protocol"], found["rfvd"]["window_frames"]) == ("styleganv", None)
    assert found["conventions"]["lpips"] == "LPIPS-VGG"
    assert "without the 5 pixels at each border" in found["conventions"]["ssim"]
    from pipeline.cli.evaluation_wording import evaluation_lines

    text = "\n".join(evaluation_lines(found))
    assert f"{found['overall']['psnr']['mean']:.2f}" in text
    assert f"{found['rfvd']['rfvd']:.2f} over 3 whole clips" in text
    assert "too_short" in text


def refused(*arguments, output, checkpoint):
    answer = CliRunner().invoke(
        app, ["evaluate", *map(str, arguments), "--output", str(output), "--checkpoint", str(checkpoint)]
    )
    return answer.exit_code, answer.output


def test_bad_commands_get_one_line_that_says_what_to_do(corpus, checkpoint, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "a.txt").write_text("a")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    new, ours = tmp_path / "new", ("--model", "leanvae-dim16")
    cases = [
        ((corpus,), full, "the folder is not empty; give a new one"),
        ((corpus,), full / "a.txt", "is a file; give a new or empty folder"),
        ((corpus,), "s3://bucket/x", "a local folder"),
        (
            (corpus, "--model", "leanvae", "--size", "48x48"),
            full / "a.txt" / "b",
            "cannot be created (Not a directory)",
        ),
        ((corpus, *ours, "--size", "50x48"), new, "sides that are multiples of 8, got 50x48"),
        ((corpus, *ours, "--frames", "16"), new, "takes 4n+1 frames, got 16"),
        ((corpus, *ours, "--size", "8x48"), new, "at least 11 pixels, got 8"),
        (
            (corpus, *ours, "--size", "48x48", "--set", "images.policy=keep", "--set", "images.size=8x48"),
            new,
            "at least 11 pixels, got 8",
        ),
        (
            (corpus, *ours, "--set", "clips.multiple_of=8", "--size", "area:64x64"),
            new,
            "can be as small as 8; set it to 16",
        ),
        ((corpus / "nothing.tar", *ours), new, "nothing.tar"),
        ((corpus, "--model", "leanvae", "--lpips", other), new, f"--lpips {other}: the weights"),
        ((corpus, "--model", "leanvae", "--i3d", other), new, f"--i3d {other}: the weights"),
        ((corpus, "--model", "leanvae", "--i3d", tmp_path / "none.pt"), new, "none.pt"),
        (
            (corpus, "--model", "leanvae", *("--lpips", other) * 3),
            new,
            "expected one file, or features and heads; got 3",
        ),
        (
            (corpus, "--model", "leanvae", "--fvd", "tfgan"),
            new,
            "--fvd: expected one of tf, styleganv, videogpt; got 'tfgan'",
        ),
    ]
    for arguments, output, message in cases:
        code, text = refused(*arguments, output=output, checkpoint=checkpoint)
        assert code == 2, (arguments, text)
        assert message in text, (arguments, text)
        assert text.count("\n") == 1
    assert not new.exists()


def test_frames_smaller_than_alexnet_takes_are_refused():
    from model.metrics.perceptual import LPIPS

    job = build_job({"inputs": ["a.tar"], "output": "out", "clips.size": "24x48"})
    rules = resolve_rules(job.clips, 4, 8, "leanvae", 1)
    with pytest.raises(ConfigError, match=r"clips\.size: LPIPS-Alex needs sides of at least 31 pixels, got 24"):
        _check_lpips(SimpleNamespace(lpips=LPIPS("alex")), rules)
    _check_lpips(SimpleNamespace(lpips=LPIPS("vgg")), rules)


def test_a_missing_extra_is_named(corpus, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    code, text = refused(corpus, output=tmp_path / "out", checkpoint=checkpoint)
    assert code == 2
    assert "pip install 'lathe[training]'" in text


def test_a_corpus_without_a_clip_says_why(checkpoint, tmp_path):
    write_tar(tmp_path / "short.tar", {"c": {"mp4": picture(3)}, "d": {"mp4": b"rubbish"}})
    code, text = refused(
        tmp_path / "short.tar",
        *("--model", "leanvae", "--size", "48x48"),
        output=tmp_path / "out",
        checkpoint=checkpoint,
    )
    assert code == 2
    assert "no clip to measure, everything was rejected" in text
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 2
    assert "too_short 1 (c: " in text


def test_an_interrupted_evaluation_is_not_resumable(corpus, checkpoint, tmp_path, monkeypatch):
    def interrupt(job, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.evaluation.evaluate.evaluate", interrupt)
    code, text = refused(corpus, output=tmp_path / "out", checkpoint=checkpoint)
    assert (code, text.count("\n")) == (130, 1)
    assert "cannot be resumed: give another --output" in text
