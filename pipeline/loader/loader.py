"""`LatentLoader`: batches of latents for one rank, in an order that is the same for any number of ranks."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ConfigError, StorageUnavailable
from pipeline.loader.assembly import Options, assemble, check_datasets
from pipeline.loader.dataset import LatentDataset
from pipeline.loader.order import Order
from pipeline.loader.rules import PerBucket, parse_rule
from pipeline.loader.state import described_rule, described_weights, make_state, step_of
from pipeline.loader.stats import LoaderStats

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    import torch

    from pipeline.loader.batch import Batch
    from pipeline.loader.cache import TensorCache
    from pipeline.loader.crops import Crop
    from pipeline.loader.iterable import LatentIterable
    from pipeline.loader.mixture import Weights
    from pipeline.loader.order import GlobalBatch
    from pipeline.loader.rules import BatchRule

TAKEDOWNS_EVERY_S = 300.0


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
        weights: Sequence[float] | Sequence[Weights] | Mapping[int, Sequence[float]] | None = None,
        image_ratio: float | None = None,
        crop: Crop | None = None,
        dtype: torch.dtype | None = None,
        captions: Sequence[str] = ("caption",),
        caption_dropout: float = 0.0,
        verify: Literal["auto", "always", "never"] = "auto",
        on_damage: Literal["stop", "replace"] = "stop",
        allow_fingerprints: Sequence[str] = (),
        takedowns_every_s: float = TAKEDOWNS_EVERY_S,
    ) -> None:
        """Reads nothing but the small tables that the datasets hold.

        Args:
            datasets: one, or several to be mixed.
            batch: latents of a global batch, which all ranks share: a number, `{"17x256x256": 32, …}` with `(32, 0.5)` to use half of a
                bucket's rows in each epoch, `Tokens(budget)` or `Pack(seq_len)`.
            seed: of the order and of all draws.
            dp_rank: this data-parallel rank. Ranks that share a sample (sequence or tensor parallel) give the same.
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
            weights: fraction of steps of each dataset; `{0: (1, 1), 5000: (3, 1)}` changes them at a step. By default all have the same
                fraction of their rows read.
            image_ratio: fraction of steps that are images; by default images are shuffled among the rest.
            crop: `Prefix(T)`.
            dtype: of `Batch.latents`; by default as stored.
            captions: where they come from, `caption` and keys as `metadata.short`; one is drawn in each epoch.
            caption_dropout: fraction of rows with an empty caption.
            verify: hash of each tensor: `auto` checks what comes over a network, `always` everything.
            on_damage: a tensor that is not the one that was written ends the run, or is replaced and counted.
            allow_fingerprints: fingerprints that may be mixed though they differ; of the same spec all the same.
            takedowns_every_s: seconds between looks for new takedowns.

        Raises:
            ConfigError: options that do not fit each other or the datasets.
        """
        self._datasets = [datasets] if isinstance(datasets, LatentDataset) else list(datasets)
        if not 0 <= dp_rank < dp_world:
            raise ConfigError(f"dp_rank: expected 0 to {dp_world - 1} for dp_world {dp_world}, got {dp_rank}")
        if prefetch < 1 or threads < 1:
            raise ConfigError(f"prefetch, threads: expected at least 1, got {prefetch} and {threads}")
        check_datasets(self._datasets, allow_fingerprints)
        seed = int(seed)  # a number of numpy would be another key
        rule = parse_rule(batch)
        if isinstance(rule, PerBucket):
            rule = PerBucket({name.removeprefix("v"): share for name, share in rule.shares.items()})
        self._rank, self._world, self._prefetch = dp_rank, dp_world, prefetch
        self._stats = LoaderStats()
        options = Options(
            rule, seed, normalize, posterior, device, dtype, crop, tuple(captions), caption_dropout, verify, on_damage, cache
        )  # fmt: skip
        # Planning threads wait for reading threads, so they are not the same ones.
        self._reads = ThreadPoolExecutor(threads, thread_name_prefix="latents")
        self._plans = ThreadPoolExecutor(prefetch, thread_name_prefix="batches")
        self._makers, rows = assemble(self._datasets, options, self._reads, self._stats, free_blocks=2 * prefetch + 2)
        schedule = _schedule(weights, len(self._datasets))
        self._order = Order(
            rows, rule, seed=seed, shuffle=shuffle, epochs=epochs, drop_last=drop_last, weights=schedule,
            image_ratio=image_ratio,
        )  # fmt: skip
        self._order.check_world(dp_world)
        self._described = {
            "datasets": [one.identity for one in rows],
            "batch": described_rule(rule),
            "seed": seed,
            "shuffle": shuffle,
            "epochs": list(epochs) if isinstance(epochs, list | tuple) else epochs,
            "drop_last": drop_last,
            "image_ratio": image_ratio,
            "crop": repr(crop),
            "weights": None if schedule is None else described_weights(schedule),
        }
        self._order_lock = Lock()
        self._step = 0
        self._ahead: deque[tuple[int, Future[Batch | None]]] = deque()
        self._looked, self._look_every = time.monotonic(), takedowns_every_s

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the present step on. A new iteration goes on where the last one stopped."""
        while (batch := self._take()) is not None:
            yield batch

    def __len__(self) -> int:
        """Steps in all, also those that were given.

        Raises:
            TypeError: without end; give `epochs`.
        """
        if (total := self._order.total()) is None:
            raise TypeError("this loader has no end: epochs=None")
        return total

    @property
    def step(self) -> int:
        """The step that comes next."""
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on after the last batch that was given: a few numbers and names, JSON-ready."""
        return make_state(self._step, self._described)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, on any rank of any world size.

        Raises:
            ConfigError: the state is of another order (dataset, snapshot, filter, seed, rule, …); names the difference.
        """
        self.seek(step_of(state, self._described))

    def seek(self, step: int) -> None:
        """Makes `step` the next one.

        Raises:
            ConfigError: negative.
        """
        if step < 0:
            raise ConfigError(f"seek: expected a step of at least 0, got {step}")
        self._step = step

    def skip(self, n: int) -> None:
        """Leaves out `n` steps."""
        self.seek(self._step + n)

    def peek(self, step: int) -> list[str]:
        """Ids of this rank's latents in a step; no tensor is read. Empty after the end."""
        found = self._planned(step)
        if found is None:
            return []
        slots = self._makers[found.dataset].slots(found.share(self._rank, self._world), found.epoch)
        return [slot.id for slot in slots]

    def stats(self) -> dict[str, Any]:
        """Counters since the loader was made, see `LoaderStats`; `retries` of local files."""
        return {**self._stats.to_dict(), "retries": sum(one.fetcher.retries for one in self._datasets)}

    def as_iterable_dataset(self) -> LatentIterable:
        """A `torch.utils.data.IterableDataset` of the batches, for `DataLoader(…, batch_size=None, num_workers=0)`, `StatefulDataLoader`
        and frameworks that want one.
        """
        from pipeline.loader.iterable import LatentIterable

        return LatentIterable(self)

    def close(self) -> None:
        """Ends the threads. The datasets stay open: other loaders may use them."""
        self._clear()
        self._plans.shutdown(cancel_futures=True)
        self._reads.shutdown(cancel_futures=True)

    def __enter__(self) -> LatentLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> Batch | None:
        if self._ahead and self._ahead[0][0] != self._step:
            self._clear()
        self._look_for_takedowns()
        following = self._ahead[-1][0] + 1 if self._ahead else self._step
        for step in range(following, self._step + self._prefetch):
            self._ahead.append((step, self._plans.submit(self._make, step)))
        began = time.perf_counter()
        step, future = self._ahead[0]
        try:
            batch = future.result()
        except BaseException:
            self._clear()  # the next iteration tries this step again
            raise
        self._ahead.popleft()
        self._stats.add(wait_s=time.perf_counter() - began, batches=int(batch is not None))
        if batch is None:
            self._clear()
            return None
        self._step = step + 1
        self._ahead.append((step + self._prefetch, self._plans.submit(self._make, step + self._prefetch)))
        for latent in batch.latents if isinstance(batch.latents, list) else [batch.latents]:
            if latent.is_cuda:  # its memory belongs to the stream of the copies
                import torch

                latent.record_stream(torch.cuda.current_stream(latent.device))
        return batch

    def _clear(self) -> None:
        while self._ahead:
            self._ahead.popleft()[1].cancel()

    def _planned(self, step: int) -> GlobalBatch | None:
        with self._order_lock:
            return self._order.batch(step)

    def _make(self, step: int) -> Batch | None:
        if (found := self._planned(step)) is None:
            return None
        share = found.share(self._rank, self._world)
        return self._makers[found.dataset].make(found, share)

    def _look_for_takedowns(self) -> None:
        if time.monotonic() - self._looked < self._look_every:
            return
        self._looked = time.monotonic()
        for dataset in self._datasets:
            try:
                if dataset.look_for_takedowns():
                    self._clear()  # what was read ahead may hold these rows
            except StorageUnavailable:  # the next look finds them; reads of latents say so if the store stays away
                continue


def _schedule(weights: Any, datasets: int) -> list[Weights] | None:
    """Weights with the steps from which they hold."""
    from pipeline.loader.mixture import Weights

    if weights is None:
        return None
    if hasattr(weights, "items"):
        return [Weights(int(step), tuple(map(float, values))) for step, values in weights.items()]
    items = list(weights)
    if items and all(isinstance(item, Weights) for item in items):
        return items
    return [Weights(0, tuple(map(float, items)))]
