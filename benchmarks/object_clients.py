"""Compares object-storage clients: CPU seconds per GiB, and MiB per second, of puts and gets, for docs/design/009.

    python benchmarks/object_clients.py --endpoint http://127.0.0.1:9000 [--bucket bench] [--clients obstore,boto3]

It needs a running S3 server with an existing bucket, and credentials in the environment. Each client that can be imported puts and
gets the same objects of 16 MiB each with 4 threads. The clients alternate, and the medians of the rounds are reported. CPU seconds are
those of all threads of this process. The script does not use the package.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from statistics import median
from typing import NamedTuple
from urllib.parse import urlsplit

OBJECT_BYTES = 16 << 20
THREADS = 4
GIB = 1 << 30


class Client(NamedTuple):
    """The functions with which one library puts and gets an object by name."""

    put: Callable[[str, bytes], object]
    get: Callable[[str], object]


def obstore_of(endpoint: str, bucket: str, *, unsigned: bool = True) -> Client:
    """Returns the client of obstore. With `unsigned` it does not hash the payload for the signature."""
    import obstore
    import obstore.store

    options = {"allow_http": True, "timeout": timedelta(seconds=120)}
    store = obstore.store.S3Store(bucket, endpoint=endpoint, client_options=options, unsigned_payload=unsigned)
    return Client(
        lambda name, body: obstore.put(store, name, body, use_multipart=False),
        lambda name: memoryview(obstore.get(store, name).bytes()),
    )


def boto3_of(endpoint: str, bucket: str) -> Client:
    """Returns the plain client of boto3."""
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", endpoint_url=endpoint, config=Config(max_pool_connections=THREADS, s3={"addressing_style": "path"}))
    return Client(
        lambda name, body: client.put_object(Bucket=bucket, Key=name, Body=body),
        lambda name: client.get_object(Bucket=bucket, Key=name)["Body"].read(),
    )


def s3fs_of(endpoint: str, bucket: str) -> Client:
    """Returns the client of s3fs, without its cache of listings."""
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)
    return Client(lambda name, body: files.pipe_file(f"{bucket}/{name}", body), lambda name: files.cat_file(f"{bucket}/{name}"))


def pyarrow_of(endpoint: str, bucket: str) -> Client:
    """Returns the client of pyarrow's file system."""
    from pyarrow import fs

    files = fs.S3FileSystem(endpoint_override=urlsplit(endpoint).netloc, scheme=urlsplit(endpoint).scheme)

    def put(name: str, body: bytes) -> None:
        with files.open_output_stream(f"{bucket}/{name}") as stream:
            stream.write(body)

    def get(name: str) -> bytes:
        with files.open_input_file(f"{bucket}/{name}") as file:
            return file.read()

    return Client(put, get)


CLIENTS: dict[str, Callable[[str, str], Client]] = {
    "obstore": obstore_of,
    "obstore-signed": lambda endpoint, bucket: obstore_of(endpoint, bucket, unsigned=False),
    "boto3": boto3_of,
    "s3fs": s3fs_of,
    "pyarrow": pyarrow_of,
}


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Run `work`. Returns its wall seconds, and the CPU seconds of this process."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def round_of(client: Client, prefix: str, body: bytes, count: int) -> dict[str, tuple[float, float]]:
    """Put and get `count` objects.

    Returns the times of both. Raises ValueError if the content of an object has changed.
    """
    names = [f"{prefix}-{number}" for number in range(count)]
    with ThreadPoolExecutor(THREADS) as threads:
        times = {
            "put": measured(lambda: list(threads.map(lambda name: client.put(name, body), names))),
            "get": measured(lambda: list(threads.map(lambda name: len(memoryview(client.get(name))), names))),
        }
        if bytes(client.get(names[-1])) != body:
            raise ValueError(f"{names[-1]}: the content read differs from the content written")
    return times


def main() -> None:
    """Measure all clients. Prints one line for each, and all figures as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--bucket", default="bench")
    parser.add_argument("--clients", default=",".join(CLIENTS), help="clients to measure, separated by commas")
    parser.add_argument("--objects", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    clients: dict[str, Client] = {}
    for name in options.clients.split(","):
        try:
            clients[name] = CLIENTS[name](options.endpoint, options.bucket)
        except ImportError as error:
            print(f"{name}: left out, {error}")
    body = os.urandom(OBJECT_BYTES)
    times: dict[str, list[dict]] = {name: [] for name in clients}
    for turn in range(options.rounds + 1):  # the first round is not counted: it opens connections
        for number, (name, client) in enumerate(list(clients.items())):
            try:
                taken = round_of(client, str(number), body, options.objects)
            except Exception as error:  # noqa: BLE001 (every library has its own errors)
                print(f"{name}: left out, {type(error).__name__}: {error}")
                del clients[name]
                continue
            if turn:
                times[name].append(taken)
    nbytes = options.objects * OBJECT_BYTES
    report = {}
    for name in clients:
        figures: dict[str, float | str] = {"version": version(name.partition("-")[0])}
        for op in ("put", "get"):
            wall_s, cpu_s = (median(each[op][part] for each in times[name]) for part in (0, 1))
            figures |= {f"{op}_mib_per_s": round(nbytes / wall_s / (1 << 20)), f"{op}_cpu_s_per_gib": round(cpu_s * GIB / nbytes, 2)}
        report[name] = figures
        print(f"{name}: {figures}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
