"""`tiered_kv.open` as users call it, including without a close."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiered_kv
from tiered_kv.tiers.objects.store import MemoryStore

LAYOUT = tiered_kv.KVLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
NAMESPACE = tiered_kv.Namespace(weights="open")

FORGETFUL = """
import torch, tiered_kv
layout = tiered_kv.KVLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
config = {"host": "2MiB", "disk": "2MiB"}
client = tiered_kv.open(config, layout=layout, namespace=tiered_kv.Namespace(weights="open"))
client.store(range(8), torch.zeros(layout.kv_shape(8)))
print(client._source._view.directory)
"""


def test_a_script_that_ends_without_close_leaves_nothing(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", FORGETFUL]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert not Path(ran.stdout.strip()).exists()
    assert not list(tmp_path.glob("tkv-*"))


def test_with_a_disk_tier_no_block_is_lost_while_there_is_room(tmp_path: Path) -> None:
    """Blocks of 128 KiB: many more than fit in a host tier of 2 MiB, and far fewer than fit in the disk tier."""
    layout = tiered_kv.KVLayout(layers=4, kv_heads=2, head_dim=64, dtype="bfloat16", block_tokens=64)
    prompts = [range(number * 1000, number * 1000 + 192) for number in range(80)]
    config = {"host": "2MiB", "disk": "64MiB", "disk_path": str(tmp_path / "disk")}
    with tiered_kv.open(config, layout=layout, namespace=NAMESPACE) as client:
        for number, prompt in enumerate(prompts):
            stored = client.store(prompt, torch.full(layout.kv_shape(192), number, dtype=torch.bfloat16))
            assert (stored.new, stored.refused) == (3, 0)
        for number, prompt in enumerate(prompts):
            fetched = client.fetch(prompt)
            assert fetched.tokens == 192
            assert fetched.kv.eq(number).all()


def test_a_read_only_out_is_rejected() -> None:
    with tiered_kv.open({"host": "2MiB"}, layout=LAYOUT, namespace=NAMESPACE) as client:
        client.store(range(4), torch.zeros(LAYOUT.kv_shape(4)))
        with pytest.raises(tiered_kv.TieredKVError, match="expanded"):
            client.fetch(range(4), torch.zeros(2, 2, 1, 1, 8).expand(LAYOUT.kv_shape(4)))


@pytest.mark.parametrize("config", [5, "1GiB", [("host", 1)]])
def test_settings_of_another_type_are_rejected(config: object) -> None:
    with pytest.raises(tiered_kv.TieredKVError, match="a Config or a mapping"):
        tiered_kv.open(config, layout=LAYOUT, namespace=NAMESPACE)


def test_the_error_for_an_unreachable_object_store_names_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(store: MemoryStore) -> dict[str, int]:
        raise store.failed("cannot be listed", "there is no such bucket")

    monkeypatch.setattr(MemoryStore, "sizes", sizes)
    config = {"host": "2MiB", "disk": f"2MiB:{tmp_path / 'disk'}", "objects": "memory://", "shm_path": str(tmp_path)}
    with pytest.raises(tiered_kv.TieredKVError, match=r"^objects: .*no such bucket") as caught:
        tiered_kv.open(config, layout=LAYOUT, namespace=NAMESPACE)
    assert caught.value.context["setting"] == "objects"
    assert not list(tmp_path.glob("tkv-*")), "nothing is left behind"


def test_disk_folders_outside_every_cap_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tkv-old-n0").mkdir()
    (tmp_path / "tkv-old-n0" / "segment-1").write_bytes(bytes(3 << 20))
    tiered_kv.open({"host": "2MiB", "disk": f"2MiB:{tmp_path}"}, layout=LAYOUT, namespace=NAMESPACE).close()
    assert "3.0 MiB below" in caplog.text
    assert "tkv-old-n0" in caplog.text
