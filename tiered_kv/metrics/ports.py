"""The address at which a process serves metrics: reads the setting `metrics_port`, and opens the listening socket.

The setting is a port, which is then used on loopback only; or a place with ports as in `peer_address`, such as `0.0.0.0:9940` or
`eth1:9940-9949`; or `off`. With a single port, nodes use it or the next free one after it, and the coordinator the one before it or the
next free one below.
"""

import socket
from typing import NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.peer_address import PeerPlace, parse_address

SETTING = "metrics_port"
OFF = ("off", "0")
PORTS_TRIED = 64
LOOPBACK = "127.0.0.1"
ANY = ("0.0.0.0", "::")


class MetricsPlace(NamedTuple):
    """The setting `metrics_port`, parsed."""

    place: PeerPlace

    @classmethod
    def of(cls, text: str) -> "MetricsPlace | None":
        """Parse the setting. Returns None for `off` and 0. Raises (kind `config`) if the text is invalid."""
        if text in OFF:
            return None
        with_port = f":{text}" if text.replace("-", "").isdecimal() else text
        try:
            place = PeerPlace.of(with_port)
        except TieredKVError as error:
            raise _renamed(error) from error
        if place is None or not place.ports[0]:
            raise TieredKVError(
                Kind.CONFIG, f"{SETTING}: must be off, a port, or a place with ports such as 0.0.0.0:9940, got {text!r}", setting=SETTING
            )
        return cls(place)

    def listen(self, *, is_coordinator: bool = False) -> socket.socket:
        """Returns a listening socket. Raises (kind `config`) if this machine has no such address, or if all ports are in use."""
        first, ports = self.place.ports[0], self.place.ports
        if len(ports) > 1:
            ports = ports[::-1] if is_coordinator else ports
        elif is_coordinator:
            ports = range(max(first - 1, 1), max(first - 1 - PORTS_TRIED, 0), -1)
        else:
            ports = range(first, min(first + PORTS_TRIED, 1 << 16))
        try:
            return PeerPlace(self.place.place, ports).listen(LOOPBACK)
        except TieredKVError as error:
            raise _renamed(error) from error


def announced(address: str, machine: str) -> str:
    """Returns the address to give to others: that of the machine if the server listens at all its addresses."""
    host, port = parse_address(address)
    return f"{machine}:{port}" if host in ANY else address


def _renamed(error: TieredKVError) -> TieredKVError:
    """Returns the error of a `PeerPlace` as one about this setting."""
    return TieredKVError(error.kind, str(error).replace("peer_address", SETTING), setting=SETTING)
