"""Reading latents from an S3 server of this machine, by Lathe's loader and by the others: part of `loader`.

The server is Swift with its S3 interface, at a loopback address. It shares the cores with the loaders and limits all of them: plain ranged
reads by as many threads as Lathe's loader has show what it gives to one request for each latent. Litdata, streaming and webdataset get
whole files instead, which are fewer requests. One epoch each, without one before it: litdata and streaming keep what they have read on
the local disk, and begin with nothing there.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.loader import Size

BUCKET = "bench"
THREADS = 8
ENDPOINT = "AWS_ENDPOINT_URL"


def environment(endpoint: str, access_key: str, secret_key: str) -> dict[str, str]:
    """Variables by which every client finds the server: boto3 and litdata, streaming, and the clients that get it below."""
    return {
        ENDPOINT: endpoint,
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def lance_options() -> dict[str, str]:
    """`storage_options` of Lance and LanceDB."""
    return {
        "endpoint": os.environ[ENDPOINT],
        "allow_http": "true",
        "region": os.environ["AWS_DEFAULT_REGION"],
        "access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
        "secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        "virtual_hosted_style_request": "false",
    }


def arrow_file(uri: str) -> Any:
    """An object as a file of pyarrow."""
    from pyarrow.fs import S3FileSystem

    scheme, _, host = os.environ[ENDPOINT].partition("://")
    return S3FileSystem(endpoint_override=host, scheme=scheme).open_input_file(uri.removeprefix("s3://"))


def signed_urls(uri: str, suffix: str) -> list[str]:
    """URLs of the objects below a URI, for clients that speak HTTP only."""
    import boto3

    client = boto3.client("s3")
    return [
        client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key}, ExpiresIn=24 * 3600)
        for key in keys(client, uri)
        if key.endswith(suffix)
    ]


def keys(client: Any, uri: str) -> list[str]:
    """Keys of all objects below a URI."""
    prefix = uri.removeprefix(f"s3://{BUCKET}/").rstrip("/") + "/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", ())]


def upload(folder: str, uri: str) -> None:
    """Copies a folder to the server, unless something lies there."""
    import boto3

    client = boto3.client("s3")
    if keys(client, uri):
        return
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    for path in Path(folder).rglob("*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


def measure_ours(uri: str, batch: int) -> dict[str, Any]:
    """Rates of the loader and of plain ranged reads of the same latents by as many threads, and peak memory of the loader."""
    from benchmarks.loader import peak_mb
    from benchmarks.loader_rates import OurReads
    from pipeline.config import StorageConfig

    loader = OurReads(uri, batch, cold=True, storage=StorageConfig(endpoint_url=os.environ[ENDPOINT]), threads=THREADS)
    ours, memory, dataset = loader.rate(0), peak_mb(), loader.dataset
    loader.close()
    items = [
        (dataset.files.value("key", number), index.offset(row), index.length(row))
        for number in range(len(dataset.files))
        for index in [dataset.indexes.get(number)]
        for row in range(len(index))
    ]
    random.Random(0).shuffle(items)
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(lambda item: len(dataset.store.read_range(*item)), items))
    return {"ours": [ours], "raw": [total / (time.perf_counter() - began)], "rss_mb": memory}


def compare_s3(sizes: list[Size], folder: Path, python: Path, rounds: int) -> None:
    """Sizes in turn: prints a row for each loader, and ratios. Medians of rounds in which all take their turn."""
    import boto3

    from benchmarks.loader import place_of, write_both
    from tests.swift_server import SwiftServer

    (folder / "swift").mkdir()
    swift = SwiftServer(folder / "swift")
    os.environ |= environment(swift.endpoint, swift.access_key, swift.secret_key)
    try:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        for size in sizes:
            write_both(size, folder)
            compare_size(size, place_of(size, folder), python, rounds)
    finally:
        swift.stop()


def compare_size(size: Size, place: Path, python: Path, rounds: int) -> None:
    """One size. Each number of workers has a process of its own: clients that run threads do not survive a fork."""
    from benchmarks.loader import in_child, peer_rate, report
    from benchmarks.loader_peers import PEERS, WORKERS

    remote = f"s3://{BUCKET}/{place.name}"
    upload(str(place / "parquet"), f"{remote}/parquet")
    ours: list[dict[str, Any]] = []
    peers: dict[str, list[dict[str, Any]]] = {name: [] for name in PEERS}
    for _ in range(rounds):
        ours.append(in_child("loader_s3.measure_ours", f"{remote}/parquet", size.batch))
        for name, found in peers.items():
            if found and not found[0]["rate"]:
                continue
            tried = [
                peer_rate(python, name, place, size, 0, ["--remote", remote, "--workers", str(workers)])
                for workers in ([found[0]["workers"]] if found else WORKERS)
            ]
            found.append(max(tried, key=lambda one: one["rate"]))
    report(size, "S3", ours, peers, plain="plain ranged reads")
