"""Errors for a denied object, bucket or credential, and for an expired token."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.errors import AccessError, StorageUnavailable
from pipeline.storage import open_store
from pipeline.storage.connection import connect
from tests.faulty_proxy import Fault, FaultyProxy, always

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import S3Server

CREDENTIALS = "refuses these credentials"


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.address) as proxy:
        store = open_store(s3.root, s3.config())
        store.write("clips/a.tar", b"1")
        store.write("clips/b.tar", b"2")
        yield proxy


def config(proxy: FaultyProxy) -> StorageConfig:
    return StorageConfig(endpoint_url=proxy.endpoint, patience_s=0.5)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("InvalidObjectState", "archived .*restore it"),
        ("KMS.DisabledException", "KMS key"),
        ("AccessDenied", "may not read this object; check its ACL .*KMS"),
        ("", "may not read this object; check its ACL"),
    ],
)
def test_a_refused_object_is_named_with_its_likely_causes(
    s3: S3Server, proxy: FaultyProxy, code: str, said: str
) -> None:
    proxy.turn_on("refuse", keys=r"a\.tar", code=code)
    store = open_store(s3.root, config(proxy))
    info = open_store(s3.root, s3.config()).stat("clips/a.tar")

    def stream() -> bytes:
        with store.open_stream("clips/a.tar", size=info.size, etag=info.etag) as stream:
            return stream.read()

    # stat sends a HEAD, whose answer has no body: the reason is asked for by a GET.
    for act in (lambda: store.read("clips/a.tar"), lambda: store.stat("clips/a.tar"), stream):
        with pytest.raises(AccessError, match=f"clips/a.tar.*403.*{said}") as caught:
            act()
        assert CREDENTIALS not in str(caught.value)
        assert "\n" not in str(caught.value)
    assert store.read("clips/b.tar") == b"2", "another object of the bucket can be read"


@pytest.mark.s3
def test_kms_in_the_servers_text_is_a_hint_and_is_not_repeated(s3: S3Server, proxy: FaultyProxy) -> None:
    text = b"<Error><Code>AccessDenied</Code><Message>no kms:Decrypt for arn:aws:iam::12:user/AKIA</Message></Error>"
    proxy.rule = always(Fault("status", code=403, body=text))
    with pytest.raises(AccessError, match="KMS key") as caught:
        open_store(s3.root, config(proxy)).read("clips/a.tar")
    assert "AKIA" not in str(caught.value)


@pytest.mark.s3
@pytest.mark.parametrize(
    "code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "InvalidToken"]
)
def test_refused_credentials_are_not_blamed_on_the_object(s3: S3Server, proxy: FaultyProxy, code: str) -> None:
    proxy.turn_on("refuse", code=code)
    store = open_store(s3.root, config(proxy))
    for act in (lambda: store.read("clips/a.tar"), lambda: store.stat("clips/a.tar"), lambda: store.write("x", b"")):
        with pytest.raises(AccessError, match=f"{code}.*{s3.bucket}.*{CREDENTIALS}"):
            act()


@pytest.mark.s3
def test_a_refused_listing_is_about_the_bucket_and_a_refused_put_about_its_right(
    s3: S3Server, proxy: FaultyProxy
) -> None:
    proxy.turn_on("refuse")
    store = open_store(s3.root, config(proxy))
    for ask in (lambda: list(store.list()), store.preflight, store.probe):
        with pytest.raises(AccessError, match=CREDENTIALS):
            ask()
    with pytest.raises(AccessError, match="may not do PutObject in bucket"):
        store.write("x", b"")
    with pytest.raises(AccessError, match="may not do DeleteObject in bucket"):
        store.delete("x")


@pytest.mark.s3
def test_an_expired_token_of_the_environment_is_for_a_person_to_renew(
    s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.turn_on("refuse", status=400, code="ExpiredToken")
    with pytest.raises(AccessError, match="AWS_SESSION_TOKEN"):
        open_store(s3.root, config(proxy)).read("clips/a.tar")
    assert proxy.hits["refuse"] == 1, "the same token is not tried again"


@pytest.mark.s3
def test_an_expired_token_of_a_profile_is_temporary(
    s3: S3Server, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "credentials"
    text = f"[default]\naws_access_key_id = {{}}\naws_secret_access_key = {s3.secret_key}\n"
    profile.write_text(text.format("expired"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = open_store(s3.root, config(proxy))
    with proxy.fault("refuse", code="ExpiredToken"):
        for _ in range(2):
            with pytest.raises(StorageUnavailable, match="expired; renew it"):
                store.read("clips/a.tar")
    profile.write_text(text.format(s3.access_key))  # as another program does every hour
    assert connect(config(proxy)).client  # a new client
    assert store.read("clips/a.tar") == b"1"


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Permissions do not stop root, and the suite may run as root.
    real = builtins.open

    def refuse(path: object, *rest: object, **options: object) -> object:
        if str(path).endswith("a.mp4"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(builtins, "open", refuse)
    store = open_store(str(tmp_path), StorageConfig())
    store.write("a.mp4", b"1")
    store.write("b.mp4", b"2")
    info = store.stat("a.mp4")
    for act in (lambda: store.read("a.mp4"), lambda: store.open_stream("a.mp4", size=info.size, etag=info.etag)):
        with pytest.raises(AccessError, match=r"a\.mp4 cannot be read: Permission denied; check the permissions"):
            act()
    assert store.read("b.mp4") == b"2"
