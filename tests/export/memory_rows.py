"""Rows in memory as an export reads them, tables of text embeddings, and a run of an export over both."""

import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.export.models import choose_model
from pipeline.export.rows import Latent, Row, Source
from pipeline.export.run import export

WAN_MEAN = [0.25 * channel - 1 for channel in range(16)]
WAN_STD = [1 + 0.125 * channel for channel in range(16)]
WAN = {
    "network": "wan-2.1",
    "latent_channels": 16,
    "time_stride": 4,
    "space_stride": 8,
    "lead_frames": 1,
    "scale": None,
    "shift": None,
    "mean": WAN_MEAN,
    "std": WAN_STD,
}
SOURCE = Source("0123", "/out", 1, WAN, "AutoencoderKLWan")


@dataclass
class MemoryRows:
    """`Rows` with random latents. `reads` counts those read, `most` is the greatest number of them in memory at once."""

    source: Source = SOURCE
    rows: list = field(default_factory=list)
    reads: int = 0
    most: int = 0

    def __iter__(self):
        return iter(self.rows)

    def latents(self, rows, others=()):
        alive = weakref.WeakSet()
        for row in rows:
            self.reads += 1
            latent = latent_of(row)
            alive.add(latent)
            self.most = max(self.most, len(alive))
            yield Latent(latent, cond=-latent if "i2v_cond" in others else None)


def latent_of(row, dtype=torch.float16):
    """The stored latent of a row, the same each time."""
    seed = torch.Generator().manual_seed(sum(map(ord, row.id)))
    return torch.randn(row.shape, generator=seed).to(dtype)


def wan_row(name, frames=5, height=32, width=48, **facts):
    """A row of Wan's shape."""
    shape = (16, 1 + (frames - 1) // 4, height // 8, width // 8)
    bucket = f"{frames}x{height}x{width}"
    values = {
        "fps": 16.0,
        "duration_s": frames / 16.0,
        "caption": f"caption of {name}",
        "file_name": f"{name}.mp4",
        **facts,
    }
    return Row(name, bucket, shape, frames, width, height, **values)


def normalised(latent, spec=WAN):
    """By the network's constants, in float32."""
    mean, std = (torch.tensor(spec[name]).reshape(-1, 1, 1, 1) for name in ("mean", "std"))
    return (latent.float() - mean) / std


def text_of(row, width, tokens=None):
    """Embedding of a row's caption."""
    seed = torch.Generator().manual_seed(sum(map(ord, row.id)) + 1)
    return torch.randn((tokens or 3 + len(row.id) % 3, width), generator=seed).to(torch.bfloat16)


def write_texts(path, rows, width, *, key="id", tokens=None, extra=None, **options):
    """A table of embeddings of `rows`; `extra(row)` gives more tensors by name."""
    records = []
    for row in rows:
        tensors = {"embedding": text_of(row, width, tokens), **(extra(row) if extra else {})}
        record = {key: row.id if key == "id" else row.caption}
        for name, tensor in tensors.items():
            record[f"{name}_bytes"] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            record[f"{name}_shape"] = list(tensor.shape)
            record[f"{name}_dtype"] = str(tensor.dtype).removeprefix("torch.")
        records.append(record)
    pq.write_table(pa.Table.from_pylist(records), path, **options)
    return path


def run(target_class, rows, directory, *, texts=None, as_=None, normalize=None, **options):
    """An export as the command runs it."""
    model, notices = choose_model(rows.source, target_class.models, as_, normalize)
    target = target_class(rows.source, model, texts, **options)
    return export(rows, target, Path(directory), notices)


def files_in(directory):
    """Paths of all files but the export's own state."""
    root = Path(directory)
    return sorted(
        name
        for path in root.rglob("*")
        if path.is_file() and not (name := path.relative_to(root).as_posix()).startswith("_lathe_export")
    )


def with_source(rows, **changes):
    """The same rows of another source."""
    return MemoryRows(replace(rows.source, **changes), rows.rows)
