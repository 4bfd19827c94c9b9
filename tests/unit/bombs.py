"""A program that gives bombs to every decoder, with little memory to spare. `test_bombs.py` starts it and reads what it prints."""

import json
import os
import resource
import socket
import struct
import sys
import threading
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import zstandard

from tiered_kv.checkpoint import manifest as manifests
from tiered_kv.codecs import Calibration, LosslessCodec
from tiered_kv.codecs import frame as frames
from tiered_kv.codecs.base import Encoded
from tiered_kv.codecs.calibrated import tables
from tiered_kv.config import Config
from tiered_kv.embedded import Embedded
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.node.admission.roots import RootBook
from tiered_kv.node.probes import NodeProbes
from tiered_kv.protocol.node_record import read_record
from tiered_kv.protocol.unix_socket import SessionServer, SocketSession
from tiered_kv.tiers.disk import footer
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.packs import read_footer
from tiered_kv.unpacking import unpacked

SPARE_BYTES = 768 << 20
"""Address space beyond what the program has at its start. Each bomb asks for gigabytes."""
KEY, ROOT = bytes(range(32)), bytes(32)


def nested(levels: int, items: int = 0xFFFFFFFF) -> bytes:
    return (b"\xdd" + struct.pack(">I", items)) * levels


MSGPACK = {
    "array of 4 billion": nested(1),
    "arrays of 200,000 in each other": nested(1000, 200_000) + bytes(1_000_000),
    "mapping of 4 billion": b"\xdf\xff\xff\xff\xff",
    "text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
    "extension of 4 GB": b"\xc9\xff\xff\xff\xff\x01",
    "extension": b"\xd4\x01\x00",
    "100,000 arrays in each other": b"\x91" * 100_000,
    "900 arrays in each other": b"\x91" * 900 + b"\x00",
    "900 mappings in each other": b"\x81\xa1a" * 900 + b"\x00",
}


def zstd_bomb(nbytes: int) -> bytes:
    """Returns a small zstd frame of zeros that takes `nbytes` when it is opened, and says so."""
    writer = zstandard.ZstdCompressor(level=19).compressobj(size=nbytes)
    piece = bytes(1 << 20)
    return b"".join([*(writer.compress(piece) for _ in range(nbytes >> 20)), writer.flush()])


def lying_bomb(nbytes: int, said: int) -> bytes:
    """As `zstd_bomb`, with another size in its header."""
    bomb = zstd_bomb(nbytes)
    size = struct.pack("<I", nbytes)
    assert bomb.count(size, 0, 16) == 1
    return bomb.replace(size, struct.pack("<I", said), 1)


def refused(call, *expected: type[Exception]) -> str:
    """Returns "refused" if the call raises one of the expected errors, or returns nothing; else what it did."""
    try:
        found = call()
    except expected:
        return "refused"
    return "refused" if not found else f"accepted: {found!r:.100}"


def frame_of(spec: bytes, raw_bytes: int = 64, payload: bytes = bytes(64)) -> bytes:
    """Returns a frame with a right checksum and any spec."""
    header_bytes = -(-(frames._FIXED.size + len(spec)) // frames.ALIGN_BYTES) * frames.ALIGN_BYTES
    plain = next(iter(frames.encode_frame(KEY, ROOT, LosslessCodec(1), torch.zeros(64, dtype=torch.uint8))))
    fields = list(frames._FIXED.unpack_from(plain))
    names = frames._Fixed._fields
    for name, value in {
        "header_bytes": header_bytes,
        "spec_bytes": len(spec),
        "payload_bytes": len(payload),
        "raw_bytes": raw_bytes,
    }.items():
        fields[names.index(name)] = value
    header = (frames._FIXED.pack(*fields) + spec).ljust(header_bytes, b"\0")
    return header + payload + frames.checksum(header, [memoryview(payload)])


def frame_cases():
    for name, bomb in MSGPACK.items():
        if len(bomb) < 4096:
            yield f"frame: {name}", lambda bomb=bomb: frames.open_frame(frame_of(bomb), KEY)
            yield f"frame's error: {name}", lambda bomb=bomb: frames.carried_error(frame_of(bomb))
    codec = LosslessCodec(1)
    out = torch.empty(1 << 20, dtype=torch.uint8)
    for name, bomb in {"zstd": zstd_bomb(2 << 30), "zstd that lies": lying_bomb(2 << 30, 1 << 20)}.items():
        payload = memoryview(struct.pack("<I", len(bomb)) + bomb)
        yield f"payload: {name}", lambda payload=payload: codec.decode(payload, out)
        whole = b"".join(map(bytes, frames.frame_encoded(KEY, ROOT, Encoded(codec, payload, 0.0), 1 << 20)))
        yield f"frame: {name}", lambda whole=whole: frames.open_frame(whole, KEY).decode(out) or "decoded"
    yield "frame: lengths", lambda: frames.open_frame(frame_of(b"\x80", raw_bytes=(1 << 62)), KEY)


def file_cases(folder: Path):
    for name, bomb in MSGPACK.items():

        def roots(bomb=bomb):
            (folder / "roots").write_bytes(bomb)
            return RootBook([folder]).everything()

        def probes(bomb=bomb):
            (folder / "probes").write_bytes(bomb)
            return NodeProbes([folder], None).book.everything()

        yield f"roots: {name}", roots
        yield f"probes: {name}", probes

    def record(content: str):
        (folder / "node.json").write_text(content)
        return read_record(folder)

    yield "record: nested", lambda: record("[" * 500_000)
    yield "record: long", lambda: record('{"format": "' + "a" * (8 << 20))
    with (folder / "large.probes").open("wb") as file:
        file.truncate(64 << 30)
    os.replace(folder / "large.probes", folder / "probes")
    yield "probes: a sparse file", lambda: NodeProbes([folder], None).book.everything()
    with (folder / "roots").open("wb") as file:
        file.truncate(64 << 30)
    yield "roots: a sparse file", lambda: RootBook([folder]).everything()


def store_cases(folder: Path):
    store = FolderStore(folder / "objects", create=True)
    for name, bomb in MSGPACK.items():

        def manifest(bomb=bomb):
            head = manifests._START.pack(manifests.MAGIC, manifests.VERSION) + manifests._BODY_BYTES[manifests.VERSION].pack(len(bomb))
            store.put("ckpt", [head, bomb, manifests._digest(head, bomb)])
            return manifests.Manifest.read(store, "ckpt")

        yield f"manifest: {name}", manifest
    (folder / "objects" / "sparse").touch()
    os.truncate(folder / "objects" / "sparse", 64 << 30)
    yield "manifest: a sparse object", lambda: manifests.Manifest.read(store, "sparse")

    def pack():
        rows = (64 << 30) // footer.ROW_BYTES
        head = footer._TRAILER.pack(footer._TRAILER_MAGIC, footer.VERSION, rows, 0, 0, bytes(16))
        nbytes = rows * footer.ROW_BYTES + footer.TRAILER_BYTES
        path = folder / "objects" / f"{'0' * 64}.pack"
        path.touch()
        os.truncate(path, nbytes)
        with path.open("r+b") as file:
            file.seek(nbytes - footer.TRAILER_BYTES)
            file.write(head.ljust(footer.TRAILER_BYTES, b"\0"))
        return read_footer(store, path.name, nbytes)

    yield "pack: a footer of 64 GB", pack


def calibration_cases(folder: Path):
    for name, bomb in MSGPACK.items():

        def load(bomb=bomb):
            body = tables._HEAD.pack(tables.MAGIC, tables.VERSION, len(bomb)) + bomb
            (folder / "calibration").write_bytes(body + blake2b(body, digest_size=tables.DIGEST_BYTES).digest())
            return Calibration.load(folder / "calibration")

        yield f"calibration: {name}", load


def socket_cases(folder: Path, node):
    """Bombs of a worker to its node, and of a node to its worker."""
    path = str(folder / "sock")
    for name, bomb in {**MSGPACK, "length": b""}.items():

        def to_node(bomb=bomb):
            with socket.socket(socket.AF_UNIX) as worker:
                worker.settimeout(20)
                worker.connect(path)
                worker.sendall((struct.pack("<I", len(bomb)) + bomb) if bomb else b"\xff" * 4)
                answer = worker.recv(1 << 16)
                assert not answer or b"\xc2" in answer[:8], answer[:100]
            session = SocketSession(path, 10.0)
            session.stats()
            session.close()

        yield f"node: {name}", to_node

        def to_worker(bomb=bomb):
            listener = socket.socket(socket.AF_UNIX)
            where = f"{path}.fake"
            Path(where).unlink(missing_ok=True)
            listener.bind(where)
            listener.listen()

            def answer():
                connection, _ = listener.accept()
                connection.recv(1 << 16)
                connection.sendall((struct.pack("<I", len(bomb)) + bomb) if bomb else b"\xff" * 4)
                connection.close()

            thread = threading.Thread(target=answer)
            thread.start()
            try:
                SocketSession(where, 10.0)
                return "connected"
            finally:
                thread.join()
                listener.close()

        yield f"worker: {name}", to_worker


def main(folder: Path) -> None:
    layout = KVLayout(2, 2, 16, "float32", 16)
    embedded = Embedded(Config.of({"host": "4MiB"}))
    client = embedded.client(layout, Namespace("bombs"))
    client.store(range(16), torch.zeros(layout.kv_shape(16)))
    np.zeros(1 << 20).sum()
    server = SessionServer(str(folder / "sock"), embedded.node.open_session)
    bombs = [*frame_cases(), *file_cases(folder), *store_cases(folder), *calibration_cases(folder), *socket_cases(folder, embedded.node)]
    bombs += [(f"unpacked: {name}", lambda bomb=bomb: unpacked(bomb)) for name, bomb in MSGPACK.items()]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))
    outcomes = {name: refused(call, TieredKVError, ValueError) for name, call in bombs}
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before_bytes
    outcomes["a fetch afterwards"] = "a hit" if client.fetch(range(16)).tokens == 16 else "a miss"
    print(json.dumps({"outcomes": outcomes, "grown_bytes": grown_bytes}), flush=True)
    server.close()
    client.close()
    embedded.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
