"""The HTTP endpoint of a process's metrics. A process that cannot listen works without one and says why."""

import logging
import socket
from collections.abc import Mapping

from tiered_kv.errors import TieredKVError
from tiered_kv.metrics.http_server import MetricsServer, Page
from tiered_kv.metrics.ports import MetricsPlace, announced
from tiered_kv.protocol.peer_address import address_text

log = logging.getLogger(__name__)


class MetricsEndpoint:
    """Listens for scrapers from its creation, and answers them from `serve` on.

    `setting`: the setting `metrics_port`. `machine`: the machine's address, for others. `address`: where others reach the endpoint;
    None if metrics are off or there is no free port. Then `problem` says why, or is empty.
    """

    def __init__(self, setting: str, machine: str, *, is_coordinator: bool = False) -> None:
        self.address: str | None = None
        self.problem = ""
        self._listener: socket.socket | None = None
        self._server: MetricsServer | None = None
        try:
            place = MetricsPlace.of(setting)
            if place is None:
                return
            self._listener = place.listen(is_coordinator=is_coordinator)
        except TieredKVError as error:
            self.problem = str(error)
            log.warning("this process serves no metrics: %s", error)
            return
        host, port = self._listener.getsockname()[:2]
        self.address = announced(address_text(host, port), machine)
        wanted = place.place.ports
        if port not in wanted and not is_coordinator:
            log.warning("metrics_port %d is in use, so metrics are at http://%s/metrics", wanted[0], self.address)
        else:
            log.info("metrics are at http://%s/metrics", self.address)

    @property
    def labels(self) -> dict[str, str]:
        """The entries for a node's info."""
        found = {"metrics_address": self.address or "", "metrics_problem": self.problem}
        return {name: text for name, text in found.items() if text}

    def serve(self, pages: Mapping[str, Page]) -> None:
        """Answer scrapers from now on. `pages`: by path."""
        if self._listener is not None:
            self._server = MetricsServer(self._listener, pages)
            self._server.start()

    def close(self) -> None:
        """Stop listening. May be called twice."""
        listener, self._listener = self._listener, None
        if self._server is not None:
            self._server.close()
        elif listener is not None:
            listener.close()
