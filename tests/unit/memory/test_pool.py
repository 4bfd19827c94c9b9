"""The device pool: shared memory in several processes, copies within bounds, clear errors, and no files left behind."""

import os
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
import torch

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory import pool as pools
from tiered_kv.memory.pinned import register_host, unregister_host
from tiered_kv.memory.pool import DevicePool
from tiered_kv.memory.shared import NodeFiles, reclaim_stale

NBYTES = 64 << 10
has_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

READ_ELSEWHERE = """
import sys
from pathlib import Path
import torch
from tiered_kv.memory.pool import DevicePool
with DevicePool.open(Path(sys.argv[1])) as pool:
    out = torch.zeros(16, dtype=torch.uint8)
    pool.copy_out(512, 16, out).wait()
    assert out.tolist() == list(range(16)), out
    pool.copy_in(1024, (out.to(pool.device) + 100)).wait()
    print(pool.device.type, pool.nbytes, pool.generation)
"""


def error_of(call, *arguments, **options) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments, **options)
    return caught.value


@pytest.fixture
def pool(tmp_path, checked) -> DevicePool:
    return checked(DevicePool.create("cpu", NBYTES, tmp_path, generation=3))


def numbers(count: int = 16) -> torch.Tensor:
    return torch.arange(count, dtype=torch.uint8)


def read_elsewhere(directory: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", READ_ELSEWHERE, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_another_process_reads_and_writes_the_same_memory(pool, tmp_path):
    pool.copy_in(512, numbers()).wait()
    assert read_elsewhere(tmp_path) == ["cpu", str(NBYTES), "3"]
    assert pool.tensor[1024:1040].tolist() == list(range(100, 116))


def test_copies_on_the_cpu_are_complete_when_they_return(pool):
    ticket = pool.copy_in(0, numbers())
    assert ticket.done()
    out = torch.zeros(16, dtype=torch.uint8)
    assert pool.copy_out(0, 16, out).done()
    assert torch.equal(out, numbers())


def test_only_the_owner_of_the_directory_may_use_the_files(pool, tmp_path):
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"device": 0o600, "device-pool": 0o600}


@pytest.mark.parametrize(("asked", "had"), [(4096, 4096), (8191, 4096), (NBYTES + 1, NBYTES)])
def test_the_pool_never_exceeds_its_requested_size(tmp_path, asked, had):
    with DevicePool.create("cpu", asked, tmp_path) as pool:
        assert pool.nbytes == had == (tmp_path / "device-pool").stat().st_size


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 16), (NBYTES - 15, 16), (NBYTES + 1, 0)])
def test_bytes_outside_the_pool_are_rejected(pool, offset, nbytes):
    before = pool.tensor.clone()
    assert error_of(pool.copy_in, offset, numbers(nbytes)).kind is Kind.MEMORY
    assert error_of(pool.copy_out, offset, nbytes, numbers(nbytes)).kind is Kind.MEMORY
    assert torch.equal(pool.tensor, before)


def test_tensors_that_are_no_byte_vector_are_rejected(pool):
    assert error_of(pool.copy_in, 0, torch.zeros(4)).kind is Kind.MEMORY
    assert error_of(pool.copy_in, 0, torch.zeros(4, 4, dtype=torch.uint8)).kind is Kind.MEMORY
    assert error_of(pool.copy_out, 0, 8, numbers(9)).kind is Kind.MEMORY


def test_a_node_without_a_device_tier_has_no_pool(tmp_path):
    assert DevicePool.open(tmp_path) is None


def test_closing_releases_the_memory_and_removing_deletes_the_files(pool, tmp_path):
    reader = DevicePool.open(tmp_path)
    reader.close(remove=True)
    assert len(list(tmp_path.iterdir())) == 2, "only who created the pool removes it"
    pool.close(remove=True)
    pool.close()
    assert list(tmp_path.iterdir()) == []
    assert error_of(pool.copy_in, 0, numbers()).kind is Kind.CLOSED


def test_readers_detect_the_new_pool_of_a_restarted_node(pool, tmp_path, checked):
    reader = checked(DevicePool.open(tmp_path))
    again = checked(DevicePool.create("cpu", NBYTES, tmp_path, generation=4))
    again.copy_in(0, numbers()).wait()
    assert not reader.tensor[:16].any(), "the old memory is another"
    assert (reader.generation, DevicePool.open(tmp_path).generation) == (3, 4)


@pytest.mark.parametrize("device", ["cpu:x", "tpu", "meta", "cuda:99"])
def test_the_error_for_a_missing_device_names_the_setting(tmp_path, device):
    error = error_of(DevicePool.create, device, NBYTES, tmp_path)
    assert error.kind is Kind.CONFIG
    assert error.context["setting"] == "device"
    assert device in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("nbytes", "kind"), [(0, Kind.CONFIG), (4095, Kind.CONFIG), (1 << 50, Kind.MEMORY)])
def test_the_error_for_an_invalid_size_names_the_setting_and_leaves_no_files(tmp_path, nbytes, kind):
    error = error_of(DevicePool.create, "cpu", nbytes, tmp_path)
    assert error.kind is kind
    assert error.context["setting"] == "device"
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_for_the_pool_is_a_clear_error(tmp_path, monkeypatch):
    def full(fd, start, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert error_of(DevicePool.create, "cpu", NBYTES, tmp_path).kind is Kind.MEMORY
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_a_device_hidden_from_this_process_says_so(tmp_path):
    facts = {"version": 1, "device": "cuda", "nbytes": NBYTES, "generation": 1, "uuid": "GPU-of-another", "storage": []}
    (tmp_path / "device").write_bytes(msgpack.packb(facts))
    error = error_of(DevicePool.open, tmp_path)
    assert error.kind is Kind.MEMORY
    assert "CUDA_VISIBLE_DEVICES" in str(error)


def described(**changes) -> bytes:
    return msgpack.packb({"version": 1, "device": "cpu", "nbytes": NBYTES, "generation": 3} | changes)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x80\x04.", msgpack.packb([1]), described(version=2), described(device="tpu"), described(device="cuda")),
        *(described(nbytes="4096"), described(nbytes=NBYTES + 4096), msgpack.packb({"version": 1, "device": "cpu"})),
    ],
)
def test_a_damaged_or_newer_descriptor_is_rejected(pool, tmp_path, content):
    good = (tmp_path / "device").read_bytes()
    (tmp_path / "device").write_bytes(content)
    assert error_of(DevicePool.open, tmp_path).kind is Kind.MEMORY
    (tmp_path / "device").write_bytes(good)


def test_a_pool_without_its_memory_is_rejected(tmp_path):
    DevicePool.create("cpu", NBYTES, tmp_path).close()
    (tmp_path / "device-pool").unlink()
    assert error_of(DevicePool.open, tmp_path).kind is Kind.MEMORY


def test_the_files_of_a_dead_node_are_removed_with_its_directory(tmp_path):
    files = NodeFiles.create(tmp_path, "c", "n", 1 << 20)
    DevicePool.create("cpu", NBYTES, files.directory).close()
    assert reclaim_stale(tmp_path, 0, max_age_s=-1) == [], "somebody uses it"
    files.close()
    assert reclaim_stale(tmp_path, 1 << 62, max_age_s=-1) == [files.directory]
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_removes_its_files_removes_the_pool(tmp_path):
    files = NodeFiles.create(tmp_path, "c", "n", 1 << 20)
    pool = DevicePool.create("cpu", NBYTES, files.directory)
    files.remove()
    pool.close(remove=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_cuda_nothing_is_pinned():
    assert not register_host(numbers())
    assert not unregister_host(numbers())


@pytest.mark.gpu
@has_cuda
def test_another_process_maps_the_memory_of_a_gpu(tmp_path, checked):
    pool = checked(DevicePool.create("cuda:0", (12 << 20) + 5, tmp_path))
    assert pool.nbytes == 12 << 20
    pool.copy_in(512, numbers().cuda()).wait()
    assert read_elsewhere(tmp_path) == ["cuda", str(12 << 20), "0"]
    assert pool.tensor[1024:1040].tolist() == list(range(100, 116))


@pytest.mark.gpu
@has_cuda
def test_a_copy_on_the_side_stream_waits_for_the_callers_computation(tmp_path, checked):
    pool = checked(DevicePool.create("cuda:0", 32 << 20, tmp_path))
    source = torch.zeros(8 << 20, dtype=torch.uint8, device="cuda:0")
    for value in range(1, 50):
        source.fill_(value)
    ticket = pool.copy_in(0, source)
    ticket.wait()
    assert ticket.done()
    out = torch.empty(8 << 20, dtype=torch.uint8).pin_memory()
    pool.copy_out(0, out.numel(), out).wait()
    assert bool((out == 49).all())


@pytest.mark.gpu
@has_cuda
def test_host_memory_is_pinned_and_released():
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    assert register_host(memory)
    assert memory.is_pinned()
    assert unregister_host(memory)


@pytest.mark.gpu
@has_cuda
def test_a_gpu_pool_too_small_for_the_allocator_is_rejected(tmp_path):
    assert error_of(DevicePool.create, "cuda:0", pools._CUDA_MIN_BYTES - 1, tmp_path).kind is Kind.CONFIG
