"""Run as `python -m tests.engine.ray_lanes_process ADDRESS FOLDER S3_TAR`: cases of decoder actors of a cluster, in order.

Prints a JSON object: case -> result. `FOLDER` holds `video.mp4`; the tar at `S3_TAR` holds the same video, uncompressed.
"""

import json
import os
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import ObjectStoreFullError

from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, StorageConfig
from pipeline.engine.decoders.lanes import LaneReady
from pipeline.engine.ray import lanes as ray_lanes
from pipeline.engine.ray.lanes import RayLanes
from pipeline.errors import LatheError
from pipeline.records import FrameChunk, MemberVideo, OpenedVideo, Sample, VideoEnded
from pipeline.storage import locate, open_store
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest

RULES = resolve_rules(ClipConfig(frames=(5,), size=("32x32",), select="tile"), 4, 8, "leanvae")


class Case:
    """One lane and what is asked of it."""

    def __init__(self, storage):
        self.lanes = RayLanes(1, 4 << 30, 0, 0.5, storage)
        self.home = self.lanes._home
        self.ticket = 0
        self.up()

    def up(self):
        assert self.answer() == LaneReady()

    def answer(self):
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            for _, _, answer in self.lanes.wait(0.1):
                return answer
        raise TimeoutError

    def cut(self, sample, etag=None, drill=None, *, elsewhere=False):
        """All answers until the last: kinds, a digest of the pixels, and the error."""
        self.lanes._home = "another node" if elsewhere else self.home
        self.ticket += 1
        request = CutRequest(sample.encoded_video, RULES, DecodeConfig(), 4, drill or DrillConfig(), etag)
        self.lanes.open(0, self.ticket, request)
        results = {"receiving": self.lanes.receiving(0), "pixels": 0}
        while True:
            answer = self.answer()
            if isinstance(answer, OpenedVideo | FrameChunk):
                results["pixels"] += int(answer.planes_T3HW.sum()) if isinstance(answer, FrameChunk) else 0
                self.lanes.pull(0, self.ticket)
                continue
            results["end"] = type(answer).__name__
            if isinstance(answer, LatheError):
                results |= {"message": answer.message, "blame": getattr(answer, "blame", None)}
            assert isinstance(answer, LatheError | VideoEnded)
            return results

    def dies(self, folder, sample, action, *, elsewhere=False):
        drill = DrillConfig(point="in_decoder", action=action, marker_dir=str(folder / f"{action}-{elsewhere}"))
        results = self.cut(sample, drill=drill, elsewhere=elsewhere)
        self.lanes._home = self.home
        self.lanes.restart(0)
        self.up()
        return results

    def in_a_read(self, sample, folder):
        """Before, while the decoder hangs in a FIFO without a writer, and for its successor."""
        self.lanes._home = self.home
        os.mkfifo(folder / "hung.mp4")
        results = [self.lanes.reading(0)]
        self.ticket += 1
        hung = replace(sample, video=str(folder / "hung.mp4"))
        self.lanes.open(0, self.ticket, CutRequest(hung.encoded_video, RULES, DecodeConfig(), 4, DrillConfig()))
        deadline = time.monotonic() + 240
        while not self.lanes.reading(0) and time.monotonic() < deadline:
            self.lanes.wait(0.05)
        results.append(self.lanes.reading(0))
        self.lanes.restart(0)
        self.up()
        return [*results, self.lanes.reading(0)]


def paired(sample, path):
    return replace(sample, members=(MemberVideo("control", path, "a.depth.mp4"),))


class Full:
    """An actor whose arguments do not fit into the object store."""

    def __getattr__(self, name):
        return self

    def remote(self, *arguments):
        raise ObjectStoreFullError("no space")


def main(address, folder, uri):
    credentials = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": credentials})
    ray_lanes.PIECE_BYTES = 1000
    storage = StorageConfig(part_bytes=64 * 1024)
    case, path = Case(storage), folder / "video.mp4"
    root, key = locate(uri)
    store = open_store(root, storage)
    (folder / "copy.tar").write_bytes(store.read(key))
    with tarfile.open(folder / "copy.tar") as tar:
        member = tar.getmember("a.mp4")
    in_tar = Sample("a", 0, uri, str(folder / "not here"), "mp4", span=(member.offset_data, member.size))
    at_home = Sample("a", 0, str(path), str(path), "mp4", span=(0, path.stat().st_size))
    etag = store.stat(key).etag
    results = {
        "at home": case.cut(at_home),
        "sent": case.cut(at_home, elsewhere=True),
        "sent, no file": case.cut(replace(at_home, video="/not here"), elsewhere=True),
        "fetched": case.cut(in_tar, etag, elsewhere=True),
        "fetched, replaced": case.cut(replace(in_tar, video=str(path)), "another", elsewhere=True),
        "sent, paired": case.cut(paired(at_home, str(path)), elsewhere=True),
        "sent, no member": case.cut(paired(at_home, "/not here"), elsewhere=True),
        "crash": case.dies(folder, at_home, "crash"),
        "kill": case.dies(folder, at_home, "kill"),
        "crash elsewhere": case.dies(folder, at_home, "crash", elsewhere=True),
        "kill elsewhere": case.dies(folder, at_home, "kill", elsewhere=True),
    }
    actor, case.lanes._actors[0] = case.lanes._actors[0], Full()
    results["store full"] = case.cut(at_home)
    case.lanes._actors[0] = actor
    case.lanes._storage = StorageConfig(endpoint_url="http://127.0.0.1:1", max_attempts=1)
    results["no way to the store"] = case.cut(replace(in_tar, video=str(path)), etag, elsewhere=True)
    results["in a read"] = case.in_a_read(at_home, folder)
    case.lanes.close()
    case.lanes.close()
    case.lanes.restart(0)  # the feed's thread may come late: no new actor
    results["after close"] = [len(asked) for asked in case.lanes._asked]
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
