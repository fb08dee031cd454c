"""Forked process that draws clips, so that a video that crashes the decoder costs a clip and not the run.

Takes an encoded video and a size, returns uint8 RGB `3 T H W`, as `random_clip` does in this process. The first call forks a small process
that does nothing but fork decoders: it never has threads or open connections, so a decoder that died can be replaced safely at any time.
Not used where `may_fork` is false, in training processes of Ray: clips of sheets, of `start: linear` and, with `loaders: 0`, all clips.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import struct
import sys
import weakref
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from pipeline.errors import DamagedInput
from pipeline.training.random_clip import random_clip
from pipeline.video.decode.refusals import only_named_errors

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig
    from pipeline.records import Bucket
    from pipeline.training.job import RandomClipConfig

TRIES = 2  # decoders that may die of one clip; a single death can have another cause
GONE = "the process that forks decoders was killed from outside"
NEW, STATUS = b"n", b"s"  # requests to the forking process: start a decoder, exit code of the last one


class DecoderProcess:
    """The decoder of one process. Pickles without it; ends with the process or the object that uses it."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._decoder: Connection | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_control": None, "_decoder": None}

    def start(self) -> None:
        """Forks, unless done before; call it while this process has no threads that hold locks."""
        if self._control is None:
            ours, theirs = socket.socketpair()
            if (child := os.fork()) == 0:
                try:
                    if os.fork() == 0:  # a grandchild, which init waits for
                        _serve_forks(theirs)
                finally:
                    os._exit(0)
            os.waitpid(child, 0)
            theirs.close()
            self._control = ours
            weakref.finalize(self, ours.close)

    def clip(
        self,
        video: bytes | str,
        limits: DecodeConfig,
        config: RandomClipConfig,
        size: Bucket,
        draw: np.random.Generator,
    ) -> torch.Tensor:
        """As `random_clip`.

        Raises:
            PolicyReject, DamagedInput: as `random_clip`; also `decoder_crashed`, if two decoders died of it.
            OSError: the process that forks decoders has ended.
        """
        died = 0
        for _ in range(TRIES):
            decoder = self._decoder = self._decoder or self._new()
            try:
                decoder.send((video, limits, config, size, draw))
                answer = decoder.recv()
                if isinstance(answer, Exception):
                    raise answer
                frames = np.frombuffer(bytearray(decoder.recv_bytes()), np.uint8)
            except (EOFError, ConnectionResetError, BrokenPipeError):
                died = self._exit_code()
                continue
            return torch.from_numpy(frames.reshape(answer))
        how = f"by {signal.Signals(-died).name}" if died < 0 else f"with exit code {died}"
        raise DamagedInput("decoder_crashed", f"its decoder ended {how}, twice; report it with the video")

    def _new(self) -> Connection:
        self.start()
        control = self._controlled()
        control.sendall(NEW)
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            raise ChildProcessError(GONE)
        return Connection(descriptors[0])

    def _exit_code(self) -> int:
        """Exit code of the decoder that died; minus the signal's number if a signal ended it."""
        control, self._decoder = self._controlled(), None
        control.sendall(STATUS)
        answer = control.recv(4, socket.MSG_WAITALL)
        if not answer:
            raise ChildProcessError(GONE)
        return int(struct.unpack("i", answer)[0])

    def _controlled(self) -> socket.socket:
        if self._control is None:
            raise RuntimeError("no process forks decoders; call start first")
        return self._control


def may_fork() -> bool:
    """Whether this process may fork: one connected to Ray may not, because its threads hold locks that a fork would copy."""
    return torch.utils.data.get_worker_info() is not None or "ray" not in sys.modules


def _serve_forks(control: socket.socket) -> NoReturn:
    """Forks decoders on request, until the process that asks has ended."""
    try:
        keep = control.fileno()
        os.closerange(3, keep)  # the run's lock and the loaders' pipes end with their owner
        os.closerange(keep + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the owner, whose end is this one's
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        decoder = 0
        while request := control.recv(1):
            if request == STATUS:
                _, status = os.waitpid(decoder, 0)
                control.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
                continue
            ours, theirs = socket.socketpair()
            if (decoder := os.fork()) == 0:
                control.close()
                ours.close()
                _serve_clips(Connection(theirs.detach()))
            theirs.close()
            socket.send_fds(control, [NEW], [ours.fileno()])
            ours.close()
    finally:
        os._exit(0)


def _serve_clips(connection: Connection) -> NoReturn:
    """Draws clips until the other end is closed."""
    code = 1
    try:
        torch.set_num_threads(1)  # a pool of OpenMP threads does not survive a fork
        while True:
            try:
                video, limits, config, size, draw = connection.recv()
            except EOFError:
                code = 0
                break
            try:
                with only_named_errors("cutting a clip"):
                    frames = np.ascontiguousarray(random_clip(video, limits, config, size, draw).numpy())
            except Exception as error:  # noqa: BLE001 - raised again in the process that asked
                connection.send(error)
                continue
            connection.send(frames.shape)
            connection.send_bytes(frames.data.cast("B"))
    finally:
        os._exit(code)
