"""Saves a cache's content in a folder, and loads it from there. Checkpoints have a name or a step."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from tiered_kv.checkpoint.call_nodes import calls_to
from tiered_kv.checkpoint.load_local import LoadResult, load, read
from tiered_kv.checkpoint.manifest import Manifest, Model, plain_layout
from tiered_kv.checkpoint.repository import Repository, may_be_manifest
from tiered_kv.checkpoint.take import CheckpointFilter, CheckpointJob, CheckpointResult
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout, OpaqueLayout
from tiered_kv.library.cache import BaseKVCache, PositionEntry
from tiered_kv.library.model import ModelCacheWrapper, TransformersKVCache
from tiered_kv.tiers.objects.folder_store import FolderStore

log = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{12})\.tkv")
_PREFIXES, _POSITIONS = "prefixes", "positions"
_CACHE = "cache"  # the field with `BaseKVCache.origins`
_ORIGIN = "library"
_POLL_S = 0.002
AnyCache = BaseKVCache | TransformersKVCache | ModelCacheWrapper


class CachePersistence:
    """Checkpoints in one folder, which is created if it does not exist. Blocks that several checkpoints have are stored once.

    A checkpoint's name is the name of a file, with any ending. This file lists the blocks (a manifest); the blocks are in other
    files (packs) of the folder. Nothing is pickled (docs/checkpoint-format.md). Raises (kind `storage`) if the folder cannot be
    used.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise TieredKVError(Kind.CONFIG, f"folder must be a path, got {folder!r}", setting="folder")
        self.folder = Path(folder)
        self._store = _store(self.folder)

    def save_cache(self, cache: AnyCache, name: str) -> CheckpointResult:
        """Write the cache's content as the checkpoint `name`. Returns its counts.

        A checkpoint of the same name is replaced atomically at the end. Cost: one copy of the content, synced to disk.
        """
        _check_name(name)
        core = _core(cache)
        models, positions = _described(core)
        if not models:
            raise TieredKVError(Kind.CONFIG, "save_cache: there is nothing to save, because nothing was stored in this cache yet")
        node, roots = core.engine(models[0].layout).node, {model.root for model in models}
        job = CheckpointJob(calls_to(node), [node.node_id], Repository(self._store), origin=_ORIGIN, poll_s=_POLL_S)
        return job.take(
            CheckpointFilter(models=lambda model: model.root in roots), name, models, {_POSITIONS: positions, _CACHE: sorted(core.origins)}
        )

    def load_cache(self, cache: AnyCache, name: str) -> LoadResult:
        """Load a checkpoint into a cache of the same model. Returns the counts of the load.

        All frames are verified first. Raises (kind `storage`) if there is no such checkpoint, (kind `corrupt`) if it is damaged
        or not a checkpoint (for example a pickle), and (kind `model`) if it has no blocks of this cache's model. After an error the
        cache is unchanged. If the checkpoint has several models (as a cluster's may), blocks of other models are left out and logged.
        """
        _check_name(name)
        core = _core(cache)
        if name not in self._store.sizes():
            raise TieredKVError(
                Kind.STORAGE, f"there is no checkpoint {name!r} in {self.folder}; its checkpoints: {self._names()}", object=name
            )
        manifest = read(self._store, name)
        models = _matching(core, manifest, name)
        positions = manifest.extra.get(_POSITIONS, [])
        _check_serials(core, manifest.extra.get(_CACHE, []), {serial for _, _, serial in positions}, name)
        for model in models:  # registers the model, so that the node knows the codecs of its blocks
            engine = core.engine(model.layout)
            if model.name == _POSITIONS:
                engine.client(model.layout, core.namespace_of_positions)
            else:
                core.layout = core.layout or model.layout
                engine.client(model.layout, core.namespace, rope=core.rope)
        loaded = load(engine.node, self._store, manifest, {model.root for model in models})
        core.origins.update(manifest.extra.get(_CACHE, []))
        core.place({at: PositionEntry(KVLayout(*layout), serial, torch.device("cpu")) for at, layout, serial in positions})
        return loaded

    def _names(self) -> str:
        return ", ".join(Repository(self._store).names()) or "none"


def save_cache_checkpoint(cache: AnyCache, folder: str | os.PathLike, step: int) -> Path:
    """Write a checkpoint of a training step (0 or more). Returns its path. Replaces a checkpoint of the same step."""
    _check_step(step)
    name = f"step-{step:012}.tkv"
    CachePersistence(folder).save_cache(cache, name)
    return Path(folder) / name


def load_cache_checkpoint(cache: AnyCache, folder: str | os.PathLike, step: int | None = None) -> int:
    """Load the checkpoint of a step, or of the latest step if `step` is None. Returns the step that was loaded.

    Raises the errors of `CachePersistence.load_cache`. The folder may be read-only.
    """
    if not Path(folder).is_dir():
        raise TieredKVError(
            Kind.STORAGE, f"folder must be an existing folder with checkpoints; there is no folder {folder}", object=str(folder)
        )
    steps = sorted(int(found[1]) for each in os.listdir(folder) if (found := _STEP.fullmatch(each)))
    if step is not None:
        _check_step(step)
    if not steps or step not in (None, *steps):
        known = ", ".join(map(str, steps)) or "none"
        wanted = "any step" if step is None else f"step {step}"
        raise TieredKVError(Kind.STORAGE, f"there is no checkpoint of {wanted} in {folder}; its steps: {known}", step=step)
    chosen = steps[-1] if step is None else step
    persistence = CachePersistence.__new__(CachePersistence)  # without __init__, which requires a writable folder
    persistence.folder, persistence._store = Path(folder), FolderStore(folder, setting="folder", create=False)
    persistence.load_cache(cache, f"step-{chosen:012}.tkv")
    return chosen


def _store(folder: Path) -> FolderStore:
    try:
        return FolderStore(folder, setting="folder")
    except TieredKVError as error:
        raise TieredKVError(Kind.STORAGE, f"the folder {folder} cannot be used for checkpoints: {error}", object=str(folder)) from error


def _core(cache: Any) -> BaseKVCache:
    whole = cache.cache if isinstance(cache, ModelCacheWrapper) else cache
    core = whole.cache if isinstance(whole, TransformersKVCache) else whole
    if not isinstance(core, BaseKVCache):
        raise TieredKVError(Kind.CONFIG, f"cache must be a cache of this library, got {type(cache).__name__}")
    return core


def _described(core: BaseKVCache) -> tuple[list[Model], list[list]]:
    """Returns the models of a cache's blocks (by prefix and by position), and its position entries as JSON-ready lists.

    There are no models if nothing was stored yet.
    """
    placed = core.placed()
    layouts = {each.layout for each in placed.values()}
    named = [(core.namespace_of_positions, layout, _POSITIONS) for layout in sorted(layouts, key=lambda each: each.spec)]
    if core.layout is not None:
        named.insert(0, (core.namespace, core.layout, _PREFIXES))
    models = [Model(namespace.root(layout), layout, name, namespace.as_fields()) for namespace, layout, name in named]
    positions = [[at, plain_layout(each.layout), each.serial] for at, each in placed.items()]
    return models, positions


def _matching(core: BaseKVCache, manifest: Manifest, name: str) -> list[Model]:
    """Returns those models of a checkpoint whose blocks this cache can use.

    Raises (kind `model`) if there are no such models, or if a library cache of another model wrote the checkpoint.
    """
    matching, others = [], []
    for model in manifest.models:
        is_ours, differs = _compared(core, model)
        (matching if is_ours else others).append((model, differs))
    if not matching or any(model.name == _PREFIXES for model, _ in others):
        why = "; ".join(dict.fromkeys(differs for _, differs in others)) or "it has no models and no blocks"
        raise TieredKVError(Kind.MODEL, f"checkpoint {name} is of another model: {why}", object=name)
    for model, differs in others:
        log.warning("checkpoint %s: the blocks of model %s are left out: %s", name, model.root.hex()[:12], differs)
    return [model for model, _ in matching]


def _compared(core: BaseKVCache, model: Model) -> tuple[bool, str]:
    """Compare a checkpoint's model with the cache's. Returns whether they are the same, and the difference as a text if not."""
    if model.layout is None:
        return False, "the checkpoint does not record the layout of its blocks"
    if isinstance(model.layout, OpaqueLayout):
        return False, f"its blocks have an order that only their engine knows ({model.layout.spec:.100})"
    is_positions = model.name == _POSITIONS
    layout = model.layout if is_positions else core.layout or model.layout
    namespace = core.namespace_of_positions if is_positions else core.namespace
    ours, theirs = layout.spec, model.layout.spec
    if ours != theirs:
        return False, f"its blocks are {theirs}, the cache's {ours}"
    return namespace.root(layout) == model.root, "weights, tokenizer, adapter, tenant or forward hooks differ"


def _check_serials(core: BaseKVCache, origins: list[str], serials: set[int], name: str) -> None:
    """Raise (kind `model`) if a checkpoint and a cache use the same serial (`PositionEntry.serial`) for different pairs.

    Each cache counts its serials from a random number, so this is rare.
    """
    if core.origins.isdisjoint(origins) and not serials.isdisjoint(placed.serial for placed in core.placed().values()):
        message = f"checkpoint {name} and this cache use the same numbers for different pairs, by chance; load it before the first put"
        raise TieredKVError(Kind.MODEL, message, object=name)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not may_be_manifest(name) or name.endswith(".pack"):
        message = f"name must be a file name such as cache_state.tkv, without folders, got {name!r}"
        raise TieredKVError(Kind.CONFIG, message, setting="name")


def _check_step(step: object) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**12:
        raise TieredKVError(Kind.CONFIG, f"step must be a whole number from 0 to 10**12 - 1, got {step!r}", setting="step")
