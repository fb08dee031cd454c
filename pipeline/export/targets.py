"""All targets by name, and an export with the options of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.export.automodel import AutoModel
from pipeline.export.dataset import PublishedRows
from pipeline.export.fastvideo import FastVideo
from pipeline.export.ltx2 import Ltx2
from pipeline.export.megatron_bridge import MegatronBridge
from pipeline.export.models import CUSTOM, NORMALIZE, choose_model
from pipeline.export.musubi import Musubi
from pipeline.export.run import Report, export
from pipeline.export.sidecar_texts import SidecarTexts
from pipeline.export.texts import TextTable
from pipeline.export.wds import DEFAULT, Wds
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.config import StorageConfig
    from pipeline.export.rows import Source
    from pipeline.export.target import Target
    from pipeline.export.texts import Texts

TARGETS: dict[str, type[Target]] = {
    target.name: target for target in (FastVideo, Ltx2, Musubi, AutoModel, MegatronBridge, Wds)
}


@dataclass(frozen=True, slots=True)
class Request:
    """Options of an export. `as_model`: a model of the trainer. `normalize`: for `wds` and `custom`; `members`, `dtype`: for `wds`."""

    target: str
    as_model: str | None = None
    normalize: str | None = None
    members: tuple[str, ...] = ()
    dtype: str | None = None
    text_embeddings: str | None = None
    sidecars: tuple[str, ...] = ()
    where: str | None = None
    fingerprint: str | None = None


def export_output(
    output: str,
    directory: str,
    request: Request,
    storage: StorageConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Exports a snapshot of `output` into the local folder `directory`.

    Raises:
        ConfigError: options that do not fit each other or the network.
        InputError: nothing published, rows that the trainer could not read, missing embeddings or constants.
        OutputError: the folder holds something else, or cannot be written.
    """
    check_request(request, directory)
    texts: Texts | None = None if request.text_embeddings is None else TextTable(request.text_embeddings)
    rows = PublishedRows(output, request.where, fingerprint=request.fingerprint, storage=storage)
    try:
        if request.sidecars:
            texts = SidecarTexts(rows.store, request.sidecars)
        target, notices = _make(request, rows.source, texts, moments=rows.moments)
        rows.carry(target.others)
        return export(rows, target, Path(directory), notices, progress)
    finally:
        rows.close()


def check_request(request: Request, directory: str) -> None:
    """Raises ConfigError for options that can be judged without the output."""
    if request.target not in TARGETS:
        raise ConfigError(f"--to: expected one of {', '.join(TARGETS)}, got {request.target!r}")
    if is_remote(directory):
        raise ConfigError(f"{directory}: trainers read exports as files; give a local folder, and copy it if need be")
    if request.sidecars and request.text_embeddings is not None:
        raise ConfigError(
            "--sidecar: the embeddings are in the table of --text-embeddings or in sidecar sets, not both"
        )
    if request.normalize not in (None, *NORMALIZE):
        raise ConfigError(f"--normalize: expected {' or '.join(NORMALIZE)}, got {request.normalize!r}")
    if request.target == Wds.name:
        if request.as_model is not None:
            raise ConfigError("--as: wds is for no model in particular; use --normalize")
        return
    for name, value in (("--member", request.members), ("--dtype", request.dtype)):
        if value:
            raise ConfigError(f"{name}: {request.target} decides it; only wds takes this option")


def _make(request: Request, source: Source, texts: Texts | None, *, moments: bool) -> tuple[Target, list[str]]:
    kind = TARGETS[request.target]
    if kind is not Wds:
        model, notices = choose_model(source, kind.models, request.as_model, request.normalize)
        return kind(source, model, texts), notices
    if request.normalize is None:
        raise ConfigError(
            "--normalize: say whether latents are normalised, model (by the network's constants) or none (raw)"
        )
    model, notices = choose_model(source, {}, CUSTOM, request.normalize)
    options: dict[str, Any] = {"members": request.members or DEFAULT, "dtype": request.dtype, "moments": moments}
    return Wds(source, model, texts, **options), notices
