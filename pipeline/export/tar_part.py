"""Tar file of a part: members of a sample adjacent, times and owners 0, so that equal rows give equal bytes."""

from __future__ import annotations

import io
import tarfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor


@contextmanager
def tar_file(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Opens a tar; gives a function that adds a member by name and content."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, data: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        yield add


def saved(tensor: Tensor) -> bytes:
    """What `torch.save` writes of a tensor that has its memory for itself."""
    return serialized(tensor.clone())


def serialized(value: object) -> bytes:
    """What `torch.save` writes. Not into a file: where the disk is full it raises a RuntimeError without a word of that."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()
