"""The class that vLLM loads. It passes each hook to the scheduler's or the workers' side, and lets no exception through."""

import time
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from tiered_kv.client.page_client import PageClient
from tiered_kv.errors import TieredKVError
from tiered_kv.integrations.vllm import versions
from tiered_kv.integrations.vllm.events import Events
from tiered_kv.integrations.vllm.messages import Handshake, RequestBlocks, Step, WorkerReport
from tiered_kv.integrations.vllm.scheduler import Scheduler
from tiered_kv.integrations.vllm.settings import Settings, check_engine, log
from tiered_kv.integrations.vllm.stats import Metrics, Stats
from tiered_kv.integrations.vllm.worker import Worker
from tiered_kv.keys import Namespace
from tiered_kv.layout import OpaqueLayout

LOG_EVERY_S = 30.0
P = ParamSpec("P")
R = TypeVar("R")


def guarded(otherwise: R, repair: Callable[..., R] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a hook: an error in it is logged, at most every LOG_EVERY_S, and the hook returns `otherwise`.

    If `otherwise` would make the engine compute with wrong KV or wait forever, a `repair` must be given. It is called with the hook's
    arguments after an error, and its result is returned instead.
    """

    def decorate(hook: Callable[P, R]) -> Callable[P, R]:
        logged_s = float("-inf")

        @wraps(hook)
        def safe(*arguments: P.args, **options: P.kwargs) -> R:
            nonlocal logged_s
            try:
                return hook(*arguments, **options)
            except Exception:  # noqa: BLE001 - named boundary: a fault of the cache must not end the engine
                if time.monotonic() >= logged_s + LOG_EVERY_S:
                    logged_s = time.monotonic()
                    log.exception("tiered_kv: %s failed, and the engine goes on without it", hook.__name__)
                return otherwise if repair is None else repair(*arguments, **options)

        return safe

    return decorate


class TieredKV(KVConnectorBase_V1):
    """vLLM's connector to a cluster of tiered_kv. `kv_connector_extra_config` is described in `settings.Settings`."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        versions.check_hooks(KVConnectorBase_V1)
        self._settings = Settings.of(vllm_config.kv_transfer_config.kv_connector_extra_config)
        check_engine(vllm_config, kv_cache_config)
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        self._block_pool: Any = None
        parallel = vllm_config.parallel_config
        world = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        events = getattr(vllm_config, "kv_events_config", None)
        has_events = bool(events and events.enable_kv_cache_events)
        if role is KVConnectorRole.SCHEDULER:
            is_async = bool(vllm_config.scheduler_config.async_scheduling)  # the next step would use blocks that failed to load
            in_step = versions.runs_on_cpu() and world == 1 and not is_async
            self._scheduler = Scheduler(vllm_config, self._settings, self._attach, tokens, in_step)
            if has_events:
                self._scheduler.events = Events(tokens, self._scheduler.is_here, versions.external_hash)
        else:
            self._worker = Worker(vllm_config, kv_cache_config, self._settings, self._attach, parallel.rank % world, world)
            self._worker.records_stores = has_events

    def _attach(self, layout: OpaqueLayout, namespace: Namespace) -> PageClient:
        """Returns a client of this machine's node. If no node runs yet, the client connects once a node has started."""
        from tiered_kv.cluster.attach import attach_pages

        name, node = self._settings.cluster, self._settings.node or None
        client = attach_pages(namespace, layout, name=name, node_id=node)
        if not client.has_node and self._scheduler is not None:  # else each worker would log it too
            log.warning(
                "tiered_kv: no cluster %r runs on this machine now. The engine works without it, and uses it as soon as there is one"
                " (tiered-kv up --name %s)",
                name,
                name,
            )
        return client

    # Workers' side

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether a request must wait until its KV is stored before it finishes. It need not, because a cache may lose blocks."""
        return False

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        assert self._worker is not None
        try:
            self._worker.register(kv_caches)
        except TieredKVError as error:
            log.error("tiered_kv is off for this engine: %s", error)
        except Exception:  # noqa: BLE001 - named boundary: the engine can work without a cache
            log.exception("tiered_kv is off for this engine, because it could not be set up")

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin()

    def get_handshake_metadata(self) -> Handshake | None:
        return self._worker.handshake() if self._worker is not None else None

    @guarded(None, repair=lambda self, *_, **__: self._worker.give_up(self._connector_metadata))
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None and isinstance(self._connector_metadata, Step):
            self._worker.load(self._connector_metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    @guarded(None)
    def wait_for_save(self) -> None:
        if self._worker is not None and isinstance(self._connector_metadata, Step):
            self._worker.store(self._connector_metadata)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, (self._worker.finished() or None) if self._worker is not None else None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.failed() if self._worker is not None else set()

    @guarded(None)
    def build_connector_worker_meta(self) -> WorkerReport | None:
        return self._worker.report() if self._worker is not None else None

    # Scheduler's side

    @guarded(None)
    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        if self._scheduler is not None:
            self._scheduler.meet(metadata)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        self.set_xfer_handshake_metadata(dict(enumerate(metadata[place] for place in sorted(metadata))))

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._block_pool = gpu_block_pool

    @guarded((0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched(request, num_computed_tokens)

    @guarded(None, repair=lambda self, request, blocks, tokens: self._scheduler.give_up(request, blocks.get_block_ids()[0], tokens))
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    @guarded({}, repair=lambda *_: {})
    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Returns the number of tokens in a request's load, by vLLM's name of the source."""
        sources = versions.hit_sources()
        assert self._scheduler is not None
        found: dict[Any, int] = {}
        for tier, blocks in self._scheduler.tiers_of(request).items():
            source = sources.get(tier, sources[""])
            found[source] = found.get(source, 0) + blocks * self._scheduler.block_tokens
        return found

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        assert self._scheduler is not None
        step = self._scheduler.step(self._stores_of(scheduler_output))
        step.prefill_tokens = sum(count for count in scheduler_output.num_scheduled_tokens.values() if count > 1)
        return step

    @guarded([], repair=lambda self, _: self._scheduler.distrust())
    def _stores_of(self, scheduler_output: Any) -> list[RequestBlocks]:
        assert self._scheduler is not None
        return self._scheduler.stores_of(scheduler_output)

    @guarded(None)
    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        report = getattr(connector_output, "kv_connector_worker_meta", None)
        invalid = connector_output.invalid_block_ids or set()
        spoiled = self._scheduler.learned(invalid, report if isinstance(report, WorkerReport) else None)
        if spoiled and self._block_pool is not None:
            self._block_pool.evict_blocks(spoiled)  # else a request that is aborted now would leave them in vLLM's own cache

    @guarded((False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        self._scheduler.finished(request)
        return False, None

    @guarded(())
    def take_events(self) -> Iterable[Any]:
        assert self._scheduler is not None
        events = self._scheduler.events
        return events.take() if events is not None else ()

    @guarded(False)
    def reset_cache(self) -> bool:
        assert self._scheduler is not None
        self._scheduler.reset()
        return True

    # Both sides

    @guarded(None)
    def get_kv_connector_stats(self) -> Stats | None:
        side = self._worker or self._scheduler
        counts = side.counts() if side is not None else {}
        return Stats(data=counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats:
        return Stats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> Metrics:
        return Metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @guarded(None)
    def shutdown(self) -> None:
        side = self._worker or self._scheduler
        if side is not None:
            side.close()
