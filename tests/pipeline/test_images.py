"""Images as clips of one frame: which pixels they give, what is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, ImageConfig, validate
from pipeline.errors import ConfigError, DamagedInput, PolicyReject
from pipeline.records import EncodedVideo, FrameChunk, OpenedVideo
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.image_rules import with_images
from tests.pipeline.decoded import FAST, LIMITS
from tests.video_files import encode

NOISE_HW3 = np.random.default_rng(5).integers(0, 256, (96, 128, 3), np.uint8)
SMOOTH_HW3 = np.stack(np.broadcast_arrays(np.arange(96)[:, None] * 2, np.arange(128)[None] * 2, 90), -1).astype(
    np.uint8
)


def file_of(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    target = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(target, kind, **options)
    return target.getvalue()


def animation(kind: str, frames: int = 7, **options: object) -> bytes:
    pictures = [Image.fromarray(np.full((64, 64, 3), 20 * n, np.uint8)) for n in range(frames)]
    return file_of(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=40, **options)


def opened(
    data: bytes,
    extension: str = "png",
    images: dict[str, object] | None = None,
    limits: DecodeConfig = LIMITS,
    **clips: object,
) -> tuple[OpenedVideo, list[FrameChunk]]:
    """What a decoder answers for a file of this suffix, by default for images of 96x128."""
    config = validate(ClipConfig, {"size": "96x128", "frames": 5, **clips})
    chosen = validate(ImageConfig, {"policy": "keep", **(images or {})})
    rules = with_images(resolve_rules(config, 4, 8, "leanvae"), chosen, config, "leanvae")
    cutter = Cutter(CutRequest(EncodedVideo("k", "uri", data, None, extension), rules, limits, 4, DrillConfig()))
    answers = [cutter.open()]
    while not answers or type(answers[-1]).__name__ != "VideoEnded":
        answers.append(cutter.next())
    first = next(answer for answer in answers if isinstance(answer, OpenedVideo))
    return first, [answer for answer in answers if isinstance(answer, FrameChunk)]


def pixels(data: bytes, extension: str = "png", **settings: object) -> np.ndarray:
    """Planes (3, H, W) of an image."""
    ((chunk,)) = opened(data, extension, **settings)[1]
    return chunk.planes_T3HW[0]


def reason(data: bytes, extension: str = "png", **settings: object) -> tuple[type, str]:
    with pytest.raises((DamagedInput, PolicyReject)) as caught:
        opened(data, extension, **settings)
    return type(caught.value), caught.value.reason


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["96x128", "48x64", "32x32"])
def test_a_lossless_image_has_the_planes_of_a_frame_of_lossless_rgb_video(size):
    video = encode(
        [NOISE_HW3] * 5, size=(96, 128), codec="utvideo", container="avi", pix_fmt="gbrp", source_format="gbrp"
    )
    info, (chunk, *_) = opened(video, "avi", size=size)
    for kind in ("PNG", "TIFF", "BMP"):
        told, (image,) = opened(file_of(NOISE_HW3, kind), kind.lower(), size=size)
        assert (image.planes_T3HW[0] == chunk.planes_T3HW[0]).all()
        assert image.color_matrix == chunk.color_matrix == told.info.color_matrix == info.info.color_matrix
    webp = file_of(NOISE_HW3, "WEBP", lossless=True)
    assert (pixels(webp, "webp", size=size) == chunk.planes_T3HW[0]).all()


def test_the_picture_of_a_decoded_frame_has_its_planes_but_for_rounding():
    planes_3HW = np.stack([SMOOTH_HW3[..., 0] // 2 + 60, np.full((96, 128), 110), np.full((96, 128), 140)]).astype(
        np.uint8
    )
    tags = {"colorspace": 1, "color_range": 1}
    video = encode(
        [planes_3HW] * 5, size=(96, 128), codec="ffv1", container="matroska", pix_fmt="yuv444p", source_format="yuv444p", tags=tags
    )  # fmt: skip
    chunk = opened(video, "mkv")[1][0]
    y, cb, cr = (planes_3HW.astype(float) - np.array([16, 128, 128])[:, None, None]) * np.array(
        [255 / 219, 255 / 224, 255 / 224]
    )[:, None, None]
    rgb_HW3 = np.stack([y + 1.5748 * cr, y - 0.18733 * cb - 0.46813 * cr, y + 1.85563 * cb], -1).round()
    image = pixels(file_of(rgb_HW3.clip(0, 255).astype(np.uint8)))
    assert np.abs(image.astype(int) - chunk.planes_T3HW[0]).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(NOISE_HW3, "PNG", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    size = f"{shown.height}x{shown.width}"
    told, (chunk,) = opened(data, size=size)
    assert (chunk.planes_T3HW[0] == pixels(file_of(np.asarray(shown)), size=size)).all()
    assert (told.info.height, told.info.width) == (shown.height, shown.width)
    assert ("mirrored" in told.info.warnings) == (orientation in (2, 4, 5, 7))
    assert told.info.rotation == {3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}.get(orientation, 0)


def test_palettes_grey_bits_and_sixteen_bits_become_rgb():
    grey_HW = SMOOTH_HW3[..., 0]
    expected = pixels(file_of(grey_HW))
    assert (expected[1:] == 128).all()
    assert (pixels(file_of(grey_HW.astype(np.uint16) * 257)) == expected).all()
    assert (pixels(file_of(grey_HW.astype(np.uint16) * 257, "TIFF"), "tif") == expected).all()
    palette = Image.fromarray(SMOOTH_HW3).quantize(64)
    assert (pixels(file_of(palette)) == pixels(file_of(palette.convert("RGB")))).all()
    bits = Image.fromarray(grey_HW).convert("1")
    assert (pixels(file_of(bits)) == pixels(file_of(bits.convert("RGB")))).all()
    assert reason(file_of(Image.fromarray(grey_HW.astype(np.float32)), "TIFF"), "tif") == (PolicyReject, "pixel_format")


def test_grey_of_twelve_bits_of_inverted_tiffs_and_with_a_transparent_value_keeps_its_range():
    """Pillow gives their values as they are stored."""
    grey_HW = SMOOTH_HW3[..., 0]
    expected = pixels(file_of(grey_HW))
    stored = file_of(grey_HW.astype(np.uint16) * 257, "TIFF")
    raw = (grey_HW.astype("<u2") * 257).tobytes()
    pairs_N2 = np.round(grey_HW.astype(float) * 4095 / 255).astype(np.uint32).reshape(-1, 2)
    words_N = (pairs_N2[:, 0] << 12) | pairs_N2[:, 1]
    packed = np.stack([words_N >> 16, words_N >> 8 & 255, words_N & 255], -1).astype(np.uint8).tobytes()
    bits, photometric = struct.pack("<HHI", 258, 3, 1), struct.pack("<HHI", 262, 3, 1)
    twelve = stored.replace(bits + struct.pack("<I", 16), bits + struct.pack("<I", 12)).replace(raw, packed)
    assert (pixels(twelve, "tif") == expected).all()
    inverted = stored.replace(photometric + struct.pack("<I", 1), photometric + struct.pack("<I", 0))
    assert (pixels(inverted, "tif") == pixels(file_of(255 - grey_HW))).all()
    keyed = file_of(grey_HW.astype(np.uint16) * 257, transparency=200 * 257)
    assert (pixels(keyed) == pixels(file_of(np.where(grey_HW == 200, 255, grey_HW).astype(np.uint8)))).all()


def png(bits: int, kind: int, values_HWC: np.ndarray, transparent: bytes) -> bytes:
    """Raw values as a PNG of this bit depth and colour type, written without Pillow."""
    height, width = values_HWC.shape[:2]
    bits_HN = (values_HWC[..., None] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8).reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row_N).tobytes() for row_N in bits_HN)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("bits", "kind", "transparent", "other"),
    [
        (1, 0, (1,), (0,)),
        (2, 0, (1,), (2,)),
        (2, 0, (3,), (2,)),
        (4, 0, (7,), (8,)),
        (4, 0, (0,), (1,)),
        (8, 0, (100,), (101,)),
        (16, 0, (40_000,), (39_000,)),
        (8, 2, (1, 2, 3), (1, 2, 4)),
        (16, 2, (9_000, 5, 60_000), (8_000, 5, 60_000)),
        (16, 2, (0, 0, 200), (0, 0, 900)),
    ],
)
def test_the_transparent_value_of_a_png_counts_in_the_bits_of_its_pixels(bits, kind, transparent, other):
    values_HWC = np.full((96, 128, len(other)), other, np.uint32)
    values_HWC[:, :64] = transparent
    told, (chunk,) = opened(
        png(bits, kind, values_HWC, struct.pack(f">{len(transparent)}H", *transparent)),
        images={"background": "#00ff00"},
    )
    assert told.info.warnings == ("alpha:#00ff00",)
    shown_HW3 = np.empty((96, 128, 3), np.uint8)
    shown_HW3[:] = [value >> 8 if bits == 16 else value * 255 // ((1 << bits) - 1) for value in other]
    shown_HW3[:, :64] = 0, 255, 0
    assert np.abs(chunk.planes_T3HW[0].astype(int) - pixels(file_of(shown_HW3))).max() <= 1


def test_transparent_pixels_show_the_background_and_the_row_says_so():
    rgba_HW4 = np.dstack([NOISE_HW3, np.full((96, 128), 255, np.uint8)])
    told, (chunk,) = opened(file_of(rgba_HW4))
    assert (chunk.planes_T3HW[0] == pixels(file_of(NOISE_HW3))).all()
    assert told.info.warnings == ()
    rgba_HW4[:, :64, 3] = 0
    halves_HW3 = NOISE_HW3.copy()
    halves_HW3[:, :64] = 255, 128, 0
    for image in (Image.fromarray(rgba_HW4), Image.fromarray(rgba_HW4).convert("RGBa").convert("RGBA")):
        told, (chunk,) = opened(file_of(image), images={"background": "#ff8000"})
        assert (chunk.planes_T3HW[0] == pixels(file_of(halves_HW3))).all()
        assert told.info.warnings == ("alpha:#ff8000",)
    keyed = Image.fromarray(np.zeros((96, 128), np.uint8)).convert("P")
    assert (pixels(file_of(keyed, transparency=0)) == pixels(file_of(np.full((96, 128, 3), 255, np.uint8)))).all()


def test_an_icc_profile_is_converted_to_srgb():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    told, (chunk,) = opened(file_of(NOISE_HW3, icc_profile=profile))
    assert (chunk.planes_T3HW[0] == pixels(file_of(NOISE_HW3))).all(), "sRGB itself is not rounded once more"
    assert told.info.warnings == ()
    exchanged = profile.replace(b"rXYZ", b"____", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"____", b"gXYZ", 1)
    red, green = (np.broadcast_to(np.array(colour, np.uint8), (96, 128, 3)) for colour in ((255, 0, 0), (0, 255, 0)))
    told, (chunk,) = opened(file_of(red, icc_profile=exchanged))
    assert np.abs(chunk.planes_T3HW[0].astype(int) - pixels(file_of(green))).max() <= 1
    assert told.info.warnings == ("icc_profile",)
    for broken in (b"no profile", exchanged.replace(b"RGB ", b"GRAY", 1), exchanged.replace(b"RGB ", b"CMYK", 1)):
        told, (chunk,) = opened(file_of(red, icc_profile=broken))
        assert (chunk.planes_T3HW[0] == pixels(file_of(red))).all()
        assert told.info.warnings == ("bad_icc_profile",)


def test_cmyk_becomes_rgb():
    inks = Image.fromarray(SMOOTH_HW3).convert("CMYK")
    told, (chunk,) = opened(file_of(inks, "TIFF"), "tiff")
    assert (chunk.planes_T3HW[0] == pixels(file_of(SMOOTH_HW3))).all()
    assert told.info.warnings == ("no_cmyk_profile",)
    lossy = pixels(file_of(inks, "JPEG", quality=98), "jpg")
    assert np.abs(lossy.astype(int) - chunk.planes_T3HW[0]).mean() < 2, "inks of a JPEG are not read inverted"


# --- rows -------------------------------------------------------------------------------------------------------------


def test_an_image_is_a_clip_of_one_frame_in_a_bucket_of_its_own():
    images = {"size": "32x64,64x32,48x48"}
    told, (chunk,) = opened(file_of(NOISE_HW3), images=images, fps=8, select="tile")
    (plan,) = told.clips
    assert (str(plan.bucket), plan.fps, plan.start, chunk.pts_s) == ("1x48x48", 0.0, 0, (0.0,))
    assert (told.info.is_image, told.info.fps, told.info.duration_s, told.info.num_frames) == (True, 0.0, 0.0, 1)
    assert str(opened(file_of(NOISE_HW3[:, :40]), images=images)[0].clips[0].bucket) == "1x64x32"
    assert str(opened(file_of(NOISE_HW3), images={"size": "area:64x64"})[0].clips[0].bucket) == "1x48x80"


def test_variants_and_crops_of_clips_hold_for_images():
    told, chunks = opened(file_of(NOISE_HW3), size="64x64", crop="random:2", variants="flip")
    assert [plan.variant for plan in told.clips] == ["crop1", "crop2", "crop1-flip", "crop2-flip"]
    assert (chunks[2].planes_T3HW == chunks[0].planes_T3HW[..., ::-1]).all()
    boxed_HW3 = np.zeros((96, 128, 3), np.uint8)
    boxed_HW3[24:72] = 200
    told, (chunk,) = opened(file_of(boxed_HW3), size="32x64", crop="letterbox")
    assert told.clips[0].warnings == ("letterbox:128x48+0+24",)
    assert (chunk.planes_T3HW[0, 0] > 100).all()


def test_images_that_are_too_small_or_too_long_are_policy():
    small, _ = opened(file_of(NOISE_HW3[:64]))
    assert [reject.reason for reject in small.rejects] == ["too_small"]
    assert len(opened(file_of(NOISE_HW3[:64]), images={"upscale": True})[1]) == 1
    assert reason(file_of(NOISE_HW3[:16])) == (PolicyReject, "aspect_ratio")
    assert len(opened(file_of(NOISE_HW3[:16]), images={"max_aspect": 8, "upscale": True})[1]) == 1


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP"])
def test_a_truncated_image_is_damage_and_not_grey(kind):
    whole = file_of(NOISE_HW3, kind)
    for kept in (0.9, 0.5, 0.05):
        kind_, slug = reason(whole[: int(len(whole) * kept)], kind.lower())
        assert (kind_, slug in ("truncated", "undecodable", "not_a_video")) == (DamagedInput, True)


def test_a_tiff_without_a_width_is_damage_and_not_a_fault_of_the_decoder():
    width = struct.pack("<HHI", 256, 4, 1)
    data = file_of(NOISE_HW3, "TIFF")
    assert width in data
    assert reason(data.replace(width, struct.pack("<HHI", 60_000, 4, 1)), "tif") == (DamagedInput, "undecodable")


def test_a_decompression_bomb_is_refused_by_its_header():
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0)
    tiny = file_of(Image.new("1", (8, 8)))
    bomb = tiny[:12] + header + struct.pack(">I", zlib.crc32(header)) + tiny[33:]
    assert reason(bomb) == (PolicyReject, "too_many_pixels")
    limits = LIMITS.model_copy(update={"max_pixels": 96 * 128 - 1})
    assert reason(file_of(NOISE_HW3), limits=limits) == (PolicyReject, "too_many_pixels")


def test_pages_and_broken_exif_are_in_the_warnings():
    pages = file_of(Image.fromarray(NOISE_HW3), "TIFF", save_all=True, append_images=[Image.new("RGB", (8, 8))] * 2)
    assert opened(pages, "tif")[0].info.warnings == ("extra_pages:2",)
    broken = opened(file_of(NOISE_HW3, "PNG", exif=b"Exif\0\0no header"))[0]
    assert broken.info.warnings == ("bad_exif",)


def test_hdr_that_the_file_declares_is_refused():
    png = file_of(NOISE_HW3)
    chunk = b"cICP\x09\x10\0\1"
    assert reason(png[:33] + struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]) == (
        PolicyReject,
        "hdr",
    )


def test_contents_decide_and_not_the_name():
    assert opened(file_of(NOISE_HW3, "JPEG"), "png")[0].info.codec == "jpeg"
    assert opened(file_of(NOISE_HW3, "JPEG"), "mp4")[0].info.is_image
    assert not opened(encode(8, size=(96, 128), options=FAST), "jpg")[0].info.is_image
    assert reason(b"<!doctype html><html><body>not here</body></html>" * 9, "jpg") == (DamagedInput, "not_a_video")
    assert reason(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500), "jpg") == (PolicyReject, "still_image")


@pytest.mark.parametrize(("kind", "extension"), [("WEBP", "webp"), ("PNG", "png"), ("GIF", "gif"), ("AVIF", "avif")])
def test_an_animation_is_a_video(kind, extension):
    data = animation(kind, **({"lossless": True} if kind == "WEBP" else {}))
    told, chunks = opened(data, extension, size="64x64")
    assert (told.info.is_image, told.info.num_frames, told.info.fps) == (False, 7, 25.0)
    planes_T3HW = np.concatenate([chunk.planes_T3HW for chunk in chunks])
    expected = [16 + 20 * n * 219 / 255 for n in range(5)]
    assert planes_T3HW[:, 0].mean((1, 2)) == pytest.approx(expected, abs=2)
    assert np.concatenate([chunk.pts_s for chunk in chunks]) == pytest.approx(np.arange(5) / 25)
    assert reason(data, extension, images={"policy": "only"}) == (PolicyReject, "not_an_image")


@pytest.mark.parametrize("kind", ["AVIF", "WEBP"])
@pytest.mark.parametrize("extension", ["avif", "mp4"])
def test_an_animation_with_transparency_shows_its_colours_on_the_background(kind, extension):
    """libav has the transparency of AVIF as a stream of its own, and may take it for the video: it may have more bits than the colours."""
    generator = np.random.default_rng(3)
    pictures = []
    for n in range(30):
        rgba_HW4 = np.full((64, 64, 4), (200, 5 * n, 30, 255), np.uint8)
        if n:
            rgba_HW4[:32, :, 3] = generator.integers(0, 2, (32, 64)) * 255
        pictures.append(Image.fromarray(rgba_HW4))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"}
    data = file_of(pictures[0], kind, save_all=True, append_images=pictures[1:], duration=40, **options)
    told, chunks = opened(data, extension, size="64x64", frames=25, images={"background": "#0000ff"})
    assert (told.info.num_frames, told.info.fps) == (30, 25.0)
    assert told.info.warnings == ("alpha:#0000ff",)
    planes_T3HW = np.concatenate([chunk.planes_T3HW for chunk in chunks])
    for n in (0, 10, 24):
        rgba_HW4 = np.asarray(pictures[n])
        shown_HW3 = np.where(rgba_HW4[..., 3:] > 0, rgba_HW4[..., :3], np.array([0, 0, 255], np.uint8))
        assert np.abs(planes_T3HW[n].astype(int) - pixels(file_of(shown_HW3), size="64x64")).mean() < 2


def test_times_of_an_animated_avif_do_not_drift_by_rounding():
    """Pillow gives 33 ms as the duration of each frame."""
    data = animation("AVIF", 13)
    at = data.index(b"mdhd") + 4 + 4 + 16
    assert struct.unpack(">I", data[at : at + 4]) == (1000,)  # 40 units become 33 1/3 ms
    told, chunks = opened(data[:at] + struct.pack(">I", 1200) + data[at + 4 :], "avif", size="64x64", frames=13)
    assert np.concatenate([chunk.pts_s for chunk in chunks]) == pytest.approx(np.arange(13) / 30, abs=0.0006)
    assert told.info.duration_s == pytest.approx(13 / 30, abs=0.001)


def test_avif_needs_a_pillow_that_has_it(monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: name != "avif")
    with pytest.raises(DamagedInput, match=r"^Pillow [0-9.]+ was built without AVIF; install"):
        opened(animation("AVIF"), "avif", size="64x64")


def test_limits_of_videos_hold_for_animations():
    data = animation("WEBP")
    for field, value, slug in (("max_frames", 6, "too_many_frames"), ("max_duration_s", 0.2, "too_long")):
        limits = LIMITS.model_copy(update={field: value})
        assert reason(data, "webp", size="64x64", limits=limits) == (PolicyReject, slug)


# --- the job ----------------------------------------------------------------------------------------------------------


def test_rules_without_images_are_what_they_were():
    config = validate(ClipConfig, {})
    rules = resolve_rules(config, 4, 8, "leanvae")
    assert with_images(rules, ImageConfig(), config, "leanvae") == rules
    assert "images" not in rules.to_dict()
    kept = with_images(rules, validate(ImageConfig, {"policy": "keep"}), config, "leanvae").to_dict()
    assert kept["images"]["background"] == (255, 255, 255)
    assert {**kept, "images": None} == {**rules.to_dict(), "images": None}


def test_sizes_of_images_are_checked_against_the_network():
    config = validate(ClipConfig, {})
    rules = resolve_rules(config, 4, 8, "net")
    for values, message in (
        ({"size": "100x128"}, "images.size: net takes sides that are multiples of 8, got 100x128"),
        ({"size": "area:64x64", "multiple_of": 12}, "images.multiple_of: net takes sides"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_images(rules, validate(ImageConfig, {"policy": "keep", **values}), config, "net")
    groups = resolve_rules(validate(ClipConfig, {"frames": 16}), 4, 8, "net", lead_frames=0)
    with pytest.raises(ConfigError, match="cannot encode a single image; use --images skip"):
        with_images(groups, validate(ImageConfig, {"policy": "keep"}), config, "net")
