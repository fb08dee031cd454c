"""Hardware decoder of a decoder process: which videos it takes. Part of the decode package.

libav reads the container and the headers of pictures, as always; only the slices are decoded by the GPU. So frame times, jumps, damaged
packets and orientation are those of `FrameStream`. What the hardware cannot do by our rules stays with libav's own decoder. The rules look
at the file alone. Before the first frame is used it is compared with libav's, pixel by pixel (`Video.use_hardware`).

The process installs its decoder with `install`; this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig
    from pipeline.video.decode.frame_stream import FrameStream
    from pipeline.video.decode.orientation import Orientation
    from pipeline.video.decode.packet_table import PacketTable
    from pipeline.video.decode.planes import FrameScaler

# 8-bit 4:2:0 of these every NVDEC since Pascal decodes (NVDEC Application Note 13.0, table 1). AV1 is not in it: Hopper's NVDEC has no AV1,
# and libav chooses dav1d for it.
CODECS = ("h264", "hevc", "vp9")
PIXEL_FORMATS = ("yuv420p", "yuvj420p")


class HardwareDecoder(Protocol):
    """What a decoder process with a GPU installs."""

    def stream(self, video: bytes | str, limits: DecodeConfig, table: PacketTable) -> FrameStream:
        """Opens `video` on the hardware. Raises as `FrameStream`."""
        ...

    def scaler(self, orientation: Orientation, first: Any) -> FrameScaler | None:
        """Scaler for frames of `stream`, with the bits of `Scaler` for the same pixels; None if it has none for this video.

        `first`: libav's first frame, decoded on the CPU.
        """
        ...

    def same_pixels(self, first: Any, frame: Any) -> bool:
        """Whether `frame`, of `stream`, has the samples of libav's frame `first`."""
        ...

    def takes(self, frame: Any) -> bool:
        """Whether `frame`, of `stream`, is on the hardware in a format that `scaler` reads."""
        ...


_installed: HardwareDecoder | None = None


def install(decoder: HardwareDecoder | None) -> None:
    """Sets the decoder of this process for videos with `decode.device: cuda`; None removes it."""
    global _installed
    _installed = decoder


def installed() -> HardwareDecoder:
    """The decoder of this process. Raises RuntimeError if it has none: the program that started it is the wrong one."""
    if _installed is None:
        raise RuntimeError("decode.device is cuda, but this process has no hardware decoder installed")
    return _installed


def unsuited(
    codec: str, first: Any, *, interlaced: bool, transfer: str, cropped: bool, late: bool, limits: DecodeConfig
) -> str:
    """Why a video stays with libav's own decoder, as a slug; empty if the hardware takes it. A function of the file and the job alone.

    `first`: libav's first frame, decoded on the CPU. `late`: the video does not begin at its first whole frame.
    """
    reasons = {
        "codec": codec not in CODECS,
        "pixel_format": first.format.name not in PIXEL_FORMATS,
        "odd_size": bool(
            first.width % 2 or first.height % 2
        ),  # half a chroma sample: DLPack of NV12 has no last column
        "small": first.width * first.height < limits.nvdec_min_pixels,
        "interlaced": interlaced,  # bwdif reads frames in host memory
        "hdr": transfer != "sdr",
        "cropped": cropped,
        "damaged": late,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
