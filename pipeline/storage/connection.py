"""Client and excuses: how boto3 is set up, and what its errors mean in the house.

Enters: the storage section; exceptions of botocore. Leaves: one shared client per process; `pipeline.errors` that say
retry, missing, or what a person must fix. Credentials stay in boto3's own chain and appear in no message.
"""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import botocore.exceptions as refusals
from botocore.config import Config
from urllib3.exceptions import HTTPError as StreamError

from pipeline.errors import AccessError, LatheError, NotFound, SourceChanged, StorageUnavailable

if TYPE_CHECKING:
    from pipeline.config import StorageConfig

POOL_CONNECTIONS = 32  # streams of two shards, eight threads each, and uploads beside them
QUICK_S = 4.0  # a preflight's patience per try
# What can go wrong while a body is received, after the request itself succeeded.
BROKEN_BODY = (refusals.HTTPClientError, refusals.IncompleteReadError, StreamError, OSError)
CLIENT_FAILURES = (refusals.BotoCoreError, StreamError)
BUSY_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"}
DENIED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthorizationHeaderMalformed"}


class Connection:
    """A client, and whether its server ever answered: before, a refused connection is a wrong address, after, an outage."""

    def __init__(self, config: StorageConfig, *, quick: bool) -> None:
        self.answered = False
        settings: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": 2 if quick else config.max_attempts},
            "connect_timeout": min(QUICK_S, config.connect_timeout_s) if quick else config.connect_timeout_s,
            "read_timeout": min(QUICK_S, config.read_timeout_s) if quick else config.read_timeout_s,
            "max_pool_connections": POOL_CONNECTIONS,
        }
        # The endpoint may come from the job, AWS_ENDPOINT_URL or a profile: boto3 knows, so it is asked.
        session = boto3.session.Session()
        self.client = session.client("s3", endpoint_url=config.endpoint_url, config=Config(**settings))
        if not re.search(r"\.amazonaws\.com(\.cn)?$", urlsplit(self.client.meta.endpoint_url).hostname or ""):
            settings["s3"] = {"addressing_style": "path"}
            settings["request_checksum_calculation"] = settings["response_checksum_validation"] = "when_required"
            self.client = session.client("s3", endpoint_url=config.endpoint_url, config=Config(**settings))

    @property
    def host(self) -> str:
        """Host and port of the endpoint; a URL may hold a password, this does not."""
        return urlsplit(self.client.meta.endpoint_url).netloc.rpartition("@")[2]


_connections: dict[tuple[Any, ...], Connection] = {}
_connecting = threading.Lock()


def connect(config: StorageConfig, *, quick: bool = False) -> Connection:
    """One client per process and configuration: clients are safe to share among threads, not to fork or pickle."""
    key = (
        os.getpid(),
        quick,
        config.endpoint_url,
        config.max_attempts,
        config.connect_timeout_s,
        config.read_timeout_s,
    )
    with _connecting:
        if key not in _connections:
            _connections[key] = Connection(config, quick=quick)
        return _connections[key]


def http_status(error: BaseException) -> int:
    """HTTP status of a ClientError, else 0."""
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def changed(where: str, detail: str) -> SourceChanged:
    """The object under `where` is not the one that was listed."""
    return SourceChanged(
        f"{where} was replaced while it was read: {detail}; run the build again to take the new one", uri=where
    )


def explain_answer(error: Any, where: str, bucket: str) -> LatheError:
    """The server said no. Only its code and status are repeated, never its text, which may quote a key id."""
    status, code = http_status(error), str(error.response.get("Error", {}).get("Code", "unknown"))
    said = f"{where}: the store answered {code} ({status})"
    if code in {"NoSuchBucket", "InvalidBucketName"}:
        return AccessError(
            f"bucket {bucket!r} does not exist ({code}); check its name, the endpoint and the region", uri=where
        )
    if status == 404:
        return NotFound(f"{where} does not exist", uri=where)
    if status == 412:
        return changed(where, "its ETag is no longer the one listed")
    if code in {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"} or status in {
        408,
        409,
        429,
    }:
        return StorageUnavailable(said, uri=where)
    if status >= 500 and status != 501:
        return StorageUnavailable(said, uri=where)
    if status in {401, 403} or code in {
        "ExpiredToken",
        "InvalidToken",
        "TokenRefreshRequired",
        "AuthorizationHeaderMalformed",
    }:
        return AccessError(
            f"{said}: bucket {bucket!r} refuses these credentials; check the access key, its rights to list, get and "
            "put, and the clock",
            uri=where,
        )
    return AccessError(f"{said}; check the endpoint, the region and what the store supports", uri=where)


def explain_setup(error: Exception, where: str) -> AccessError:
    """No client could be made: an endpoint that is no URL, a profile that is not there."""
    return AccessError(
        f"no S3 client for {where}: {unsecret(error)}; check endpoint_url and the AWS profile", uri=where
    )


def explain_failure(error: Exception, where: str, connection: Connection) -> LatheError:
    """No answer came."""
    if isinstance(error, (refusals.NoCredentialsError, refusals.PartialCredentialsError)):
        return AccessError(
            f"no credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the "
            "machine a role",
            uri=where,
        )
    if isinstance(error, (refusals.ParamValidationError, refusals.InvalidEndpointConfigurationError)):
        return AccessError(f"{where}: not a valid bucket or key: {unsecret(error)}", uri=where)
    unreached = isinstance(error, refusals.ConnectionError)  # refused, unresolvable, TLS, connect timeout
    if unreached and not connection.answered:
        return AccessError(
            f"{connection.host} cannot be reached for {where} ({type(error).__name__}); check endpoint_url or "
            "AWS_ENDPOINT_URL, DNS and the network",
            uri=where,
        )
    if unreached or isinstance(error, (refusals.HTTPClientError, refusals.IncompleteReadError, StreamError)):
        return StorageUnavailable(f"{where}: {connection.host} did not answer ({type(error).__name__})", uri=where)
    if isinstance(error, (refusals.CredentialRetrievalError, refusals.MetadataRetrievalError)) and connection.answered:
        return StorageUnavailable(f"{where}: credentials could not be refreshed ({type(error).__name__})", uri=where)
    return AccessError(
        f"{where}: the S3 client gave up ({type(error).__name__}); check the AWS profile and credentials", uri=where
    )


def unsecret(error: Exception) -> str:
    """One line of a client error without the user part of any URL in it."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))[:200]
