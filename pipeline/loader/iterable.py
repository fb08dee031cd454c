"""A loader as a `torch.utils.data.IterableDataset` of whole batches, with its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, get_worker_info

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.loader.batch import Batch
    from pipeline.loader.loader import LatentLoader


class LatentIterable(IterableDataset["Batch"]):
    """Batches of a loader. Stateful: `StatefulDataLoader` saves and restores its step."""

    def __init__(self, loader: LatentLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the loader's step on.

        Raises:
            ConfigError: in a worker process; the loader reads in threads of its own.
        """
        if get_worker_info() is not None:
            raise ConfigError(
                "num_workers: expected 0, the loader reads ahead in threads; worker processes would each read everything"
            )
        return iter(self._loader)

    def __len__(self) -> int:
        """Steps in all. Raises TypeError without end."""
        return len(self._loader)

    def __bool__(self) -> bool:
        """True, also without end: Python would ask for the length."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """State of the loader."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError for a state of another order."""
        self._loader.load_state_dict(state)
