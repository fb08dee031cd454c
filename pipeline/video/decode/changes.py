"""What a video's first frame decides for all: its shape, colour and interlacing. Part of the decode package.

Planes of a clip have one colour matrix and one aspect ratio, so frames that differ from the first one are refused, not converted.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from pipeline.errors import PolicyReject
from pipeline.video.decode.colour_tags import (
    RGB,
    UNSPECIFIED,
    Colour,
    refuse_dolby_vision,
    resolve,
    rgb_matrix,
    transfer_kind,
)

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig
    from pipeline.video.decode.container import OpenContainer

ASPECT_TOLERANCE = 0.03


def first_colour(first: Any, opened: OpenContainer, limits: DecodeConfig) -> Colour:
    """Colour of a video by the tags of its first frame, else by those of its stream.

    Raises:
        PolicyReject: `color_matrix`.
        DamagedInput: `undecodable`.
    """
    if (dolby_vision := opened.dolby_vision()) is not None:
        refuse_dolby_vision(*dolby_vision)
    context = opened.stream.codec_context
    return resolve(
        _first_tag(first.colorspace, context.colorspace),
        _first_tag(first.color_range, context.color_range, unknown=0),
        _first_tag(first.color_trc, context.color_trc),
        first.height,
        rgb_matrix(first.format),
        limits.untagged_matrix,
    )


def _first_tag(frame_tag: int, context_tag: int, unknown: int = UNSPECIFIED) -> int:
    """The frame's tag, or the stream's if the frame has none (2 is "unspecified" in H.273, 0 for the range)."""
    return int(context_tag) if int(frame_tag) == unknown else int(frame_tag)


def apply_policies(colour: Colour, interlaced: bool, limits: DecodeConfig) -> list[str]:
    """Warnings of what the policies decide for HDR and interlaced video. Raises PolicyReject, `hdr` or `interlaced`."""
    decisions = []
    if colour.transfer != "sdr":
        if limits.hdr == "reject":
            message = f"{colour.transfer.upper()} video; set decode.hdr=convert to tone-map it"
            raise PolicyReject("hdr", message, stage="decode")
        decisions.append("tonemapped")
    if interlaced:
        if limits.interlaced == "reject":
            raise interlaced_reject("interlaced video")
        decisions.append("deinterlaced" if limits.interlaced == "deinterlace" else "interlaced_kept")
    return decisions


def interlaced_reject(what: str) -> PolicyReject:
    """The reject of `decode.interlaced=reject`."""
    message = f"{what}; set decode.interlaced=deinterlace or decode.interlaced=keep to encode it"
    return PolicyReject("interlaced", message, stage="decode")


@dataclass(frozen=True, slots=True)
class FirstFrame:
    """The first frame of a video, which later ones must resemble. Tags that are unspecified count as unchanged."""

    width: int  # stored
    height: int
    aspect: (
        Fraction | None
    )  # sample aspect ratio of the codec; None: the container has another one, which holds for all frames
    colour: Colour

    def refusal(self, frame: Any, aspect: Fraction | None) -> PolicyReject | None:
        """Why a frame may not be used beside the first one: `size_changed`, `color_changed` or `color_matrix`; None if it may.

        `aspect`: its sample aspect ratio by the codec, None if it has none.
        """
        x, y = self.scale(frame, aspect)
        if abs(x / y - 1) > ASPECT_TOLERANCE:
            was, now = f"{self.width}x{self.height}", f"{frame.width}x{frame.height}"
            message = f"frames change shape from {was} to {now} inside the video; split it there"
            if aspect and self.aspect and aspect != self.aspect:
                message += f" (aspect ratio of a pixel: {self.aspect} to {aspect})"
            return PolicyReject("size_changed", message, stage="decode")
        try:
            matrix, transfer = self._colour_of(frame)
        except PolicyReject as error:
            return error
        was = f"{self.colour.matrix} {self.colour.transfer}"
        if (now := f"{matrix} {transfer}") == was:
            return None
        message = f"colour changes from {was} to {now} inside the video; split it there"
        return PolicyReject("color_changed", message, stage="decode")

    def is_like(self, frame: Any) -> bool:
        """Whether a frame has the stored size of the first one."""
        return (frame.width, frame.height) == (self.width, self.height)

    def scale(self, frame: Any, aspect: Fraction | None) -> tuple[float, float]:
        """Width and height of a frame as displayed, as multiples of the first one's."""
        stretched = float(aspect / self.aspect) if aspect and self.aspect else 1.0
        return frame.width * stretched / self.width, frame.height / self.height

    def _colour_of(self, frame: Any) -> tuple[str, str]:
        """Matrix and transfer of a frame. Raises PolicyReject `color_matrix`."""
        matrix, transfer, rgb = int(frame.colorspace), int(frame.color_trc), rgb_matrix(frame.format)
        kind = self.colour.transfer if transfer == UNSPECIFIED else transfer_kind(transfer)
        if matrix in (UNSPECIFIED, RGB) and not rgb:
            return self.colour.matrix, kind
        return resolve(matrix, int(frame.color_range), transfer, frame.height, rgb, "auto").matrix, kind
