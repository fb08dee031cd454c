"""Paired videos of a sample: opened and compared with the main video, shown together with it; masks averaged at latent resolution.

A pair has the same shown frames, frame for frame, and the same picture, in any resolution: members are scaled to the size that the main
video is scaled to and cropped in the same place.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import BadDataError, DamagedInput, PolicyReject
from pipeline.records import is_mask
from pipeline.video.decode import open_video

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.config import DecodeConfig
    from pipeline.records import ClipPlan, ClipRules, EncodedVideo
    from pipeline.video.decode import Shown, Video
    from pipeline.video.images import Pictures

ASPECT = 0.01
"""Largest relative difference of the aspect ratios: networks that estimate depth round sides to multiples of 14 or 32."""
DURATION = 0.01
"""Largest relative difference of the durations: 29.97 frames a second are written as 30."""
BLACK, WHITE = 16, 235  # luma of limited range


class Members:
    """Open paired videos of one sample, by name."""

    def __init__(self, encoded: EncodedVideo, limits: DecodeConfig, main: Video | Pictures) -> None:
        """Opens all members.

        Raises:
            DamagedInput: a member cannot be decoded; `member_mismatch`: it has other frames or another aspect ratio than `main`.
            PolicyReject, StorageUnavailable, SourceChanged, SourceRefused: as `decode.open_video`.
        """
        self._files = {member.name: member.file_name for member in encoded.members}
        self._videos: dict[str, Video] = {}
        try:
            for member in encoded.members:
                with self.named(member.name):
                    video = self._videos[member.name] = open_video(member.video, limits)
                    _compare(video, main)
        except BaseException:
            self.close()
            raise

    @property
    def videos(self) -> dict[str, Video]:
        """All members, in the order of their names."""
        return self._videos

    @property
    def frames_decoded(self) -> int:
        """Frames that have left the codecs."""
        return sum(video.frames_decoded for video in self._videos.values())

    def check_sizes(self, plans: Sequence[ClipPlan], rules: ClipRules) -> None:
        """Raises PolicyReject `too_small` if a member would have to be enlarged, and the job does not allow it. Masks may be."""
        if rules.upscale or not plans:
            return
        height, width = max((plan.scaled_height, plan.scaled_width) for plan in plans)
        for name, video in self._videos.items():
            info = video.info
            small = info.height * (1 + ASPECT) < height or info.width * (1 + ASPECT) < width
            if small and not is_mask(name):
                text = f"{info.height}x{info.width} pixels, would have to be enlarged to {height}x{width}; set clips.upscale to allow it"
                with self.named(name):
                    raise PolicyReject("too_small", text, stage="clips")

    def show(self, name: str, index: int) -> Shown:
        """The frame of a member at `index`. Raises as `Video.show`."""
        with self.named(name):
            return self._videos[name].show(index)

    def close(self) -> None:
        """Releases all; safe to call twice."""
        for video in self._videos.values():
            video.close()
        self._videos = {}

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Within: messages of errors of the input begin with the member's name and file."""
        try:
            yield
        except BadDataError as error:
            error.message = f"{name} ({self._files[name]}): {error.message}"
            error.args = (error.message,)
            raise


def _compare(video: Video, main: Video | Pictures) -> None:
    mine, its = video.info, main.info
    if len(video.times_s) != len(main.times_s):
        found, wanted = f"{len(video.times_s)} frames", f"{len(main.times_s)}"
    elif abs(video.end_s - main.end_s) > max(DURATION * main.end_s, main.end_s / len(main.times_s)):
        found, wanted = f"{video.end_s:.3f} s", f"{main.end_s:.3f} s"
    elif abs(mine.width * its.height - its.width * mine.height) > ASPECT * its.width * mine.height:
        found, wanted = f"{mine.width}x{mine.height} pixels", f"{its.width}x{its.height}, another aspect ratio"
    else:
        return
    text = f"{found}, the main video has {wanted}; members need the same frames and the same picture"
    raise DamagedInput("member_mismatch", text, stage="decode")


def averaged(luma_THW: np.ndarray, rules: ClipRules, *, first: bool) -> np.ndarray:
    """A chunk of a mask at latent resolution: `(1, t, h, w)` float32, the white part of each latent cell from 0 to 1.

    Args:
        luma_THW: uint8 of limited range, with a number of frames that the network takes.
        rules: strides of the network.
        first: the chunk begins the clip: its lead frames make latent frames of their own, as in a causal network.
    """
    step, stride = rules.space_stride, rules.time_stride
    white_THW = np.clip((luma_THW.astype(np.float32) - BLACK) / (WHITE - BLACK), 0, 1)
    frames, height, width = white_THW.shape
    cells_Thw = white_THW.reshape(frames, height // step, step, width // step, step).mean((2, 4))
    lead = rules.lead_frames if first else 0
    groups = cells_Thw[lead:].reshape(-1, stride, *cells_Thw.shape[1:]).mean(1)
    return np.concatenate([cells_Thw[:lead], groups])[None]
