"""Other loaders on the same latents: webdataset, litdata, streaming (MosaicML), Lance, LanceDB, torch's DataLoader over pyarrow.

Each is asked for batches of tensors of rows in random order, with 0 and 2 worker processes; the faster one counts. What random means there:
any row after any other (pyarrow, Lance, LanceDB); chunks of 64 MB, and rows within a chunk (litdata); blocks of rows that span some shards
of 64 MB (streaming); shards, and rows within 100 that are held (webdataset). The last three read in longer runs, also of a cold disk.

`lancedb` is LanceDB's streaming dataset (`lancedb.streaming.StreamingDataset` of lancedb 0.40.0) with its defaults: rows shuffled one by
one, 64 rows a read, 4 reads ahead in threads. It reads the files that `lance` reads by `take` in one thread.

Runs in the environment that `python -m benchmarks.loader --install FOLDER` makes:
python -m benchmarks.loader_peers NAME FOLDER BATCH SECONDS [--cold] [--workers N …] [--remote s3://…]
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import torch

from benchmarks import loader_s3
from benchmarks.loader import peak_mb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKERS = (0, 2)
TABLE = "latents"


@dataclass(frozen=True)
class Place:
    """A folder with a folder for each form of the latents; with `remote`, the URI below which the same forms are read instead.

    `cache` is an empty folder for those that keep what they have read.
    """

    folder: str
    cache: str
    remote: str = ""

    def form(self, name: str, write: Callable[[str, Iterator[torch.Tensor]], None] | None = None) -> str:
        """Where to read a form, which `write` makes of the latents if it is not there."""
        place = f"{self.folder}/{name}"
        if write is not None and not os.path.exists(place):
            shutil.rmtree(f"{place}.part", ignore_errors=True)
            write(f"{place}.part", self.latents())
            os.rename(f"{place}.part", place)  # a run that was ended leaves no half of it
        if not self.remote:
            return place
        loader_s3.upload(place, f"{self.remote}/{name}")
        return f"{self.remote}/{name}"

    def latents(self) -> Iterator[torch.Tensor]:
        """The latents, for those that keep them in files of their own."""
        rows = ParquetRows(f"{self.folder}/parquet")
        return (rows[i] for i in range(len(rows)))


def drop_pages(folder: str) -> None:
    """Drops the page cache of all files below a folder."""
    for path in glob.glob(f"{folder}/**/*", recursive=True):
        if os.path.isfile(path):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def rate(batches: Callable[[], Iterator[Any]], seconds: float, *, cold: bool) -> float:
    """Bytes a second of tensors over whole epochs; the first one warms up unless `cold`, which measures one epoch."""
    if not cold:
        for _ in batches():
            pass
    total, began = 0, time.perf_counter()
    while True:
        for batch in batches():
            total += batch.numel() * batch.element_size()
        if cold or time.perf_counter() - began > seconds:
            return total / (time.perf_counter() - began)


def tensor_of(data: Any, shape: list[int]) -> torch.Tensor:
    """Stored bytes as float16 `C T h w`."""
    return torch.frombuffer(bytearray(data), dtype=torch.float16).reshape(shape)


def plain_loader(data: Any, batch: int, workers: int, **options: Any) -> torch.utils.data.DataLoader:
    """A DataLoader as its documentation says, workers kept over epochs."""
    return torch.utils.data.DataLoader(
        data, batch_size=batch, num_workers=workers, persistent_workers=workers > 0, **options
    )


class ParquetRows(torch.utils.data.Dataset):
    """Rows of Lathe's Parquet files by pyarrow, a row group at a time. Rows come from `remote` if given, their list from the folder."""

    def __init__(self, folder: str, remote: str = "") -> None:
        import pyarrow.parquet as pq

        self.paths = sorted(glob.glob(f"{folder}/data/**/*.parquet", recursive=True))
        self.rows = []
        for number, path in enumerate(self.paths):
            footer = pq.read_metadata(path)
            for group in range(footer.num_row_groups):
                self.rows += [(number, group, row) for row in range(footer.row_group(group).num_rows)]
        self.remote = [path.replace(folder, remote) for path in self.paths] if remote else []
        self.open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        import pyarrow.parquet as pq

        number, group, row = self.rows[i]
        if number not in self.open:
            source = loader_s3.arrow_file(self.remote[number]) if self.remote else self.paths[number]
            self.open[number] = pq.ParquetFile(source)
        table = self.open[number].read_row_group(group, ["vae_latent_bytes", "vae_latent_shape"], use_threads=False)
        shape = table["vae_latent_shape"][row].as_py()
        return tensor_of(table["vae_latent_bytes"][row].as_buffer(), shape)


def pyarrow(place: Place, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Torch's DataLoader over pyarrow."""
    data = ParquetRows(f"{place.folder}/parquet", place.form("parquet") if place.remote else "")
    loader = plain_loader(data, batch, workers, shuffle=True)
    return lambda: iter(loader)


def webdataset(place: Place, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Webdataset over Lathe's tars; from S3 by signed URLs, which it reads with curl."""
    import webdataset as wds

    tars = place.form("tar")
    local = sorted(glob.glob(f"{tars}/data/**/*.tar", recursive=True))
    urls = loader_s3.signed_urls(tars, ".tar") if place.remote else local
    data = wds.WebDataset(urls, shardshuffle=100, workersplitter=wds.split_by_worker).shuffle(100).decode()
    data = data.to_tuple("latent.npy").map_tuple(torch.from_numpy).batched(batch)
    loader = wds.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: (item[0] for item in loader)


def litdata(place: Place, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Litdata over chunks of its own."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader
    from litdata.streaming.writer import BinaryWriter

    def write(folder: str, latents: Iterator[torch.Tensor]) -> None:
        writer = BinaryWriter(folder, chunk_bytes="64MB")
        for i, latent in enumerate(latents):
            writer[i] = latent
        writer.done()
        writer.merge()

    if place.remote:  # its own client reads chunks by HTTPS only by default
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    data = StreamingDataset(place.form("litdata", write), cache_dir=place.cache if place.remote else None, shuffle=True)
    loader = StreamingDataLoader(data, batch_size=batch, num_workers=workers, persistent_workers=workers > 0)
    return lambda: iter(loader)


def streaming(place: Place, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """MosaicML streaming over shards of its own. It imports torchvision for classes that are not used here."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = MagicMock(__spec__=ModuleSpec(f"torchvision{name}", None), __path__=[], VisionDataset=object)
            sys.modules[f"torchvision{name}"] = module
    from streaming import MDSWriter, StreamingDataset

    def write(folder: str, latents: Iterator[torch.Tensor]) -> None:
        with MDSWriter(out=folder, columns={"latent": "ndarray:float16"}) as writer:
            for latent in latents:
                writer.write({"latent": latent.numpy()})

    class Rows(StreamingDataset):
        def __getitem__(self, i: int) -> torch.Tensor:
            return torch.from_numpy(super().__getitem__(i)["latent"].copy())

    shards = place.form("mds", write)
    where = {"remote": shards, "local": place.cache} if place.remote else {"local": shards}
    loader = plain_loader(Rows(**where, shuffle=True, batch_size=batch), batch, workers)
    return lambda: iter(loader)


def write_lance(folder: str, latents: Iterator[torch.Tensor]) -> None:
    """A table of Lance, which is also one of a LanceDB in that folder."""
    import lance as lance_format
    import pyarrow as pa

    values = pa.array([latent.numpy().tobytes() for latent in latents], pa.large_binary())
    lance_format.write_dataset(pa.table({"latent": values}), f"{folder}/{TABLE}.lance")


def lance(place: Place, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Lance, random rows by `take`."""
    import lance as lance_format

    if workers:
        raise RuntimeError("lance reads with threads of its own")
    shape = list(next(place.latents()).shape)
    options = loader_s3.lance_options() if place.remote else None
    dataset = lance_format.dataset(f"{place.form('lance', write_lance)}/{TABLE}.lance", storage_options=options)
    count = dataset.count_rows()

    def batches() -> Iterator[Any]:
        order = torch.randperm(count).tolist()
        for at in range(0, count, batch):
            rows = dataset.take(order[at : at + batch])["latent"]
            yield torch.stack([tensor_of(row.as_buffer(), shape) for row in rows])

    return batches


def lancedb(place: Place, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """LanceDB's streaming dataset, a new one for each epoch as its documentation says."""
    import lancedb as database
    from lancedb.streaming import StreamingDataset

    if workers:
        raise RuntimeError("lancedb reads with threads of its own")
    shape = list(next(place.latents()).shape)
    options = loader_s3.lance_options() if place.remote else None
    table = database.connect(place.form("lance", write_lance), storage_options=options).open_table(TABLE)
    epochs = itertools.count()

    def tensors(rows: Any) -> list[torch.Tensor]:
        return [tensor_of(row.as_buffer(), shape) for row in rows.column("latent")]

    return lambda: iter(plain_loader(StreamingDataset(table, epoch=next(epochs), transform=tensors), batch, 0))


PEERS: dict[str, Callable[[Place, int, int], Callable[[], Iterator[Any]]]] = {
    "torch DataLoader + pyarrow": pyarrow,
    "webdataset": webdataset,
    "litdata": litdata,
    "streaming": streaming,
    "lance": lance,
    "lancedb": lancedb,
}


def main() -> None:
    """Prints one JSON line: bytes a second, peak memory of the process and of its largest worker, or why not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder")
    parser.add_argument("batch", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--remote", default="", help="s3://… below which the forms of FOLDER are copied and read")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rate": 0.0}
    cache = tempfile.mkdtemp(dir=arguments.folder)
    for workers in arguments.workers:
        try:
            place = Place(arguments.folder, tempfile.mkdtemp(dir=cache), arguments.remote)
            batches = PEERS[arguments.name](place, arguments.batch, workers)
            if arguments.cold:
                drop_pages(arguments.folder)
            got = rate(batches, arguments.seconds, cold=arguments.cold or bool(arguments.remote))
        except ImportError as error:
            found["missing"] = f"not installed ({error})"
            break
        except Exception as error:  # noqa: BLE001  # another library's; the table says it
            found.setdefault("problem", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if got > found["rate"]:
            found |= {"rate": got, "workers": workers}
    workers_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    shutil.rmtree(cache, ignore_errors=True)
    print(json.dumps({**found, "rss_mb": peak_mb(), "worker_rss_mb": workers_mb}), flush=True)
    os._exit(0)  # some of them leave threads behind


if __name__ == "__main__":
    main()
