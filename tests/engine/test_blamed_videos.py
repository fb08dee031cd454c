"""Videos that ended workers: rejected or encoded in steps of their own by the next attempt. Errors of a device."""

import pytest

import pipeline
from pipeline.engine.driver.blamed_videos import BlamedVideos
from pipeline.engine.worker.blamed_video import BlamedVideo
from pipeline.engine.worker.device_fault import device_fault
from pipeline.engine.worker.encode_loop import EncodeLoop
from pipeline.errors import BuildError
from tests.tiny_corpus import receipts, rows, tiny_job, video_bytes, write_tar


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    content = {name: {"mp4": video_bytes(29, seed=n), "txt": b"x"} for n, name in enumerate("abcd")}
    return write_tar(tmp_path_factory.mktemp("corpus") / "x.tar", content)


def test_video_that_ended_workers_is_rejected_and_a_suspect_shares_no_step(shard, tmp_path, monkeypatch):
    blamed = (
        BlamedVideo(str(shard), "a", 2, True, "its process crashed: segmentation fault (SIGSEGV)"),
        BlamedVideo(str(shard), "c", 1, False, "the same"),
    )
    monkeypatch.setattr(BlamedVideos, "of", lambda self, shard_id: blamed)
    steps, launch = [], EncodeLoop._launch

    def record(self, batch):
        steps.append({run.token.video.sample.key for run, _ in batch})
        launch(self, batch)

    monkeypatch.setattr(EncodeLoop, "_launch", record)
    report = pipeline.encode(tiny_job(shard, tmp_path / "out", "engine.decoders=3", "engine.batch=4"))
    assert report.rejects == {"ended_worker": 1}
    (receipt,) = receipts(tmp_path / "out")
    (reject,) = receipt.rejects
    assert (reject.key, reject.policy, reject.stage) == ("a", False, "encode")
    assert reject.message == "it ended its worker 2 times; the last: its process crashed: segmentation fault (SIGSEGV)"
    assert {row["source_key"] for row in rows(tmp_path / "out").values()} == {"b", "c", "d"}
    assert {"c"} in steps
    assert not [step for step in steps if "c" in step and len(step) > 1]


def test_error_of_the_device_in_this_process_ends_the_build_and_the_same_command_resumes(shard, tmp_path):
    drill = ("drill.point=mid_video", "drill.action=device_error", f"drill.marker_dir={tmp_path / 'm'}")
    with pytest.raises(BuildError, match=r"the device failed: CUDA error: an illegal memory access.*resumes") as caught:
        pipeline.encode(tiny_job(shard, tmp_path / "out", *drill))
    assert caught.value.exit_code == 1
    assert pipeline.encode(tiny_job(shard, tmp_path / "out")).counts.encoded == 4


class AcceleratorError(RuntimeError):
    """As torch names it since 2.9."""


class OutOfMemoryError(RuntimeError):
    """As torch.cuda names it."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be\n"),
            "CUDA error: an illegal memory access was encountered",
        ),
        (AcceleratorError("unspecified launch failure\nmore"), "unspecified launch failure"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        (RuntimeError("CUDA error: device-side assert triggered"), "CUDA error: device-side assert triggered"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None),
        (RuntimeError("CUDA error: out of memory"), None),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), None),
        (ValueError("x"), None),
    ],
)
def test_errors_of_a_device_are_told_from_others(error, line):
    assert device_fault(error) == line
