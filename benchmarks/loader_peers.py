"""Other loaders on the same latents: webdataset, litdata, streaming (MosaicML), Lance, torch's DataLoader over pyarrow.

Each is asked for batches of tensors of rows in random order, with 0 and 2 worker processes; the faster one counts. Runs in the environment
that `benchmarks/loader.py --install FOLDER` makes: python -m benchmarks.loader_peers NAME FOLDER BATCH SECONDS [--cold] [--workers N …]
"""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import os
import resource
import sys
import time
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import torch

from benchmarks.loader import peak_mb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKERS = (0, 2)


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
    """Rows of Lathe's Parquet files by pyarrow, a row group at a time."""

    def __init__(self, folder: str) -> None:
        import pyarrow.parquet as pq

        self.paths = sorted(glob.glob(f"{folder}/data/**/*.parquet", recursive=True))
        self.rows = []
        for number, path in enumerate(self.paths):
            footer = pq.read_metadata(path)
            for group in range(footer.num_row_groups):
                self.rows += [(number, group, row) for row in range(footer.row_group(group).num_rows)]
        self.open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> torch.Tensor:
        import pyarrow.parquet as pq

        number, group, row = self.rows[i]
        if number not in self.open:
            self.open[number] = pq.ParquetFile(self.paths[number])
        table = self.open[number].read_row_group(group, ["vae_latent_bytes", "vae_latent_shape"], use_threads=False)
        shape = table["vae_latent_shape"][row].as_py()
        return tensor_of(table["vae_latent_bytes"][row].as_buffer(), shape)


def pyarrow(folder: str, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Torch's DataLoader over pyarrow."""
    loader = plain_loader(ParquetRows(f"{folder}/parquet"), batch, workers, shuffle=True)
    return lambda: iter(loader)


def webdataset(folder: str, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Webdataset over Lathe's tars."""
    import webdataset as wds

    urls = sorted(glob.glob(f"{folder}/tar/data/**/*.tar", recursive=True))
    data = wds.WebDataset(urls, shardshuffle=100, workersplitter=wds.split_by_worker).shuffle(100).decode()
    data = data.to_tuple("latent.npy").map_tuple(torch.from_numpy).batched(batch)
    loader = wds.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: (item[0] for item in loader)


def litdata(folder: str, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Litdata over chunks of its own."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    place = f"{folder}/litdata"
    if not os.path.exists(f"{place}/index.json"):
        writer = BinaryWriter(place, chunk_bytes="64MB")
        for i, latent in enumerate(rows_of(folder)):
            writer[i] = latent
        writer.done()
        writer.merge()
    loader = StreamingDataLoader(
        StreamingDataset(place, shuffle=True), batch_size=batch, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: iter(loader)


def streaming(folder: str, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """MosaicML streaming over shards of its own. It imports torchvision for classes that are not used here."""
    if importlib.util.find_spec("torchvision") is None:
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = MagicMock(__spec__=ModuleSpec(f"torchvision{name}", None), __path__=[], VisionDataset=object)
            sys.modules[f"torchvision{name}"] = module
    from streaming import MDSWriter, StreamingDataset

    place = f"{folder}/mds"
    if not os.path.exists(f"{place}/index.json"):
        with MDSWriter(out=place, columns={"latent": "ndarray:float16"}) as writer:
            for latent in rows_of(folder):
                writer.write({"latent": latent.numpy()})

    class Rows(StreamingDataset):
        def __getitem__(self, i: int) -> torch.Tensor:
            return torch.from_numpy(super().__getitem__(i)["latent"].copy())

    loader = plain_loader(Rows(local=place, shuffle=True, batch_size=batch), batch, workers)
    return lambda: iter(loader)


def lance(folder: str, batch: int, workers: int) -> Callable[[], Iterator[Any]]:
    """Lance, random rows by `take`."""
    import lance as lance_format
    import pyarrow as pa

    place = f"{folder}/lance"
    if not os.path.exists(place):
        latents = list(rows_of(folder))
        table = pa.table({"latent": pa.array([latent.numpy().tobytes() for latent in latents], pa.large_binary())})
        lance_format.write_dataset(table, place)
    shape = list(next(rows_of(folder)).shape)
    dataset = lance_format.dataset(place)
    count = dataset.count_rows()

    def batches() -> Iterator[Any]:
        order = torch.randperm(count).tolist()
        for at in range(0, count, batch):
            rows = dataset.take(order[at : at + batch])["latent"]
            yield torch.stack([tensor_of(row.as_buffer(), shape) for row in rows])

    if workers:
        raise RuntimeError("lance reads with threads of its own")
    return batches


PEERS: dict[str, Callable[[str, int, int], Callable[[], Iterator[Any]]]] = {
    "torch DataLoader + pyarrow": pyarrow,
    "webdataset": webdataset,
    "litdata": litdata,
    "streaming": streaming,
    "lance": lance,
}


def rows_of(folder: str) -> Iterator[torch.Tensor]:
    """The latents, for those that keep them in files of their own."""
    rows = ParquetRows(f"{folder}/parquet")
    return (rows[i] for i in range(len(rows)))


def main() -> None:
    """Prints one JSON line: bytes a second, peak memory of the process and of its largest worker, or why not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("folder")
    parser.add_argument("batch", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rate": 0.0}
    for workers in arguments.workers:
        try:
            batches = PEERS[arguments.name](arguments.folder, arguments.batch, workers)
            if arguments.cold:
                drop_pages(arguments.folder)
            got = rate(batches, arguments.seconds, cold=arguments.cold)
        except ImportError as error:
            found["missing"] = f"not installed ({error})"
            break
        except Exception as error:  # noqa: BLE001  # another library's; the table says it
            found.setdefault("problem", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        if got > found["rate"]:
            found |= {"rate": got, "workers": workers}
    workers_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    print(json.dumps({**found, "rss_mb": peak_mb(), "worker_rss_mb": workers_mb}), flush=True)
    os._exit(0)  # some of them leave threads behind


if __name__ == "__main__":
    main()
