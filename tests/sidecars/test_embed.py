"""`lathe embed`: each distinct caption once, only what is new, exactly once through kills, and refused where it does not fit."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from pipeline.config import EmbedJob, WriteConfig, validate
from pipeline.embedding.checkpoint import find_files
from pipeline.embedding.pruning import prune
from pipeline.embedding.run import EmbedReport, embed
from pipeline.embedding.texts import TextEncoder
from pipeline.embedding.upkeep import list_sets, verify_set
from pipeline.errors import CheckpointDiffers, ConfigError, InputError
from pipeline.ledger.takedowns import record_takedown
from pipeline.loader import LatentDataset, LatentLoader
from pipeline.operate.takedown import undo
from pipeline.process import kill_points
from pipeline.sidecars.names import key_of
from pipeline.sidecars.reading import SidecarReader
from pipeline.sidecars.receipts import SidecarReceipts
from pipeline.sidecars.versions import Coverage
from pipeline.storage import Store, open_store
from tests import forked_command
from tests.loader.outputs import SHORT, Output, clip_of, write_output
from tests.sidecars.encoders import save_t5
from tests.sidecars.sets import copied

CAPTIONS = ["a cat runs", "a dog", None, "a cat runs", "the dog sleeps on the red snow of a blue video", "Ein Café"]
DISTINCT = {"", "a cat runs", "a dog", "the dog sleeps on the red snow of a blue video", "Ein Café"}
NEW = "a blue cat"


def clips(first: int, captions: list[str | None]) -> list[Any]:
    return [
        clip_of(
            first + n,
            SHORT,
            caption=caption,
            captions=(("caption", caption), ("blue", "a blue video")) if caption else (),
            metadata={"short": f"short {n}", "many": ["a cat", caption or "a"]},
        )
        for n, caption in enumerate(captions)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("output")
    return write_output(folder / "out", folder / "spool", [clips(0, CAPTIONS[:3]), clips(100, CAPTIONS[3:])])


@pytest.fixture
def output(made: Output, tmp_path: Path) -> Store:
    return copied(made, tmp_path).store


def add(store: Store, captions: list[str | None]) -> None:
    """Publishes one more shard."""
    write_output(store.root, Path(store.root).parent / "spool", [clips(200, captions)], first=2)


def job_of(store: Store, folder: Path, **options: Any) -> EmbedJob:
    values = {"output": store.root, "encoder": "t5", "checkpoint": str(folder), "executor": "inline", "device": "cpu"}
    return validate(EmbedJob, {**values, "unit_rows": 2, **options})


def counts(report: EmbedReport) -> dict[str, int]:
    values = report.to_dict()
    return {name: values[name] for name in ("version", "rows", "needed", "present", "encoded")}


def test_each_distinct_caption_is_embedded_once_and_again_only_what_is_new(
    output: Store, encoder_folders: dict[str, Path]
) -> None:
    job = job_of(output, encoder_folders["t5"])
    seen: list[int] = []
    report = embed(job, lambda one: seen.append(one.encoded))
    assert counts(report) == {"version": 1, "rows": 6, "needed": 5, "present": 0, "encoded": 5}
    assert (report.without_caption, report.files, report.truncated) == (1, 3, 0)
    assert sorted(seen) == [2, 4, 5]
    assert report.tokens == sum(len(text.split()) + 1 for text in DISTINCT)
    reader = SidecarReader(output, "t5")
    assert reader.version.covers == (Coverage(1, ("caption",), reader.version.covers[0].fingerprint),)
    encoder = TextEncoder(job, find_files(job), "cpu")
    for text in DISTINCT:
        wanted = next(iter(encoder.encode([text]))).tensors["embedding"]
        found = reader.tensors(text)
        assert found is not None
        assert found["embedding"].shape == wanted.shape == (len(text.split()) + 1, 32)
        assert (
            np.abs(
                (found["embedding"].astype("<u4") << 16).view("<f4") - (wanted.astype("<u4") << 16).view("<f4")
            ).max()
            < 0.05
        )
    before = set(output.keys("_sidecars/"))
    assert counts(embed(job)) == {"version": 1, "rows": 6, "needed": 5, "present": 5, "encoded": 0}
    assert set(output.keys("_sidecars/")) == before
    add(output, ["a dog", NEW])
    assert counts(embed(job)) == {"version": 2, "rows": 8, "needed": 6, "present": 5, "encoded": 1}
    assert [one.rows for one in SidecarReceipts(output, "t5").all()] == [2, 2, 1, 1]
    assert [item["newest"]["rows"] for item in list_sets(output)] == [6]
    assert verify_set(output, "t5")["num_damaged"] == 0


def test_several_captions_of_a_row_and_its_metadata_are_embedded(
    output: Store, encoder_folders: dict[str, Path]
) -> None:
    job = job_of(output, encoder_folders["t5"])
    embed(job)
    more = embed(job_of(output, encoder_folders["t5"], captions="caption,metadata.short,metadata.many"))
    assert counts(more) == {"version": 2, "rows": 6, "needed": 10, "present": 5, "encoded": 5}
    assert counts(embed(job_of(output, encoder_folders["t5"], captions="all")))["encoded"] == 1
    with LatentLoader(
        LatentDataset.open(output.root), batch=1, epochs=1, sidecars="t5", captions=("captions", "metadata.short")
    ) as loader:
        for batch in loader:
            assert len(batch.sidecars["t5"]["embedding"][0]) == len(batch.captions[0].split()) + 1
    reader = SidecarReader(output, "t5")
    assert reader.has([key_of("a blue video")]).all()
    assert reader.has([key_of(text) for text in ("short 0", "short 2", "a cat", "a", *DISTINCT)]).all()
    assert [one.captions for one in reader.version.covers] == [
        ("caption",),
        ("caption", "metadata.short", "metadata.many"),
        ("caption", "captions"),
    ]


def test_another_encoder_under_the_same_name_is_refused(output: Store, encoder_folders: dict[str, Path]) -> None:
    embed(job_of(output, encoder_folders["t5"]))
    with pytest.raises(ConfigError, match=r"set t5 of .* was made differently: layer -1, now 1; use the same settings"):
        embed(job_of(output, encoder_folders["t5"], layer=1))
    embed(job_of(output, encoder_folders["t5"], layer=1, name="t5-layer1"))
    clip = embed(job_of(output, encoder_folders["clip"], encoder="clip"))
    assert clip.tensors == {"embedding": "bfloat16 […, 32]", "pooled": "bfloat16 [32]"}
    assert [one["name"] for one in list_sets(output)] == ["clip", "t5", "t5-layer1"]


def test_weights_replaced_while_they_are_loaded_are_refused(
    output: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Replaced(TextEncoder):
        def __init__(self, job: EmbedJob, files: Any, device: str) -> None:
            save_t5(tmp_path / "t5", seed=1)
            super().__init__(job, files, device)

    save_t5(tmp_path / "t5")
    monkeypatch.setattr("pipeline.embedding.texts.TextEncoder", Replaced)
    monkeypatch.setattr("pipeline.embedding.run.PAUSE_S", 0.0)
    with pytest.raises(CheckpointDiffers, match="has other weights_sha256 than the run was planned with"):
        embed(job_of(output, tmp_path / "t5"))
    assert not SidecarReceipts(output, "t5").all()


def test_nothing_published_is_an_error_that_says_what_to_do(tmp_path: Path, encoder_folders: dict[str, Path]) -> None:
    store = write_output(tmp_path / "out", tmp_path / "spool", [clips(0, ["a"])], publishing=False).store
    with pytest.raises(InputError, match="run `lathe publish"):
        embed(job_of(store, encoder_folders["t5"]))


class Killed(BaseException):
    """Ends a run where a kill would."""


POINTS = ("in_load", "before_upload", "after_upload", "before_commit", "before_read_back", "after_commit")


@pytest.mark.parametrize("point", [*POINTS, "before_manifest", "before_snapshot", "after_snapshot"])
def test_a_run_that_ends_anywhere_is_finished_by_the_next(
    output: Store, encoder_folders: dict[str, Path], tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(action: str, where: str) -> None:
        raise Killed(where)

    monkeypatch.setattr(kill_points, "_act", die)
    job = job_of(output, encoder_folders["t5"], drill={"point": point, "marker_dir": str(tmp_path / "marks")})
    with pytest.raises(Killed, match=point):
        embed(job)
    report = embed(job)
    assert counts(report)["version"] == 1
    check_exactly_once(output)


def check_exactly_once(store: Store) -> None:
    """Every text counts in one row of one receipt, and no receipt names a file that is not there."""
    reader, receipts = SidecarReader(store, "t5"), SidecarReceipts(store, "t5").all()
    assert len(reader) == sum(one.rows for one in receipts) == len(DISTINCT)
    assert reader.has([key_of(text) for text in DISTINCT]).all()
    assert verify_set(store, "t5")["num_damaged"] == 0


def test_kill_9_loses_and_doubles_nothing(output: Store, encoder_folders: dict[str, Path], tmp_path: Path) -> None:
    command = ["embed", output.root, "--encoder", "t5", "--checkpoint", encoder_folders["t5"], "--device", "cpu"]
    command += ["--executor", "inline", "--set", "unit_rows=2", "--set", "drill.point=before_read_back"]
    killed = forked_command.run(*command, "--set", f"drill.marker_dir={tmp_path / 'marks'}")
    assert killed.returncode == -9, killed.stderr
    assert [one["newest"] for one in list_sets(output)] == [None]
    assert embed(job_of(output, encoder_folders["t5"])).encoded == 3, "one receipt of two rows was there"
    check_exactly_once(output)


def test_two_runs_at_once_keep_the_embeddings_of_the_first(
    output: Store, encoder_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.embedding import worker

    job, theirs = job_of(output, encoder_folders["t5"]), []
    real = worker.store_unit

    def slower(store: Store, *arguments: Any, **options: Any) -> Any:
        if not theirs:  # another run does everything while this attempt has not stored its first unit
            theirs.append(None)
            theirs.append(embed(job))
        return real(store, *arguments, **options)

    monkeypatch.setattr(worker, "store_unit", slower)
    mine = embed(job)
    assert (mine.encoded, mine.by_others, theirs[1].encoded, mine.version) == (0, 5, 5, 1)
    check_exactly_once(output)
    assert len([key for key in output.keys("_sidecars/t5/data/") if key.endswith(".sidecar")]) == 3


def test_a_store_without_conditional_writes_counts_each_text_once(
    output: Store, encoder_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(output), "conditional_writes", lambda self: False)
    job = job_of(open_store(output.root, job_of(output, encoder_folders["t5"]).storage), encoder_folders["t5"])
    embed(job)
    assert embed(job).encoded == 0
    check_exactly_once(output)
    assert all("--" in key for key in output.keys("_sidecars/t5/receipts/"))


@pytest.mark.parametrize("container", ["parquet", "tar"])
def test_first_frames_are_embedded_by_row(
    tmp_path: Path, encoder_folders: dict[str, Path], container: Literal["parquet", "tar"]
) -> None:
    config = WriteConfig(format=container, store=("first_frame",))
    made = [[clip_of(seed, SHORT, store=("first_frame",)) for seed in range(first, first + 3)] for first in (0, 100)]
    store = write_output(tmp_path / "out", tmp_path / "spool", made, config).store
    folder = encoder_folders["clip_vision"]
    options = {
        "encoder": "clip",
        "from_column": "first_frame",
        "compute_dtype": "float32",
        "dtype": "float32",
        "layer": -2,
    }
    report = embed(job_of(store, folder, **options))
    assert (report.needed, report.encoded, report.captions) == (6, 6, ())
    assert report.tensors == {"embedding": "float32 […, 32]", "pooled": "float32 [32]"}
    assert embed(job_of(store, folder, **options)).encoded == 0
    plain = transformers.CLIPVisionModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    with LatentLoader(LatentDataset.open(store.root), batch=1, epochs=1, sidecars="clip") as loader:
        batches = {batch.ids[0]: batch.sidecars["clip"] for batch in loader}
    assert batches.keys() == {clip.id for shard in made for clip in shard}
    for clip in (clip for shard in made for clip in shard):
        image = Image.open(io.BytesIO(clip.first_frame or b"")).convert("RGB")
        with torch.inference_mode():
            wanted = plain(processor([image], return_tensors="pt")["pixel_values"], output_hidden_states=True)
        found = batches[clip.id]
        torch.testing.assert_close(found["embedding"][0], wanted.hidden_states[-2][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["pooled"][0], wanted.pooler_output[0], atol=1e-5, rtol=1e-5)


@pytest.mark.s3
def test_sets_on_s3_are_made_read_and_pruned(s3: Any, tmp_path: Path, encoder_folders: dict[str, Path]) -> None:
    storage = s3.config()
    store = write_output(f"{s3.root}/out", tmp_path, [clips(0, CAPTIONS)], storage=storage).store
    job = job_of(store, encoder_folders["t5"], storage=storage.model_dump())
    assert embed(job).encoded == 5
    assert embed(job).encoded == 0
    dataset = LatentDataset.open(store.root, storage=storage)
    record_takedown(
        store, "asked for", ids=[row.id for row in dataset.rows(tensors=False) if row.caption == CAPTIONS[4]]
    )
    with LatentLoader(dataset, batch=2, epochs=1, sidecars="t5", seed=3) as loader:
        for batch in loader:
            found = [len(tensor) for tensor in batch.sidecars["t5"]["embedding"]]
            assert found == [len(text.split()) + 1 for text in batch.captions]
    report = prune(store, "t5", storage, grace_s=-3600.0)
    assert (report.pruned, report.rows, report.deleted) == (1, 4, 1)
    assert verify_set(store, "t5")["num_damaged"] == 0


def test_an_output_without_the_column_of_images_is_refused(output: Store, encoder_folders: dict[str, Path]) -> None:
    job = job_of(output, encoder_folders["clip_vision"], encoder="clip", from_column="first_frame", name="pixels")
    with pytest.raises(InputError, match=r"has no column first_frame .* encode with --store first_frame"):
        embed(job)


def test_rows_that_were_hidden_while_embedding_are_missed_when_they_show_again(
    output: Store, encoder_folders: dict[str, Path]
) -> None:
    secret = "the dog sleeps on the red snow of a blue video"
    (name,) = [row.id for _, _, row in LatentDataset.open(output.root).placed() if row.caption == secret]
    record_takedown(output, "asked for", ids=[name])
    job = job_of(output, encoder_folders["t5"], captions="all")
    assert counts(embed(job))["encoded"] == len(DISTINCT)  # one less, and "a blue video"
    assert SidecarReader(output, "t5").version.captions == ("caption", "captions")
    LatentLoader(LatentDataset.open(output.root), batch=1, sidecars="t5").close()
    undo(output, name, reason="a mistake", by="me")
    with pytest.raises(InputError, match=f"1 of 6 rows of .* have no tensors in t5@1, such as {name}"):
        LatentLoader(LatentDataset.open(output.root), batch=1, sidecars="t5")
    assert counts(embed(job))["encoded"] == 1
    LatentLoader(LatentDataset.open(output.root), batch=1, sidecars="t5").close()


def test_settings_that_fail_do_not_keep_the_name_of_the_set(output: Store, encoder_folders: dict[str, Path]) -> None:
    folder, options = encoder_folders["gemma"], {"encoder": "gemma"}
    with pytest.raises(ConfigError, match="the empty caption has no token to store; give a template"):
        embed(job_of(output, folder, **options))
    assert list_sets(output) == []
    assert embed(job_of(output, folder, **options, template="Describe video : {}")).encoded == len(DISTINCT)
    with pytest.raises(ConfigError, match="was made differently: template"):
        embed(job_of(output, folder, **options, template="Describe {}"))
