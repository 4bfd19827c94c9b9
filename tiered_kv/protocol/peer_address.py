"""The address at which a process listens for its peers: reads the setting `peer_address`, and opens the listening socket.

The setting names an interface, a network or an address, and the ports to choose from: `eth1`, `10.1.0.0/16:7400-7499`, `:7400`,
`[fd00::/8]:7400`. Without it a process listens at its machine's address in Ray, at any free port. `off` turns the streams off.
"""

import errno
import ipaddress
import re
import socket
from typing import NamedTuple

from tiered_kv.errors import Kind, TieredKVError

SETTING = "peer_address"
OFF = "off"
_FORM = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<place>[^:\[\]]*))(?::(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?)?")
EXAMPLES = "eth1, 10.1.0.0/16:7400-7499, :7400 or [fd00::/8]:7400"
LISTEN_QUEUE = 128


class PeerPlace(NamedTuple):
    """The parsed setting. `place`: an interface, a network or an address; "" for the default address. `ports`: 0 stands for any port."""

    place: str
    ports: range

    @classmethod
    def of(cls, text: str | None) -> "PeerPlace | None":
        """Parse the setting. Returns None for `off`. Raises (kind `config`) if the text is invalid."""
        if text is None:
            return cls("", range(1))
        if text == OFF:
            return None
        found = _FORM.fullmatch(text)
        first = int(found["first"] or 0) if found else -1
        last = int(found["last"] or first) if found else -1
        if not found or not text or not 0 <= first <= last < 1 << 16 or (found["first"] and not first):
            raise _unusable(f"must be an interface, a network or an address, with ports from 1 to 65535, such as {EXAMPLES}, got {text!r}")
        return cls(found["bracketed"] or found["place"] or "", range(first, last + 1))

    def beside_nodes(self) -> "PeerPlace":
        """Returns the place for the coordinator, which shares a machine with a node: the same ports, the last first.

        If the setting has a single port, the node takes it, and the coordinator may use any free port.
        """
        return PeerPlace(self.place, self.ports[::-1] if len(self.ports) > 1 else range(1))

    def listen(self, default: str) -> socket.socket:
        """Returns a listening socket at this place. `default`: the address to use if the setting names none.

        Raises an error (kind `config`) that names the setting if this machine has no such address, or if all ports are in use.
        """
        host = self._host(default)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for port in self.ports:
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((host, port))
                listener.listen(LISTEN_QUEUE)
            except OSError as error:
                listener.close()
                if error.errno == errno.EADDRINUSE:
                    continue
                raise _unusable(f"this machine cannot listen at {host} port {port}: {error.strerror}") from error
            else:
                return listener
        ports = f"port {self.ports[0]} is" if len(self.ports) == 1 else f"ports {self.ports[0]} to {self.ports[-1]} are all"
        raise _unusable(f"{ports} in use at {host}; give other ports, or none for any free one")

    def _host(self, default: str) -> str:
        if not self.place:
            return default
        by_interface = _addresses()
        if self.place in by_interface:
            return by_interface[self.place][0]
        here = [address for addresses in by_interface.values() for address in addresses]
        try:
            network = ipaddress.ip_network(self.place, strict=False)
        except ValueError:
            raise _unusable(f"this machine has no interface {self.place!r}; it has {', '.join(sorted(by_interface))}") from None
        if network.num_addresses == 1:
            return str(network.network_address)  # it may be of a whole network of this machine, such as 127.0.0.0/8
        inside = [address for address in here if ipaddress.ip_address(address) in network]
        if not inside:
            raise _unusable(f"this machine has no address in {self.place}; it has {', '.join(here)}")
        return inside[0]


def address_text(host: str, port: int) -> str:
    """Returns an address as text, as peers exchange it: "10.1.0.7:7400" or "[fd00::7]:7400"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: object) -> tuple[str, int]:
    """Returns the host and the port of an address. Raises (kind `transport`) if `text` is not an address."""
    host, colon, port = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise TieredKVError(Kind.TRANSPORT, f"a peer's address must be HOST:PORT, got {text!r}", reason="address")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _addresses() -> dict[str, list[str]]:
    """Returns the addresses of each interface of this machine, IPv4 first. Link-local addresses are left out: they need a scope."""
    import psutil

    found: dict[str, list[str]] = {}
    for name, each in psutil.net_if_addrs().items():
        usable = [a.address for a in each if a.family in (socket.AF_INET, socket.AF_INET6) and "%" not in a.address]
        if usable:
            found[name] = sorted(usable, key=lambda address: ":" in address)
    return found


def _unusable(message: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"{SETTING}: {message}", setting=SETTING)
