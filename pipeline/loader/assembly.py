"""Parts of a loader put together: datasets that fit each other, and for each of them what turns rows into batches."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError
from pipeline.format.stored import FIRST_FRAME, I2V_COND, LATENT, LOGVAR
from pipeline.loader.cache import TensorCache
from pipeline.loader.captions import CaptionRule
from pipeline.loader.crops import Window, check_crop, cropped
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.decoding import decoder_of
from pipeline.loader.maker import BatchMaker, padding_of, patch_of
from pipeline.loader.memory import BatchMemory
from pipeline.loader.order import DatasetRows
from pipeline.loader.reading import TASK_BYTES, BatchReader
from pipeline.loader.slots import SlotFinder
from pipeline.loader.values import Values, check_dtype, check_values, device_of
from pipeline.loader.variants import check_variants, with_variants
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pipeline.loader.crops import Crop
    from pipeline.loader.read_ahead import ReadAhead
    from pipeline.loader.rules import BatchRule
    from pipeline.loader.sidecars import SidecarJoin
    from pipeline.loader.stats import LoaderStats


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments of `LatentLoader` that concern reading and values."""

    rule: BatchRule
    seed: int
    normalize: Literal["none", "model"]
    posterior: Literal["mean", "sample"]
    device: str | torch.device
    dtype: torch.dtype | None
    crop: Crop | None
    variants: str
    captions: tuple[str, ...]
    caption_dropout: float
    verify: str
    on_damage: str
    cache: TensorCache | None


def listed(datasets: Any) -> list[LatentDataset]:
    """The datasets that a loader was given, one or several. Raises ConfigError for anything else."""
    found = list(datasets) if isinstance(datasets, list | tuple) else [datasets]
    for one in found:
        if not isinstance(one, LatentDataset):
            raise ConfigError(
                f"datasets: expected a LatentDataset or a list of them, LatentDataset.open(…), got {one!r}"
            )
    return found


def check_datasets(datasets: Sequence[LatentDataset], allowed: Sequence[str]) -> None:
    """Raises ConfigError unless there is a dataset, all have one spec, and one fingerprint or only those that are allowed."""
    if not datasets:
        raise ConfigError("datasets: expected at least one")
    first = datasets[0]
    for other in datasets[1:]:
        if other.spec != first.spec:
            names = [
                f"{name} {one!r} and {two!r}"
                for name in (item.name for item in fields(first.spec) if item.compare)
                if (one := getattr(first.spec, name)) != (two := getattr(other.spec, name))
            ]
            raise ConfigError(
                f"datasets: {first.store.root} and {other.store.root} differ in {', '.join(names)}; latents of one run must mean the same"
            )
    prints = sorted({dataset.spec.fingerprint for dataset in datasets})
    odd = [name for name in prints if not any(name.startswith(one) for one in allowed)]
    if len(prints) > 1 and odd:
        raise ConfigError(
            f"datasets: their fingerprints differ ({', '.join(name[:8] for name in prints)}): the latents were not made in the same way "
            f"(`lathe inspect` says how). If that is meant, name them: allow_fingerprints={[name[:8] for name in prints]}"
        )


def assemble(
    datasets: Sequence[LatentDataset],
    options: Options,
    ahead: ReadAhead,
    stats: LoaderStats,
    joins: Sequence[SidecarJoin] = (),
    *,
    free_blocks: int,
) -> tuple[list[BatchMaker], list[DatasetRows]]:
    """A maker and the rows of the order for each dataset. `joins`: of sidecar sets, one a dataset, or none.

    Raises:
        ConfigError: an option that does not fit a dataset.
    """
    for name, value, known in (
        ("verify", options.verify, ("auto", "always", "never")),
        ("on_damage", options.on_damage, ("stop", "replace")),
    ):
        if value not in known:
            raise ConfigError(f"{name}: expected {' or '.join(known)}, got {value!r}")
    if options.verify == "never" and options.on_damage == "replace":
        raise ConfigError(
            "on_damage: replace finds damage by hashes, so verify cannot be never; expected auto or always"
        )
    device = device_of(options.device)
    check_dtype(options.dtype)
    if not isinstance(options.cache, TensorCache | None):
        raise ConfigError(f'cache: expected TensorCache(folder, "200GB"), got {options.cache!r}')
    pool = ahead.reads
    captions = CaptionRule(options.captions, options.caption_dropout)
    memory = BatchMemory(pinned=device.type == "cuda", free_blocks=free_blocks)
    makers, rows = [], []
    for number, dataset in enumerate(datasets):
        check_values(options.normalize, options.posterior, dataset.spec, dataset.store.root)
        check_crop(options.crop, dataset.spec)
        if I2V_COND in dataset.others and isinstance(options.crop, Window):
            raise ConfigError(
                "crop: i2v_cond begins with the first frame of the clip, a Window does not; use Prefix(T)"
            )
        names = dataset.spec.variants
        variants = check_variants(options.variants, names, dataset.store.root)
        buckets = with_variants(cropped(dataset.places, options.crop, dataset.spec), variants, names, dataset.files)
        remote = is_remote(dataset.store.root)
        finder = SlotFinder(dataset, buckets, options.seed, pool)
        reader = BatchReader(
            dataset.fetcher,
            finder,
            memory,
            pool,
            stats,
            **_tensors(dataset, options),
            stored=dataset.spec.dtype,
            decoder=decoder_of(dataset.spec),
            verify=_verified(options, remote=remote),
            replace=options.on_damage == "replace",
            cache=options.cache,
            together=0 if remote else TASK_BYTES,
            stopped=ahead.stopped,
        )
        values = Values(dataset.spec, options.normalize, options.posterior, options.dtype, device)
        extra: dict[str, Any] = {"patch": patch_of(options.rule), "pad_multiple": padding_of(options.rule)}
        if joins:
            extra |= {"join": joins[number], "verify_join": _verified(options, remote=remote)[0]}
        makers.append(
            BatchMaker(
                dataset,
                buckets,
                finder,
                reader,
                values,
                captions,
                pool,
                stats,
                seed=options.seed,
                crop=options.crop,
                **extra,
            )
        )
        rows.append(DatasetRows(dataset.identity, {name: bucket.rows() for name, bucket in buckets.items()}))
    return makers, rows


def _tensors(dataset: LatentDataset, options: Options) -> dict[str, tuple[int, ...]]:
    """What a `BatchReader` reads of each row: mean, log-variance for samples, then `dataset.others`."""
    stored = dataset.spec.stored
    names = (LATENT, *((LOGVAR,) if options.posterior == "sample" else ()), *dataset.others)
    images = (stored.index(FIRST_FRAME),) if FIRST_FRAME in dataset.others else ()
    return {"tensors": tuple(map(stored.index, names)), "images": images}


def _verified(options: Options, *, remote: bool) -> tuple[bool, bool]:
    """Whether to check what comes from the store and what comes from the cache. BLAKE2b reads 1 GB/s a core: free beside a network.

    Cached copies are not flushed to the disk: after a power cut one may have its size and hold zeros.
    """
    if options.verify == "auto":
        return remote or options.cache is not None or options.on_damage == "replace", True
    return options.verify == "always", options.verify == "always"
