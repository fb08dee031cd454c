"""Reasons that users read if a video cannot be opened: encrypted, a still image, not a video. Part of the decode package.

`explained` raises no other errors, so that one video never ends the process that opens it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import BadDataError, DamagedInput, LatheError, PolicyReject
from pipeline.video.decode.encryption import lacks_index, why_encrypted
from pipeline.video.decode.lookalikes import lookalike

# Reasons that only say that libav could not read the bytes.
VAGUE = ("undecodable", "no_decoder", "no_frames", "no_video_stream", "corrupt_stream")


@contextmanager
def explained(video: bytes | str) -> Iterator[None]:
    """Context in which `video` is opened: a vague error becomes one that names what the file is.

    Raises:
        PolicyReject: `still_image`, `unsupported_format`, or that of the block.
        DamagedInput: `not_a_video`, `decoder_fault`, `decoder_memory`, or that of the block.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    with only_named_errors("opening the video"):
        try:
            yield
        except BadDataError as error:
            if error.reason in VAGUE and (better := _better(video, error)) is not None:
                raise better from None
            raise


@contextmanager
def only_named_errors(doing: str) -> Iterator[None]:
    """Turns errors that are not Lathe's (of PyAV, or of arithmetic on hostile numbers) into damage of this video. Also a decorator.

    Raises:
        DamagedInput: `decoder_fault`, `decoder_memory`.
    """
    try:
        yield
    except LatheError:
        raise
    except MemoryError:
        message = f"out of memory while {doing}; raise decode.memory_bytes, the limit of a decoder"
        raise DamagedInput("decoder_memory", message, stage="decode") from None
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        message = f"unexpected {type(error).__name__} while {doing}: {text}; please report it with this video"
        raise DamagedInput("decoder_fault", message, stage="decode") from error


def refuse_encrypted(video: bytes | str) -> None:
    """Refuses encrypted videos: libav would decode them to grey frames without an error.

    Raises:
        PolicyReject: `encrypted`.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    if (how := why_encrypted(video)) is not None:
        message = f"the video is encrypted ({how}) and Lathe has no key; decrypt it first"
        raise PolicyReject("encrypted", message, stage="decode")


def refuse_still(video: bytes | str, frames: int) -> None:
    """Refuses still images, which libav opens as videos of one frame.

    Raises:
        PolicyReject: `still_image`.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    if frames == 1 and (found := lookalike(video)) is not None and found.kind in ("still", "may_move"):
        raise PolicyReject("still_image", f"{found.what}; {found.advice}", stage="decode")


def _better(video: bytes | str, error: BadDataError) -> BadDataError | None:
    found = lookalike(video)
    if found is None and lacks_index(video):
        message = "the mp4 has no index (moov), so its download or recording was cut; get it again"
        return DamagedInput("undecodable", f"{message} ({error.message})", stage="decode")
    if found is None or found.kind == "may_move":  # a broken animation is damage
        return None
    if found.kind == "sound":
        return PolicyReject("no_video_stream", f"the file holds no video, it is {found.what}", stage="decode")
    if found.kind == "no_video":
        message = f"the file is {found.what}; {found.advice} ({error.message})"
        return DamagedInput("not_a_video", message, stage="decode")
    if found.kind == "picture":
        return PolicyReject("unsupported_format", f"{found.what}; {found.advice}", stage="decode")
    return PolicyReject("still_image", f"{found.what}; {found.advice}", stage="decode")
