"""Small varied corpus of real encoded videos, so that a first run needs no other input.

Takes a folder and a seed; writes WebDataset tars (or plain files) of synthetic scenes in many codecs, sizes and rates, with
captions. Among them are a rotated video, a variable-rate one, one too small, one too short, a failed download, and a truncated file.

- `scenes`: the moving images
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from pipeline.errors import OutputError
from pipeline.sample_corpus.scenes import SCENES

# Without macroblock tree: its vector code reads uninitialised memory, so bytes would differ between runs.
X264 = {"preset": "veryfast", "crf": "23", "threads": "1", "x264-params": "mbtree=0"}
X265 = {"preset": "ultrafast", "crf": "26", "x265-params": "log-level=none:pools=none:frame-threads=1"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b:v": "0"}
AV1 = {"preset": "12", "crf": "35", "svtav1-params": "lp=1"}
QUALITY = {"qscale": "5", "flags": "+qscale", "global_quality": "590"}
UNTAGGED = {"mjpeg", "mpeg4"}  # cannot store a colour matrix; players assume BT.601
BT709 = 1  # code in H.273
MTIME = 1_700_000_000  # in every tar header, so that the same seed gives the same bytes


@dataclass(frozen=True, slots=True)
class Recipe:
    """One video: scene and encoding. `height` and `width` are stored pixels, before rotation."""

    scene: str
    caption: str
    ext: str
    codec: str
    height: int
    width: int
    fps: int
    seconds: float
    options: dict[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"
    rotation: int = 0
    variable_rate: bool = False
    damage: Literal["", "cut_off", "failed_download"] = ""


PHONE = "a tiled wall, filmed with the phone held upright"
RECIPES = (
    Recipe("plasma", "slow waves of coloured light", "mp4", "libx264", 360, 640, 24, 3, X264),
    Recipe("discs", "three glossy balls bounce in a bright room", "mp4", "libx265", 288, 512, 30, 2, X265),
    Recipe("rings", "rings spread from a point on a calm surface", "webm", "libvpx-vp9", 256, 256, 25, 2.4, VP9),
    Recipe("clouds", "clouds drift over two layers of haze", "mkv", "libsvtav1", 320, 480, 24, 2, AV1),
    Recipe("checker", "a checkered floor turns slowly", "mp4", "libx264", 480, 272, 30, 2, X264),
    Recipe("plasma", "coloured fog, filmed frame by frame", "avi", "mjpeg", 256, 320, 12, 3, QUALITY, "yuvj420p"),
    Recipe("discs", "balls of light cross a dark hall", "avi", "mpeg4", 288, 352, 25, 2.4, QUALITY),
    Recipe("rings", "a video that could not be downloaded", "mp4", "", 0, 0, 0, 0, damage="failed_download"),
    Recipe("checker", PHONE, "mp4", "libx264", 288, 512, 30, 2, X264, rotation=-90),
    Recipe("clouds", "a sky at dusk, the file cut off", "mp4", "libx264", 256, 384, 24, 2, X264, damage="cut_off"),
    Recipe("clouds", "ten-bit clouds, pale horizon", "mp4", "libx264", 320, 426, 24, 2, X264, "yuv420p10le"),
    Recipe("plasma", "full-range gradients flow past", "mp4", "libx264", 300, 400, 25, 2, X264, "yuvj420p"),
    Recipe("discs", "balls, a stuttering camera", "mp4", "libx264", 272, 480, 30, 2.5, X264, variable_rate=True),
    Recipe("rings", "ripples in ten-bit", "mp4", "libx265", 272, 272, 30, 2, X265, "yuv420p10le"),
    Recipe("checker", "a floor of odd size", "webm", "libvpx-vp9", 271, 483, 25, 2, VP9),
    Recipe("plasma", "a stamp-sized wave", "mp4", "libx264", 144, 192, 24, 2, X264),
    Recipe("rings", "slow ripples, eight frames a second", "mp4", "libx264", 360, 480, 8, 4, X264),
    Recipe("discs", "fast balls at sixty frames a second", "mkv", "libsvtav1", 256, 456, 60, 2, AV1),
    Recipe("clouds", "a tall sky", "mp4", "libx264", 512, 288, 24, 3, X264),
    Recipe("checker", "a glimpse of a floor, nine frames", "mp4", "libx264", 256, 256, 24, 0.375, X264),
)


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """Result of `make_samples`: `files` relative to `folder`, number of samples, of videos, and of damaged videos."""

    folder: str
    files: tuple[str, ...]
    samples: int
    videos: int
    damaged: int
    frames: int
    num_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.samples} samples in {len(self.files)} files, {self.num_bytes / 1e6:.1f} MB; "
            f"{self.videos} videos of {self.frames} frames, {self.damaged} of them cut off"
        )


def make_samples(
    folder: str, *, seed: int = 0, shards: int = 2, layout: Literal["tar", "files"] = "tar"
) -> SampleSummary:
    """Writes the corpus into `folder`: tars `000000.tar` …, or with `layout="files"` one video per file with its caption beside it.

    The same seed gives the same bytes with the same version of libav. Takes about ten seconds.

    Raises:
        OutputError: `folder` cannot be written, or is not empty: what is in it may be the user's.
        ValueError: `shards` is not between 1 and the number of samples.
    """
    if not 1 <= shards <= len(RECIPES):
        raise ValueError(f"shards: expected 1 to {len(RECIPES)}, got {shards}")
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if (found := next(target.iterdir(), None)) is not None:
            raise OutputError(f"{folder} is not empty, it holds {found.name}; name a new folder")
        samples = (_sample(index, recipe, seed) for index, recipe in enumerate(RECIPES))
        files = _write_files(target, samples) if layout == "files" else _write_tars(target, samples, shards)
    except OSError as error:
        raise OutputError(f"cannot write the sample corpus to {folder}: {error.strerror or error}") from None
    encoded = [recipe for recipe in RECIPES if recipe.codec]
    return SampleSummary(
        folder=folder,
        files=tuple(files),
        samples=len(RECIPES),
        videos=len(encoded),
        damaged=sum(recipe.damage == "cut_off" for recipe in RECIPES),
        frames=sum(round(recipe.seconds * recipe.fps) for recipe in encoded),
        num_bytes=sum((target / name).stat().st_size for name in files),
    )


def _sample(index: int, recipe: Recipe, seed: int) -> dict[str, Any]:
    """WebDataset fields of one sample, with its key under `__key__`."""
    described = {"scene": recipe.scene, "caption": recipe.caption, "seed": seed, "fps": recipe.fps}
    fields: dict[str, Any] = {"__key__": f"{index:06d}", "txt": recipe.caption.encode()}
    if recipe.damage == "failed_download":  # as video2dataset leaves them
        failure = {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
        fields["json"] = _json({**described, **failure})
        return fields
    data = encode_recipe(recipe, seed * len(RECIPES) + index)
    fields["json"] = _json({**described, "status": "success", "height": recipe.height, "width": recipe.width})
    fields[recipe.ext] = data[: len(data) * 2 // 3] if recipe.damage == "cut_off" else data
    return fields


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _write_tars(target: Path, samples: Iterator[dict[str, Any]], shards: int) -> list[str]:
    names = []
    per_shard = -(-len(RECIPES) // shards)
    for shard in range(-(-len(RECIPES) // per_shard)):
        names.append(f"{shard:06d}.tar")
        with tarfile.open(target / names[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for fields in islice(samples, per_shard):
                key = fields.pop("__key__")
                for ext, data in sorted(fields.items()):
                    member = tarfile.TarInfo(f"{key}.{ext}")
                    member.size, member.mtime, member.mode = len(data), MTIME, 0o444
                    member.uname = member.gname = "bigdata"  # as webdataset's TarWriter names them
                    tar.addfile(member, io.BytesIO(data))
    return names


def _write_files(target: Path, samples: Iterator[dict[str, Any]]) -> list[str]:
    names = []
    for fields in samples:
        key = str(fields.pop("__key__"))
        if len(fields) < 3:
            continue  # a failed download leaves no file in a folder of videos
        for ext, data in sorted(fields.items()):
            names.append(f"{key}.{ext}")
            (target / names[-1]).write_bytes(data)
    return names


def encode_recipe(recipe: Recipe, seed: int) -> bytes:
    """Encodes a video to bytes. Bit-exact muxing leaves out dates and random identifiers."""
    if recipe.codec == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # errors only; the library has no other option
    buffer = io.BytesIO()
    container = {"mkv": "matroska"}.get(recipe.ext, recipe.ext)
    with av.open(buffer, "w", format=container, options={"fflags": "+bitexact"}) as output:
        stream: Any = output.add_stream(recipe.codec, rate=recipe.fps, options=recipe.options)
        stream.height, stream.width, stream.pix_fmt = recipe.height, recipe.width, recipe.pix_fmt
        stream.thread_count = 1
        time_base = Fraction(1, 1000) if recipe.variable_rate else Fraction(1, recipe.fps)
        stream.codec_context.time_base = time_base
        if recipe.codec not in UNTAGGED:
            stream.codec_context.colorspace = BT709
            stream.codec_context.color_range = 2 if recipe.pix_fmt.startswith("yuvj") else 1
        if recipe.rotation:
            stream.set_display_rotation(recipe.rotation)
        for number, rgb_HW3 in enumerate(_images(recipe, seed)):
            frame = _frame(recipe, rgb_HW3)
            frame.pts = _uneven_ms(number, recipe.fps) if recipe.variable_rate else number
            frame.time_base = time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def _images(recipe: Recipe, seed: int) -> Iterator[np.ndarray]:
    scene: Callable[[np.random.Generator, int, int], Callable[[float], np.ndarray]] = SCENES[recipe.scene]
    draw = scene(np.random.default_rng(seed), recipe.height, recipe.width)
    for number in range(round(recipe.seconds * recipe.fps)):
        yield draw(number / recipe.fps)


def _frame(recipe: Recipe, rgb_HW3: np.ndarray) -> Any:
    source = av.VideoFrame.from_ndarray(rgb_HW3, format="rgb24")
    color_range = "JPEG" if recipe.pix_fmt.startswith("yuvj") else "MPEG"
    matrix = "ITU601" if recipe.codec in UNTAGGED else "ITU709"
    return source.reformat(format=recipe.pix_fmt, dst_colorspace=matrix, dst_color_range=color_range, threads=1)


def _uneven_ms(number: int, fps: int) -> int:
    # Every fifth frame is late, and every twenty frames there is a pause of a quarter second.
    return round(number * 1000 / fps) + (15 if number % 5 == 4 else 0) + 250 * (number // 20)
