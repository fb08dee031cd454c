"""Translation of failed S3 requests: answers and exceptions of botocore become errors of `pipeline.errors`.

Messages repeat codes and statuses of the server, never its text, which may quote a key id.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import botocore.exceptions as refusals
from urllib3.exceptions import HTTPError as StreamError

from pipeline.errors import AccessError, LatheError, NotFound, SourceChanged, StorageUnavailable

if TYPE_CHECKING:
    from pipeline.storage.connection import Connection
    from pipeline.storage.patience import OutOfPatience

# Failures while a body is received, after the request itself succeeded.
BROKEN_BODY = (refusals.HTTPClientError, refusals.IncompleteReadError, StreamError, OSError)
CLIENT_FAILURES = (refusals.BotoCoreError, StreamError)
BUSY_STATUSES = {408, 409, 429}
# Codes of temporary failures; some come with status 400 or 403.
BUSY_CODES = {
    "BandwidthLimitExceeded", "InternalError", "NoSuchUpload", "OperationAborted", "PriorRequestNotComplete",
    "RequestLimitExceeded", "RequestThrottled", "RequestThrottledException", "RequestTimeout", "RequestTimeoutException",
    "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequests",
    "TooManyRequestsException",
}  # fmt: skip
# Refusals of the access key or its signature: every request with it fails, for any object.
CREDENTIAL_CODES = {
    "AccountProblem", "AuthorizationHeaderMalformed", "InvalidAccessKeyId", "InvalidSecurity", "InvalidToken", "NotSignedUp",
    "RequestTimeTooSkewed", "SignatureDoesNotMatch",
}  # fmt: skip
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}


def http_status(error: BaseException | None) -> int:
    """HTTP status of a ClientError, else 0."""
    return _status(getattr(error, "response", None) or {})


def server_code(error: BaseException | None) -> str:
    """The server's error code of a ClientError, else an empty string."""
    return _code(getattr(error, "response", None) or {})


def _status(answer: dict[str, Any]) -> int:
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(answer: dict[str, Any]) -> str:
    return str(answer.get("Error", {}).get("Code", ""))


def is_busy(answer: dict[str, Any]) -> bool:
    """Whether a parsed answer is a temporary failure: the same request may succeed if sent again."""
    status = _status(answer)
    if _code(answer) in BUSY_CODES:
        return True
    return status in BUSY_STATUSES or (status >= 500 and status != 501)


def answer_text(answer: dict[str, Any]) -> str:
    """`answered SlowDown (503)`, or `answered 503` if the answer has no code of its own."""
    code, status = _code(answer), _status(answer)
    return f"answered {status}" if not code or code == str(status) else f"answered {code} ({status})"


def kind(error: BaseException) -> str:
    """Name of the innermost of wrapped errors: `ConnectionRefused`, `NameResolution`, `ReadTimeout`."""
    name = type(error).__name__
    seen: set[int] = set()
    below: BaseException | None = error
    while below is not None and id(below) not in seen:
        seen.add(id(below))
        if isinstance(below, OSError) and type(below) is not OSError:
            name = "NameResolution" if type(below).__name__ == "gaierror" else type(below).__name__
        given = getattr(below, "kwargs", {}).get("error")
        below = given if isinstance(given, BaseException) else below.__cause__ or below.__context__
    return name.removesuffix("Error")


def changed(where: str, detail: str) -> SourceChanged:
    """The object under `where` is not the one that was listed."""
    return SourceChanged(
        f"{where} was replaced while it was read: {detail}; run the build again to encode the new one", uri=where
    )


def explain_answer(error: Any, where: str, bucket: str, connection: Connection, *, key: str) -> LatheError:
    """The error for an answer of the server. `key` is empty if the request was about the bucket."""
    status, code = http_status(error), server_code(error) or "unknown"
    answered = f"{where}: the store answered {code} ({status})"
    if code in {"NoSuchBucket", "InvalidBucketName"}:
        return AccessError(
            f"bucket {bucket!r} does not exist ({code}); check its name, the endpoint and the region", uri=where
        )
    if is_busy(error.response):
        return StorageUnavailable(answered, uri=where)
    if status == 404:
        return NotFound(f"{where} does not exist", uri=where)
    if status == 412:
        return changed(where, "its ETag is no longer the one listed")
    if code in EXPIRED_CODES:
        return _expired(answered, where, connection)
    if status == 401 or code in CREDENTIAL_CODES or (status == 403 and not key):
        return AccessError(
            f"{answered}: bucket {bucket!r} refuses these credentials; check the access key, its rights to list, get and "
            "put, and the clock",
            uri=where,
        )
    if status == 403 or code == "InvalidObjectState" or code.startswith("KMS."):
        return AccessError(f"{answered}{_object_cause(error, code, bucket)}", uri=where)
    return AccessError(f"{answered}; check the endpoint, the region and what the store supports", uri=where)


def _expired(answered: str, where: str, connection: Connection) -> LatheError:
    """The error for an expired session token. The request is not repeated: a client signs every retry with the same token.

    botocore renews tokens before they expire. So a renewal outside of it failed or is late (a profile that another program renews, single
    sign-on, a wrong clock). The connection is dropped and the next one reads the credentials again, so the failure is temporary. Tokens
    from the environment cannot change in a running process: a person must set new ones.
    """
    if connection.renewable:
        return StorageUnavailable(
            f"{answered}: the session token has expired; renew it (profile, single sign-on or role), it is read again",
            uri=where,
        )
    return AccessError(
        f"{answered}: the session token in the environment has expired; set a new AWS_SESSION_TOKEN with its keys and run the "
        "same command again",
        uri=where,
    )


def _object_cause(error: Any, code: str, bucket: str) -> str:
    """What to do about one refused object. The server's text is searched for "kms", but not repeated."""
    if code == "InvalidObjectState":
        return ": this object is archived (Glacier or Deep Archive); restore it and run again"
    if "kms" in f"{code} {error.response.get('Error', {}).get('Message', '')}".lower():
        return (
            ": this object is encrypted with a KMS key; check that the key is enabled and these credentials may use it"
        )
    if error.operation_name in {"GetObject", "HeadObject"}:
        return (
            ": these credentials may not read this object; check its ACL and the bucket policy, whether it is encrypted with "
            "a KMS key or archived, and that it exists (without the right to list, a missing object is refused too)"
        )
    return f": these credentials may not do {error.operation_name} in bucket {bucket!r}; check their rights to put and delete"


def explain_setup(error: Exception, where: str) -> AccessError:
    """The error for a client that cannot be created: the endpoint is not a URL, or the profile does not exist."""
    return AccessError(
        f"no S3 client for {where}: {unsecret(error)}; check endpoint_url and the AWS profile", uri=where
    )


def explain_given_up(error: OutOfPatience, where: str, connection: Connection, *, outage: bool) -> LatheError:
    """The error if every try failed. Unless `outage`, an unreachable endpoint that never answered is a wrong address."""
    unreached = isinstance(error.__cause__, refusals.ConnectionError)  # refused, unresolvable, TLS, connect timeout
    if unreached and not (outage or connection.reached):
        return AccessError(
            f"{connection.host} cannot be reached for {where} ({error.tries} tries, {error.detail}); check endpoint_url or "
            "AWS_ENDPOINT_URL, DNS and the network",
            uri=where,
        )
    return StorageUnavailable(f"{where}: {connection.host} {error}", uri=where)


def explain_failure(error: Exception, where: str, connection: Connection) -> LatheError:
    """The error for a failure of the client before or after the request itself, which is not retried."""
    if isinstance(error, (refusals.NoCredentialsError, refusals.PartialCredentialsError)):
        return AccessError(
            f"no credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the "
            "machine a role",
            uri=where,
        )
    if isinstance(error, (refusals.ParamValidationError, refusals.InvalidEndpointConfigurationError)):
        return AccessError(f"{where}: not a valid bucket or key: {unsecret(error)}", uri=where)
    if isinstance(error, (refusals.HTTPClientError, refusals.IncompleteReadError, StreamError)):
        return StorageUnavailable(f"{where}: {connection.host} did not answer ({kind(error)})", uri=where)
    if isinstance(error, (refusals.CredentialRetrievalError, refusals.MetadataRetrievalError)) and connection.reached:
        return StorageUnavailable(f"{where}: credentials could not be refreshed ({type(error).__name__})", uri=where)
    return AccessError(
        f"{where}: the S3 client gave up ({type(error).__name__}); check the AWS profile and credentials", uri=where
    )


def unsecret(error: Exception) -> str:
    """One line of a client error without the user part of any URL in it."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))[:200]
