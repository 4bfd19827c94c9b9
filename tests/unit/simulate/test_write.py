"""Tests that written traces can be read again."""

from pathlib import Path

import pytest

from tests.unit.simulate.traces import line
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.simulate.trace import read_trace
from tiered_kv.tools.simulate.write import TraceWriter


@pytest.mark.parametrize(("name", "magic"), [("a.jsonl", b"{"), ("a.jsonl.gz", b"\x1f\x8b"), ("a.jsonl.zst", b"\x28\xb5\x2f\xfd")])
def test_a_written_trace_is_read_again(tmp_path: Path, name: str, magic: bytes) -> None:
    (tmp_path / name).write_text("what was there before")
    with TraceWriter(tmp_path / name) as trace:
        for at in range(100):
            trace.write(line(1000 * at, [at, 1000 + at], 20))
    trace.close()
    found = read_trace(tmp_path / name, block_tokens=10)
    assert (len(found), found.unique_blocks, found.times_s[-1]) == (100, 200, 99.0)
    assert (tmp_path / name).read_bytes().startswith(magic)


@pytest.mark.parametrize("name", ["none/a.jsonl", "none/a.jsonl.gz", "none/a.jsonl.zst", "."])
def test_a_file_that_cannot_be_created_is_reported(tmp_path: Path, name: str) -> None:
    with pytest.raises(TieredKVError, match="--out: cannot write") as caught:
        TraceWriter(tmp_path / name)
    assert (caught.value.kind, caught.value.context["setting"]) == (Kind.CONFIG, "out")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_full_disk_is_reported(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"full{suffix}"
    target.symlink_to("/dev/full")

    def write_all() -> None:
        with TraceWriter(target) as trace:
            trace.write(line(0, list(range(100_000))))

    with pytest.raises(TieredKVError, match="No space left"):
        write_all()
