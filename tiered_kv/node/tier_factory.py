"""Creates a node's tiers other than host memory from its settings: device pool, disk folder, packs on object storage."""

import fcntl
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from tiered_kv.config import Config, format_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.pool import DevicePool
from tiered_kv.tiers.device import DeviceTier
from tiered_kv.tiers.disk.folder import claim_folder, unused_below
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.objects.open_store import open_store
from tiered_kv.tiers.objects.tier import ObjectsTier

log = logging.getLogger(__name__)


def own_name(cluster_id: str, node_id: str) -> str:
    """Returns the name of a node's folder beside those of other nodes. The command `down` searches for it."""
    return f"tkv-{cluster_id}-{node_id}"


def device_tier(config: Config, directory: Path, identity: int) -> DeviceTier:
    """Create the device pool for one life of the node. `identity`: that of the life (`Life`). Workers find the pool in `directory`.

    Raises an error that names the setting `device`.
    """
    name = config.device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    return DeviceTier(DevicePool.create(name, config.device, directory, identity))


def disk_tier(config: Config, cluster_id: str, node_id: str) -> DiskTier:
    """Open the node's disk segments. They outlive the cluster if the settings name their folder. Else they are removed with the cluster.

    Raises (kind `storage`) if the folder cannot be used.
    """
    root = Path(config.disk_root)
    owner = own_name(cluster_id, node_id)
    try:
        root.mkdir(mode=0o700, parents=config.disk_path is None, exist_ok=True)
        if config.disk_path is not None:
            tier = claim_folder(root, owner, lambda folder: DiskTier(folder, config.disk, config.disk_segment, owner=owner))
            _warn_of_unused(root)
            return tier
        _remove_stale(root, owner)
    except OSError as error:
        message = f"disk_path: cannot use the folder {root} for disk segments: {error.strerror}"
        raise TieredKVError(Kind.STORAGE, message, setting="disk_path", path=str(root)) from error
    return DiskTier(root / owner, config.disk, config.disk_segment, owner=owner)


def objects_tier(config: Config, cluster_id: str, node_id: str) -> ObjectsTier:
    """Open the node's packs below the configured URL. They are removed with the cluster.

    Raises an error that names the setting `objects`.
    """
    assert config.objects is not None
    return ObjectsTier(open_store(config.objects, own_name(cluster_id, node_id)), config.objects_cap)


def _warn_of_unused(root: Path) -> None:
    """Log which folders below `root` have bytes that no cap counts: those of former nodes or older versions."""
    with suppress(OSError):
        unused = {name: nbytes for name, nbytes in unused_below(root).items() if nbytes}
        if unused:
            log.warning(
                "disk_path: %s below %s are in folders that no node uses and no cap counts (%s); remove the folders that you do not need",
                format_size(sum(unused.values())),
                root,
                ", ".join(unused),
            )


def _remove_stale(root: Path, own: str) -> None:
    """Remove the folders of other nodes that are dead. No node will ever read them again."""
    for folder in root.glob("tkv-*"):
        if folder.name == own:
            continue
        try:
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # no folder of a node, or one of another user
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its node is alive
        finally:
            os.close(fd)
