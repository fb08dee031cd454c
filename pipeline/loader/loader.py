"""`LatentLoader`: batches of latents for one rank, in an order that is the same for any number of ranks."""

from __future__ import annotations

import copy
import os
import time
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError, LatheError
from pipeline.loader.arguments import integer, number, texts
from pipeline.loader.assembly import Options, assemble, check_datasets, listed
from pipeline.loader.captions import CaptionRule
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.mixture import parse_weights
from pipeline.loader.order import Order, epoch_limits
from pipeline.loader.ranks import check_same_order, order_digest
from pipeline.loader.read_ahead import ReadAhead
from pipeline.loader.rules import parse_rule
from pipeline.loader.sidecars import join_sidecars
from pipeline.loader.state import described_rule, described_weights, make_state, step_of
from pipeline.loader.stats import LoaderStats
from pipeline.loader.takedown_watch import TakedownWatch
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    import torch
    from torch.distributed import ProcessGroup

    from pipeline.loader.batch import Batch
    from pipeline.loader.cache import TensorCache
    from pipeline.loader.crops import Crop
    from pipeline.loader.iterable import LatentIterable
    from pipeline.loader.maker import Prepared
    from pipeline.loader.mixture import Weights
    from pipeline.loader.order import GlobalBatch
    from pipeline.loader.rules import BatchRule

TAKEDOWNS_EVERY_S = 300.0
PREPARED_AT_ONCE = 8  # steps


class LatentLoader:
    """Iterating gives `Batch`es from the present step on; `state_dict` is the state after the last batch that was given."""

    def __init__(
        self,
        datasets: LatentDataset | Sequence[LatentDataset],
        *,
        batch: int | Mapping[str, Any] | BatchRule,
        seed: int = 0,
        dp_rank: int = 0,
        dp_world: int = 1,
        shuffle: str = "window:64",
        epochs: int | Sequence[int | None] | None = None,
        normalize: Literal["none", "model"] = "none",
        posterior: Literal["mean", "sample"] = "mean",
        device: str | torch.device = "cpu",
        prefetch: int = 4,
        threads: int = 8,
        cache: TensorCache | None = None,
        drop_last: bool = True,
        small_buckets: Literal["error", "drop"] = "error",
        weights: Sequence[float] | Sequence[Weights] | Mapping[int, Sequence[float]] | None = None,
        image_ratio: float | None = None,
        crop: Crop | None = None,
        variants: str = "all",
        dtype: torch.dtype | None = None,
        captions: str | Sequence[str] = ("caption",),
        caption_dropout: float = 0.0,
        sidecars: str | Sequence[str] | Sequence[Sequence[str]] = (),
        missing_sidecars: Literal["error", "drop", "zero"] = "error",
        verify: Literal["auto", "always", "never"] = "auto",
        on_damage: Literal["stop", "replace"] = "stop",
        allow_fingerprints: str | Sequence[str] = (),
        takedowns_every_s: float = TAKEDOWNS_EVERY_S,
        peers: ProcessGroup | None = None,
    ) -> None:
        """Reads nothing but the small tables that the datasets hold.

        Args:
            datasets: one, or several to be mixed.
            batch: latents of a global batch, which all ranks share: a number, `{"17x256x256": 32, …}` with `(32, 0.5)` to use half of a
                bucket's rows in each epoch, `Tokens(budget)` or `Pack(seq_len)`.
            seed: of the order and of all draws.
            dp_rank: this data-parallel rank. Ranks that share a sample (sequence or tensor parallel) give the same, and `peers`.
            dp_world: number of data-parallel ranks. May be another one when a run resumes.
            shuffle: `window:N` (rows of N files at a time), `full` or `none`.
            epochs: of each dataset; None without end.
            normalize: `model` applies the constants of the network's authors, `none` gives stored values.
            posterior: `sample` draws from stored moments, by a draw of seed, epoch and row.
            device: of `Batch.latents`.
            prefetch: batches that are read ahead.
            threads: that read.
            cache: local copies of what was read from a store.
            drop_last: leave out the rest of a bucket that is too small for a batch; else it is filled up from the bucket's start.
            small_buckets: `drop` leaves out buckets that are too small for one batch, whose rows would never be read; `error` names them.
            weights: fraction of steps of each dataset; `{0: (1, 1), 5000: (3, 1)}` changes them at a step. By default all have the same
                fraction of their rows read.
            image_ratio: fraction of steps that are images; by default images are shuffled among the rest.
            crop: `Prefix(T)`.
            variants: `all`: each variant of a clip is a row. `draw`: each clip once in an epoch, a variant drawn anew each time. A name
                (`base`, `flip`, `crop1`, …): that variant alone.
            dtype: of `Batch.latents`, `Batch.i2v_cond` and `Batch.members`; by default as stored.
            captions: where they come from: `caption`, `captions` (all of a row), `captions.short` (by name), keys as `metadata.short`; one
                is drawn in each epoch.
            caption_dropout: fraction of rows with an empty caption.
            sidecars: sets of tensors to read with each row, `t5` (its newest version) or `t5@3`; a list of them for each dataset, whose
                versions differ.
            missing_sidecars: a row without tensors is an error now, is left out of the order, or gets zeros; both are counted in `stats`.
            verify: hash of each tensor: `auto` checks what comes over a network or from the cache, and all with `on_damage="replace"`;
                `always` checks everything, `never` nothing.
            on_damage: a tensor that is not the one that was written ends the run, or is replaced and counted.
            allow_fingerprints: fingerprints that may be mixed though they differ; of the same spec all the same.
            takedowns_every_s: seconds between looks for new takedowns, in the background.
            peers: group of `torch.distributed` of the ranks that have this `dp_rank`, if several share each sample. They apply new
                takedowns at the same step; without it each applies them when it sees them, and their samples differ.

        Raises:
            ConfigError: options that do not fit each other or the datasets.
            InputError: no such sidecar set; rows without tensors of it.
        """
        self._datasets = listed(datasets)
        check_datasets(self._datasets, texts("allow_fingerprints", allow_fingerprints))
        if peers is not None:
            if on_damage != "stop":
                raise ConfigError(
                    "on_damage: expected stop with peers: damage that one of them reads is not seen by the others"
                )
            # Copies, to which no other loader applies takedowns.
            self._datasets = [copy.copy(dataset) for dataset in self._datasets]
        self._world = integer("dp_world", dp_world, 1)
        self._rank = integer("dp_rank", dp_rank)
        if not 0 <= self._rank < self._world:
            raise ConfigError(f"dp_rank: expected 0 to {dp_world - 1} for dp_world {dp_world}, got {dp_rank}")
        prefetch, threads = integer("prefetch", prefetch, 1), integer("threads", threads, 1)
        seed, rule = integer("seed", seed), parse_rule(batch)
        limits, schedule = epoch_limits(epochs, len(self._datasets)), parse_weights(weights, len(self._datasets))
        image_ratio = None if image_ratio is None else number("image_ratio", image_ratio, 0.0, 1.0)
        options = Options(
            rule, seed, normalize, posterior, device, dtype, crop, variants, texts("captions", captions), caption_dropout, verify,
            on_damage, cache,
        )  # fmt: skip
        self._stats = LoaderStats()
        self._datasets, self._joins = join_sidecars(
            self._datasets, sidecars, missing_sidecars, CaptionRule(options.captions, caption_dropout), self._stats
        )  # fmt: skip
        # Batches of local files are read by the threads that make them: more of these than cores hold each other up.
        remote = any(is_remote(dataset.store.root) for dataset in self._datasets)
        self._ahead = ReadAhead(prefetch, threads, prefetch if remote else min(prefetch, os.cpu_count() or 1))
        self._makers, rows = assemble(
            self._datasets, options, self._ahead, self._stats, self._joins, free_blocks=2 * prefetch + 2
        )
        self._order = Order(
            rows, rule, seed=seed, shuffle=shuffle, epochs=limits, drop_last=bool(drop_last), small_buckets=small_buckets,
            weights=schedule, image_ratio=image_ratio,
        )  # fmt: skip
        self._order.check_world(self._world)
        self._described = {
            "datasets": [one.identity for one in rows],
            "batch": described_rule(rule),
            "seed": seed,
            "shuffle": shuffle,
            "epochs": limits if isinstance(epochs, list | tuple) else limits[0],
            "drop_last": bool(drop_last),
            "image_ratio": image_ratio,
            "crop": repr(crop),
            "variants": variants,
            "sidecars": [join.described for join in self._joins],
            "weights": None if schedule is None else described_weights(schedule),
        }
        self._order_lock = Lock()
        self._planned: dict[int, tuple[GlobalBatch | None, Prepared | None]] = {}
        self._step, self._ended = 0, False
        every_s = number("takedowns_every_s", takedowns_every_s)
        self._watch = TakedownWatch(self._datasets, self._ahead.reads, every_s, peers)

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present step on. A new iteration goes on where the last one stopped: it is not another epoch.

        Raises:
            ConfigError: all batches were given by an earlier iteration.
        """
        if self._ended:
            raise ConfigError(
                f"this loader has given all its {self._step} steps. Its epochs are one iteration: give epochs=N to read all N times, or "
                "epochs=None and a number of steps to the framework; seek(0) begins again, with the same batches"
            )
        while (batch := self._take()) is not None:
            yield batch
        self._ended = True

    def __len__(self) -> int:
        """Steps in all, also those that were given.

        Raises:
            TypeError: without end; give `epochs`.
        """
        with self._order_lock:  # threads that make batches ask the order at the same time
            total = self._order.total()
        if total is None:
            raise TypeError("this loader has no end: epochs=None of a dataset that keeps a weight")
        return total

    def __bool__(self) -> bool:
        """True, also without end: Python would ask for the length."""
        return True

    @property
    def step(self) -> int:
        """The step that comes next."""
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the last batch that was given: a few numbers and names, JSON-ready.
        The caller's own: `torch.distributed.checkpoint` fills it in place.
        """
        return make_state(self._step, copy.deepcopy(self._described))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, on any rank of any world size.

        Raises:
            ConfigError: the state is of another order (dataset, snapshot, filter, seed, rule, …); names the difference. Or this loader
                has fewer epochs, and ends before.
        """
        step = step_of(state, self._described, [one.store.root for one in self._datasets])
        epochs, ours = state["order"].get("epochs"), self._described["epochs"]
        if epochs != ours and step:
            with self._order_lock:
                if self._order.batch(step - 1) is None:
                    raise ConfigError(
                        f"state: {step} steps were given with epochs={epochs}, this loader has {self._order.total()} with epochs={ours}; "
                        "give more epochs"
                    )
        self.seek(step)

    def seek(self, step: int) -> None:
        """Makes `step` the next one.

        Raises:
            ConfigError: negative, or not a whole number.
        """
        self._step, self._ended = integer("seek: step", step, 0), False

    def skip(self, n: int) -> None:
        """Leaves out `n` steps."""
        self.seek(self._step + integer("skip", n))

    def peek(self, step: int) -> list[str]:
        """Ids of this rank's latents in a step; no tensor is read. Empty after the end."""
        self._ahead.check()
        found = self._prepared(integer("peek: step", step, 0))
        return [] if found is None else [slot.id for slot in found.slots]

    def stats(self) -> dict[str, Any]:
        """Counters since the loader was made, see `LoaderStats`; `retries` of local files since the datasets were opened."""
        return {**self._stats.to_dict(), "retries": sum(one.store.retried for one in self._datasets)}

    @property
    def order_digest(self) -> str:
        """Hash of everything that the order of batches depends on: ranks of a run must have the same."""
        return order_digest(self._described)

    def check_ranks(self, group: ProcessGroup | None = None) -> None:
        """Compares order and next step with the other ranks of `torch.distributed`, all of which must call it. Nothing without it.

        Raises:
            ConfigError: on all ranks, where one would read another order, such as that of another snapshot; names the difference.
        """
        check_same_order(self._described, self._step, self._world, group)

    def look_for_takedowns(self) -> None:
        """Looks for takedowns now rather than within `takedowns_every_s`; with `peers`, all of them must call it.

        Raises:
            OutputError: a record that cannot be read.
            StorageUnavailable: the store does not answer.
        """
        self._watch.look()

    def as_iterable_dataset(self) -> LatentIterable:
        """A `torch.utils.data.IterableDataset` of the batches, for `DataLoader(…, batch_size=None, num_workers=0)`, `StatefulDataLoader`
        and frameworks that want one.
        """
        from pipeline.loader.iterable import LatentIterable

        return LatentIterable(self)

    def close(self) -> None:
        """Ends the threads. The datasets stay open: other loaders may use them."""
        self._ahead.close()
        for join in self._joins:
            join.close()

    def __enter__(self) -> LatentLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a loader cannot be pickled, it has threads and open files; make one in each process, pass state_dict()"
        )

    def _take(self) -> Batch | None:
        self._ahead.check()  # before the watch, which uses its threads
        if self._watch.changed(self._step):
            self._ahead.clear()  # what was read ahead may hold these rows
        began = time.perf_counter()
        batch = self._ahead.take(self._step, self._make)
        self._stats.add(wait_s=time.perf_counter() - began, batches=int(batch is not None))
        if batch is None:
            return None
        self._step += 1
        for tensor in batch.device_tensors():
            if tensor.is_cuda:  # its memory belongs to the stream of the copies
                import torch

                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return batch

    def _make(self, step: int) -> Batch | None:
        found = self._prepared(step, PREPARED_AT_ONCE)
        return None if found is None else self._makers[found.batch.dataset].make(found)

    def _prepared(self, step: int, at_once: int = 1) -> Prepared | None:
        """This rank's share of a step, None after the end. With it those of the steps after it are prepared, `at_once` in all, and kept
        until another is needed. One alone is not: `peek` far ahead must not cost reading what it has prepared.
        """
        with self._order_lock:
            if step not in self._planned and at_once > 1:
                kept = {number: plan for number, plan in self._planned.items() if step - at_once < number < step}
                self._planned = kept | {number: self._plan(number) for number in range(step, step + at_once)}
            batch, prepared = self._planned[step] if step in self._planned else self._plan(step)
        if batch is None:
            return None
        maker = self._makers[batch.dataset]
        if prepared is None or not maker.is_current(prepared):
            prepared = maker.prepare(batch, batch.share(self._rank, self._world))
        return prepared

    def _plan(self, step: int) -> tuple[GlobalBatch | None, Prepared | None]:
        """The global batch of a step, and the share of it that this rank reads, if no index must be read for it.

        Several at once: each read of a batch puts what this needs out of the processor's cache, which costs five times as much.
        """
        batch = self._order.batch(step)
        if batch is None:
            return None, None
        try:
            share = batch.share(self._rank, self._world)
            return batch, self._makers[batch.dataset].prepare(batch, share, held=True)
        except LatheError:  # raised again when this step comes
            return batch, None
