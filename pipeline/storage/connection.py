"""boto3 clients, one per process and configuration, with Lathe's own retries.

botocore's retry modes end after seconds and share a quota among all threads of a client: after about a hundred retries it retries nothing
until a request succeeds. Here botocore tries once, and a handler of its `needs-retry` event decides and waits. It handles every request of
the client, including those of paginators and of s3transfer's threads. Credentials come from boto3's own chain and appear in no message.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as refusals
from botocore.config import Config

from pipeline.process.fork_locks import fork_lock
from pipeline.storage.patience import Patience, is_reached, mark_reached
from pipeline.storage.refusals import answer_text, is_busy, kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import StorageConfig

POOL_CONNECTIONS = 32  # streams of two shards, eight threads each, and uploads beside them
QUICK_S = 4.0  # timeouts of a preflight or probe
FIRST_CONTACT_S = 10.0  # retries of an endpoint that never answered: a wrong address should be reported soon
CLEANUP_S = 10.0  # retries of removing the parts of a failed upload; its error waits for that
PATIENCE = "lathe-patience"  # key in botocore's request context


class Connection:
    """A client for one configuration. `quick`: timeouts of a few seconds."""

    def __init__(self, config: StorageConfig, *, quick: bool) -> None:
        self._config = config
        self._using = threading.local()
        settings: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": min(QUICK_S, config.connect_timeout_s) if quick else config.connect_timeout_s,
            "read_timeout": min(QUICK_S, config.read_timeout_s) if quick else config.read_timeout_s,
            "max_pool_connections": POOL_CONNECTIONS,
        }
        # The endpoint may be set by the job, AWS_ENDPOINT_URL or a profile; boto3 resolves it.
        self._session = boto3.session.Session()
        self.client = self._session.client("s3", endpoint_url=config.endpoint_url, config=Config(**settings))
        if not re.search(r"\.amazonaws\.com(\.cn)?$", urlsplit(self.client.meta.endpoint_url).hostname or ""):
            settings["s3"] = {"addressing_style": "path"}
            settings["request_checksum_calculation"] = settings["response_checksum_validation"] = "when_required"
            self.client = self._session.client("s3", endpoint_url=config.endpoint_url, config=Config(**settings))
        self.client.meta.events.register("before-call.s3", self._begin)
        # First, else botocore's own handler of the same event would decide.
        self.client.meta.events.register_first("needs-retry.s3", self._decide)

    @property
    def host(self) -> str:
        """Host and port of the endpoint, without the password that a URL may hold."""
        return urlsplit(self.client.meta.endpoint_url).netloc.rpartition("@")[2]

    @property
    def reached(self) -> bool:
        """Whether the endpoint has ever answered: a refused connection is a wrong address before, an outage after."""
        return is_reached(self._config)

    @property
    def renewable(self) -> bool:
        """Whether a new client may get other credentials than this one has."""
        credentials = self._session.get_credentials()
        return credentials is not None and credentials.method not in {"env", "explicit"}

    @contextmanager
    def using(self, patience: Patience) -> Iterator[Any]:
        """The client. Requests of this thread share `patience`; requests of other threads get their own."""
        self._using.patience = patience
        try:
            yield self.client
        finally:
            self._using.patience = None

    def _begin(self, context: dict[str, Any], **_: object) -> None:
        """Event `before-call`, once per request: the time for retries starts here."""
        context[PATIENCE] = getattr(self._using, "patience", None) or patience_of(self._config)

    def _decide(
        self,
        response: tuple[Any, dict[str, Any]] | None,
        operation: Any,
        caught_exception: Exception | None,
        request_dict: dict[str, Any],
        **_: object,
    ) -> int | None:
        """Event `needs-retry`, after every try: 0 sends the request again, None keeps the outcome."""
        patience: Patience = request_dict["context"][PATIENCE]
        cleanup = CLEANUP_S if operation.name == "AbortMultipartUpload" else None
        if response is not None:
            mark_reached(self._config)
            if _is_cut_off(response[0], operation):
                patience.again("broke the connection in an answer", within_s=cleanup)
                return 0
            # A lost upload must be started again, which the caller does.
            if not is_busy(response[1]) or response[1].get("Error", {}).get("Code") == "NoSuchUpload":
                return None
            patience.again(answer_text(response[1]), within_s=cleanup)
            return 0
        if not isinstance(caught_exception, (refusals.ConnectionError, refusals.HTTPClientError)):
            return None
        unreached = isinstance(caught_exception, refusals.ConnectionError) and not self.reached
        patience.again(
            "did not answer",
            kind(caught_exception),
            within_s=FIRST_CONTACT_S if unreached else cleanup,
            cause=caught_exception,
        )
        return 0


def _is_cut_off(answer: Any, operation: Any) -> bool:
    """Whether the body of an answer is shorter than announced. botocore does not look: a listing without its body is an empty one to it.

    Bodies of objects are streams, which have their own check; answers to HEAD announce a body that does not come.
    """
    if operation.has_streaming_output or operation.http["method"] == "HEAD":
        return False
    announced = answer.headers.get("Content-Length", "")
    return announced.isdigit() and len(answer.content) < int(announced)


_connections: dict[tuple[Any, ...], Connection] = {}
_connecting = fork_lock()


def patience_of(config: StorageConfig, cancelled: threading.Event | None = None) -> Patience:
    """Retries of one request or download."""
    return Patience(config.patience_s, config.max_attempts, cancelled)


def connect(config: StorageConfig, *, quick: bool = False) -> Connection:
    """The client of this process for a configuration. Clients may be shared among threads, but not forked or pickled."""
    key = (
        os.getpid(),
        quick,
        config.endpoint_url,
        config.max_attempts,
        config.patience_s,
        config.connect_timeout_s,
        config.read_timeout_s,
    )
    with _connecting:
        if key not in _connections:
            _connections[key] = Connection(config, quick=quick)
        return _connections[key]


def forget(connection: Connection) -> None:
    """Removes a shared client: the next `connect` creates another one, which reads the credentials again."""
    with _connecting:
        for key, known in list(_connections.items()):
            if known is connection:
                del _connections[key]
