"""Code inside a decoder process: one open video, answers instead of exceptions, a limit on memory. Ray actors use it as well."""

from __future__ import annotations

import gc
import os
import resource
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import DamagedInput, LatheError, WorkerLost
from pipeline.records import OpenedVideo, VideoEnded
from pipeline.video.cutting import Cutter

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.engine.decoders.lanes import Answer
    from pipeline.video.cutting import CutRequest


class LaneWorker:
    """Decodes one video at a time, on request."""

    def __init__(self, memory_bytes: int, niceness: int) -> None:
        limit_address_space(memory_bytes)
        os.nice(niceness)
        gc.freeze()  # loaded modules are left out of collections: one takes 0.1 ms instead of 20
        self._cutter: Cutter | None = None
        self._headers_only = False

    def open(self, request: CutRequest) -> Answer:
        """Closes the video before and opens this one."""
        self.close()
        self._cutter, self._headers_only = Cutter(request), request.headers_only
        answer = self._guard(self._cutter.open)
        self._free_after(answer)
        return answer

    def pull(self) -> Answer:
        """The next answer of the open video."""
        if self._cutter is None:
            return WorkerLost("pull without an open video", stage="decode")
        answer = self._guard(self._cutter.next)
        self._free_after(answer)
        return answer

    def close(self) -> None:
        """Releases the open video, if any."""
        if self._cutter is not None:
            self._cutter.close()
            self._cutter = None

    def _free_after(self, answer: Answer) -> None:
        """Frees the video before its last answer is sent: a crash in freeing it is then not blamed on the next video."""
        opened = isinstance(answer, OpenedVideo) and self._headers_only
        if self._cutter is not None and (opened or isinstance(answer, VideoEnded | LatheError)):
            self._cutter.close()
            gc.collect()

    def _guard(self, call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except LatheError as error:
            return error
        except MemoryError:
            return DamagedInput(
                "decoder_memory", "decoding needs more memory than decode.memory_bytes allows", stage="decode"
            )
        except Exception as error:  # noqa: BLE001 - an error in Lathe that this video triggers; the traceback is sent along
            lost = WorkerLost(f"decoder failed with {type(error).__name__}: {error}", blame=True, stage="decode")
            lost.add_note(traceback.format_exc())
            return lost


def limit_address_space(extra_bytes: int) -> None:
    """Caps this process at its present address space plus `extra_bytes`, so that a decompression bomb ends this process only."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    limit = pages * resource.getpagesize() + extra_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
