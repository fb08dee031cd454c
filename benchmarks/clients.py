"""Other readers on Lathe's files: Spark, Daft, DataFusion, fastparquet, litdata, Energon and those of the test suite, values compared.

Makes outputs of both containers, one with streamed pages, and reads each by its root and by its data folder. Every tensor must equal what
the byte index and a ranged read give. Prints a Markdown table; exits 1 if a reader gave other values. The table says which readers are not
installed. `make clients` makes the environment: python benchmarks/clients.py --install FOLDER.
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

# Arguments of pip. Energon and litdata without their dependencies, of which the project has most: pip does not find an end with them.
PACKAGES = [
    "daft datafusion fastparquet",
    "--no-deps litdata lightning-utilities tifffile",
    "--no-deps megatron-energon braceexpand bracex filetype lark mfusepy multi-storage-client pyjson5 rapidyaml s3fs wcmatch",
    "pyspark",
]
Tensors = dict[str, bytes]


def install(folder: Path) -> None:
    """A virtual environment that sees this one's packages and has the other readers on top."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (place,) = folder.glob("lib/python*/site-packages")
        (place / "lathe.pth").write_text("\n".join(item for item in sys.path if item.endswith("site-packages")))
    for names in PACKAGES:
        done = subprocess.run([python, "-m", "pip", "install", "-q", "--no-input", *names.split()], check=False)
        if done.returncode:
            print(f"pip install {names} failed; the table will say which readers are missing", file=sys.stderr)


def outputs(folder: Path) -> dict[str, Path]:
    """Outputs by name, from clips of random values: no network is needed to write files."""
    from pipeline.config import StorageConfig, WriteConfig
    from pipeline.format.card import hugging_face_config
    from pipeline.format.layout import HUGGING_FACE_KEY
    from pipeline.ledger.receipts import Ledger
    from pipeline.records import Bucket
    from pipeline.storage import open_store
    from tests.pipeline.latent_clips import FINGERPRINT, latent_clip, write_shard

    small, wide, large = Bucket(17, 64, 48), Bucket(17, 64, 64), Bucket(17, 4608, 3072)
    made = {
        "parquet": (WriteConfig(), [(n, small if n % 2 else wide) for n in range(60)]),
        "moments": (WriteConfig(moments=True, dtype="bfloat16"), [(n, small) for n in range(20)]),
        "streamed": (WriteConfig(dtype="float32"), [(n, large) for n in range(2)]),
        "tar": (WriteConfig(format="tar"), [(n, small if n % 2 else wide) for n in range(60)]),
    }
    for name, (config, clips) in made.items():
        store = open_store(str(folder / name), StorageConfig())
        ledger = Ledger(store)
        ledger.prepare(name)
        rows = [latent_clip(n, bucket=bucket, dtype=config.dtype, moments=config.moments) for n, bucket in clips]
        ledger.commit(write_shard(store, folder / "spool", config, rows))
        store.write(HUGGING_FACE_KEY, (hugging_face_config(None, FINGERPRINT, config.format) or "").encode())
        store.write("_README.md", b"# Video latents\n")
    return {name: folder / name for name in made}


def by_index(output: Path) -> Tensors:
    """The tensors as docs/formats.md says: byte index, then a ranged read."""
    import pyarrow.parquet as pq

    found = {}
    for index in output.glob("_index/*/*/*.idx"):
        with index.open("rb") as file:
            table = pq.read_table(file)
        (data,) = glob.glob(str(output / "data" / index.relative_to(output / "_index").with_suffix(".*")))
        with open(data, "rb") as file:
            for row in table.to_pylist():
                found[row["id"]] = os.pread(file.fileno(), row["latent_length"], row["latent_offset"])
    return found


def pairs(rows: list[dict[str, Any]]) -> Tensors:
    """Rows of any engine as tensors by id; a latent that is missing is an empty one, so that it is noticed."""
    found = {row["id"]: bytes(row["vae_latent_bytes"] or b"") for row in rows}
    if len(found) != len(rows):
        raise ValueError(f"{len(rows)} rows with {len(found)} ids")
    return found


def files(place: Path, suffix: str) -> list[str]:
    """Data files as a glob finds them."""
    return sorted(glob.glob(f"{place}/**/*.{suffix}", recursive=True))


def spark(place: Path) -> Tensors:
    """Apache Spark (parquet-mr), with the option that descends into folders."""
    from pyspark.sql import SparkSession

    if shutil.which("java") is None:
        raise ModuleNotFoundError("no java: install default-jre-headless")
    session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    frame = session.read.option("recursiveFileLookup", True).parquet(str(place))
    return pairs([row.asDict() for row in frame.select("id", "vae_latent_bytes").collect()])


def daft(place: Path) -> Tensors:
    """Daft, by glob."""
    import daft

    frame = daft.read_parquet(f"{place}/**/*.parquet").select("id", "vae_latent_bytes")
    return pairs(frame.to_arrow().to_pylist())


def datafusion(place: Path) -> Tensors:
    """DataFusion (parquet-rs), by folder."""
    from datafusion import SessionConfig, SessionContext

    option = {"datafusion.execution.listing_table_ignore_subdirectory": "false"}
    context = SessionContext(SessionConfig(option))
    context.register_parquet("latents", f"{place}/")
    return pairs(context.sql("select id, vae_latent_bytes from latents").to_arrow_table().to_pylist())


def fastparquet(place: Path) -> Tensors:
    """fastparquet, file by file."""
    from fastparquet import ParquetFile

    return pairs(
        [
            row
            for path in files(place, "parquet")
            for row in ParquetFile(path).to_pandas(["id", "vae_latent_bytes"]).to_dict("records")
        ]
    )


def pyarrow(place: Path) -> Tensors:
    """pyarrow.dataset, by folder."""
    import pyarrow.dataset

    return pairs(pyarrow.dataset.dataset(place).to_table(columns=["id", "vae_latent_bytes"]).to_pylist())


def polars(place: Path) -> Tensors:
    """polars, by glob."""
    import polars

    return pairs(polars.scan_parquet(f"{place}/**/*.parquet").select("id", "vae_latent_bytes").collect().to_dicts())


def duckdb(place: Path) -> Tensors:
    """DuckDB, by glob."""
    import duckdb

    with duckdb.connect() as connection:
        rows = connection.execute(f"select id, vae_latent_bytes from '{place}/**/*.parquet'").fetchall()
    return pairs([{"id": name, "vae_latent_bytes": data} for name, data in rows])


def hugging_face(place: Path) -> Tensors:
    """Hugging Face datasets, by folder."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        loaded = datasets.load_dataset(str(place), split="train", cache_dir=cache)
        if "latent.npy" not in loaded.column_names:
            return pairs(list(loaded))
        return {row["__key__"]: np.array(row["latent.npy"], "<f2").tobytes() for row in loaded}


def ray_data(place: Path) -> Tensors:
    """Ray Data, by folder."""
    import ray.data

    return pairs(ray.data.read_parquet(str(place), columns=["id", "vae_latent_bytes"]).take_all())


def litdata(place: Path) -> Tensors:
    """litdata, one bucket folder at a time: it does not descend."""
    from litdata import StreamingDataset, index_parquet_dataset
    from litdata.streaming.item_loader import ParquetLoader

    found: list[dict[str, Any]] = []
    for folder in sorted({str(Path(path).parent) for path in files(place, "parquet")}):
        with tempfile.TemporaryDirectory() as cache:
            index_parquet_dataset(folder, cache)
            found += list(StreamingDataset(folder, item_loader=ParquetLoader(), index_path=cache))
    return pairs(found)


def webdataset(place: Path) -> Tensors:
    """webdataset, by glob."""
    import webdataset as wds

    samples = wds.WebDataset(files(place, "tar"), shardshuffle=False)
    return {item["__key__"]: np.load(io.BytesIO(item["latent.npy"])).tobytes() for item in samples}


def energon(place: Path) -> Tensors:
    """Megatron-Energon on a copy, because it writes its index beside the tars."""
    import yaml
    from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(place, f"{folder}/set"))
        command = [
            "prepare",
            "--non-interactive",
            "--split-parts",
            "train:.*\\.tar",
            "--sample-type",
            "CrudeWebdataset",
            str(copy),
        ]
        program = Path(sys.executable).with_name("energon")
        subprocess.run([program, *command], check=True, capture_output=True)
        described = {
            "__module__": "megatron.energon",
            "__class__": "CaptioningWebdataset",
            "field_map": {"image": "latent.npy", "caption": "txt"},
        }
        (copy / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(described))
        found = {}
        config = WorkerConfig(rank=0, world_size=1, num_workers=0)
        dataset = get_train_dataset(
            str(copy),
            worker_config=config,
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            repeat=False,
        )
        for item in get_savable_loader(dataset):
            found[item.__key__.rpartition("/")[2]] = np.asarray(item.image).tobytes()
    return found


PARQUET = [spark, daft, datafusion, fastparquet, pyarrow, polars, duckdb, hugging_face, ray_data, litdata]
TAR = [webdataset, energon, hugging_face]
DISTRIBUTIONS = {"spark": "pyspark", "hugging_face": "datasets", "ray_data": "ray", "energon": "megatron-energon"}


def compare(read: Callable[[Path], Tensors], place: Path, expected: Tensors) -> str:
    """One cell of the table: `equal`, or what is wrong."""
    try:
        found = read(place)
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except Exception as error:  # noqa: BLE001 - whatever a foreign reader raises is the finding
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:70]}"
    if found == expected:
        return "equal"
    wrong = sum(found.get(name) != data for name, data in expected.items())
    return f"**DIFFERENT**: {len(found)} of {len(expected)} rows, {wrong} wrong or missing"


def version(name: str) -> str:
    """Installed version of a reader's package."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "-"


def main() -> int:
    """Prints the table; 1 if values differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", type=Path, help="make a virtual environment there, and run in it")
    parser.add_argument("--only", nargs="*", help="names of readers")
    args = parser.parse_args()
    if args.install:
        install(args.install)
        command = [str(args.install / "bin" / "python"), __file__, *(["--only", *args.only] if args.only else [])]
        return subprocess.run(
            command, check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        ).returncode
    cells = []
    print("| reader | output | by the root | by `data/{fp8}` |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="clients-") as folder:
        for name, output in outputs(Path(folder)).items():
            expected = by_index(output)
            (data,) = (output / "data").iterdir()
            for read in TAR if name == "tar" else PARQUET:
                reader = read.__name__
                if args.only and reader not in args.only:
                    continue
                cells.append([compare(read, place, expected) for place in (output, data)])
                print(f"| {reader} {version(reader)} | {name} | {cells[-1][0]} | {cells[-1][1]} |", flush=True)
    return int(any("DIFFERENT" in cell for pair in cells for cell in pair))


if __name__ == "__main__":
    sys.exit(main())
