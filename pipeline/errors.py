"""All errors of Lathe, in one tree by what to do about them: retry, reject the input, or stop.

```
LatheError                    message + where (uri, shard, key, stage)
├── TransientError            retry with back-off
│   ├── StorageUnavailable        throttled, connection lost, 5xx, a mount that fails
│   ├── WorkerLost                a decoder, encoder or loading process died or hung
│   ├── CheckpointDiffers         a worker's machine has other weights than the build was planned with
│   └── HandedBack                an attempt that was ended because its node goes away; it counts for nothing
├── BadDataError              reject this input, record the reason, go on       `reason` is a stable slug
│   ├── PolicyReject              not broken: the job's rules exclude it (too_short, too_small, no_video, …)
│   └── DamagedInput              broken, hostile or undecodable bytes
└── FatalError                stop the run and report the cause
    ├── UsageError                exit code 2: the command or configuration is wrong; nothing was started
    │   ├── ConfigError               a field of the job; the message names it
    │   ├── InputError                inputs that match nothing or cannot be read
    │   │   └── NotFound                  a single object that does not exist
    │   ├── OutputError               output not writable, or it holds another format version
    │   │   └── ViewNotWritten            a snapshot is published, but its Delta view was not written
    │   ├── CheckpointError           missing, unsafe, mismatched weights
    │   └── AccessError               credentials refused, bucket missing or unreachable
    ├── LeaseHeld                 exit code 5: another process does the same; nothing was started
    └── BuildError                exit code 1: the build started and failed
        ├── SourceChanged             an input was replaced while it was read
        ├── SourceRefused             one input object that the store refuses to read; costs its shard, not the build
        ├── NonFiniteLatent           a network returned NaN or infinity in an evaluation or preview; a build rejects the clip
        ├── RejectBudgetExceeded      too many damaged inputs
        ├── ShardsFailed              shards that could not be finished after all attempts
        ├── NothingEncoded            every input was rejected; there is no clip
        ├── PublishFailed             a check failed or another publisher was first; nothing was published
        ├── BudgetSpent               a limit of hours, shards or GPU hours was reached; exit code 3
        ├── GateFailed                a night encoded, and its snapshot failed a check; exit code 4
        ├── LeaseLost                 another process took the lease over; exit code 5
        ├── Interrupted               SIGINT, SIGTERM or SIGHUP: drained or stopped; exit code 130
        └── TrainingError             a training run started and failed; its last checkpoint is usable
```

Ray pickles errors, so their state is in plain attributes, from which `__reduce__` rebuilds them.
A message says what was found, what was expected and what to do. It never contains a credential.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


class LatheError(Exception):
    """Root of the tree. `str()` is one line: the message, then the place (stage, shard, key, uri)."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        uri: str | None = None,
        shard: str | None = None,
        key: str | None = None,
        stage: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.uri = uri
        self.shard = shard
        self.key = key
        self.stage = stage

    def __str__(self) -> str:
        where = [f"{name}={value}" for name in ("stage", "shard", "key", "uri") if (value := getattr(self, name))]
        return f"{self.message} [{', '.join(where)}]" if where else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[LatheError], args: tuple[Any, ...], state: dict[str, Any]) -> LatheError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class TransientError(LatheError):
    """Another try may succeed."""


class StorageUnavailable(TransientError):
    """The store throttled, dropped the connection or answered 5xx; a disk or mount failed in a way that may pass."""


class WorkerLost(TransientError):
    """A decoder, encoder or loading process died, hung past its limit or was preempted.

    `blame`: it ended through its own work (a crash, a limit, an exit with an error), so its input is suspect. False if the cause was
    outside: SIGKILL, SIGTERM, the kernel's or Ray's memory monitor, a node that was preempted or lost.
    """

    def __init__(self, message: str, *, blame: bool = False, **where: str | None) -> None:
        super().__init__(message, **where)
        self.blame = blame


class CheckpointDiffers(TransientError):
    """A worker loaded other weights than the build was planned with: the copy on its machine is damaged or of another version, or the
    checkpoint was replaced meanwhile.
    """


class HandedBack(TransientError):
    """A shard attempt was ended because its worker's node goes away. Another worker takes the shard; nothing is counted."""


class BadDataError(LatheError):
    """This input cannot be encoded. `reason` is a stable slug (`too_short`, `undecodable`, …) by which reports are grouped.

    `video`: its length and size as far as known, see `pipeline.records.video_counts`.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        frames_recovered: int = 0,
        video: dict[str, int] | None = None,
        **where: str | None,
    ) -> None:
        super().__init__(message, **where)
        self.reason = reason
        self.frames_recovered = frames_recovered
        self.video = video or {}


class PolicyReject(BadDataError):
    """The job's rules exclude the input; it is not broken. Does not count against the reject budget."""


class DamagedInput(BadDataError):
    """Broken, hostile or undecodable bytes. Counts against the reject budget."""


class FatalError(LatheError):
    """The run must stop."""


class UsageError(FatalError):
    """The command or configuration is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A field of the job has an invalid value; the message starts with the field's path."""


class InputError(UsageError):
    """The inputs match nothing or cannot be read."""


class NotFound(InputError):
    """A single object that does not exist. Callers for whom it is optional catch this error."""


class OutputError(UsageError):
    """The output cannot be written, or holds another format version."""


class ViewNotWritten(OutputError):
    """A snapshot is published, but its Delta view was not written. `published`: a `pipeline.operate.publish.Published`."""

    def __init__(self, message: str, *, published: Any = None, **where: str | None) -> None:
        super().__init__(message, **where)
        self.published = published


class CheckpointError(UsageError):
    """Weights that are missing, unsafe to load, or of another network."""


class AccessError(UsageError):
    """Credentials refused, bucket missing, endpoint unreachable."""


class LeaseHeld(FatalError):
    """Another process holds the lease; nothing was started. `record`: its `pipeline.ledger.lease.LeaseRecord` as a dict, if it was read."""

    exit_code = 5

    def __init__(self, message: str, *, record: dict[str, Any] | None = None, **where: str | None) -> None:
        super().__init__(message, **where)
        self.record = record


class BuildError(FatalError):
    """The build started and failed."""


class SourceChanged(BuildError):
    """An input was replaced while it was being read (its ETag or size changed)."""


class SourceRefused(BuildError):
    """One input object cannot be read, although others in its bucket or folder can: denied, archived, encrypted with another key."""


class NonFiniteLatent(BuildError):
    """A network returned NaN or infinity in an evaluation or preview. A build rejects the clip instead, as `non_finite_latent`."""


class RejectBudgetExceeded(BuildError):
    """More damaged inputs than the job allows."""


class ShardsFailed(BuildError):
    """Some shards could not be finished after all attempts; the others are committed, and the same command resumes."""


class NothingEncoded(BuildError):
    """Every shard has a receipt and none holds a clip."""


class PublishFailed(BuildError):
    """A snapshot was not made: a check failed, shards are open, or another publisher was first. The last snapshot stands.

    `checks`: those that were made, see `pipeline.ledger.snapshots.Check`.
    """

    def __init__(self, message: str, *, checks: Sequence[Any] = (), **where: str | None) -> None:
        super().__init__(message, **where)
        self.checks = tuple(checks)


class BudgetSpent(BuildError):
    """A limit of hours, shards or GPU hours was reached: running shards were finished, and the next run goes on with the rest."""

    exit_code = 3


class GateFailed(PublishFailed):
    """A night that encoded and whose data failed a check: its snapshot was not made, what it encoded stays."""

    exit_code = 4


class LeaseLost(BuildError):
    """Another process took the lease over, because this one could not renew it in time. What is committed stays."""

    exit_code = 5


class Interrupted(BuildError):
    """A signal ended the build; committed shards stay, and the same command resumes."""

    exit_code = 130


class TrainingError(BuildError):
    """A training run started and failed: the loss is not finite, memory of the device or the disk is full, or processes died too often."""
