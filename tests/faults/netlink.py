"""The few requests to the Linux kernel that connect network namespaces: rtnetlink, as in rtnetlink(7), without iproute2."""

import os
import socket
import struct

NETLINK_ROUTE = 0
REQUEST, ACK, EXCL, CREATE = 0x1, 0x4, 0x200, 0x400
NEWLINK, SETLINK, NEWADDR = 16, 19, 20
ERROR = 2
IFNAME, MASTER, PROTINFO, LINKINFO, NET_NS_PID = 3, 10, 12, 18, 19
INFO_KIND, INFO_DATA, VETH_PEER = 1, 2, 1
BRPORT_STATE = 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
NESTED = 0x8000
UP = 1
AF_BRIDGE = 7
DISABLED, FORWARDING = 0, 3
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")


def attribute(kind: int, payload: bytes) -> bytes:
    """Returns one attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def add_bridge(name: str) -> None:
    """Creates a bridge, which is a switch in the kernel, and turns it on."""
    info = attribute(LINKINFO, attribute(INFO_KIND, b"bridge\0"))
    _ask(NEWLINK, CREATE | EXCL, _LINK.pack(0, 0, 0, 0, 0) + _named(name) + info)
    turn_on(name)


def add_cable(port: str, bridge: str, interface: str, namespace_of: int) -> None:
    """Creates a pair of virtual interfaces: `port` of a bridge here, and `interface` in the namespace of process `namespace_of`."""
    peer = _LINK.pack(0, 0, 0, 0, 0) + _named(interface) + attribute(NET_NS_PID, struct.pack("=I", namespace_of))
    info = attribute(INFO_KIND, b"veth\0") + attribute(INFO_DATA, attribute(VETH_PEER, peer))
    master = attribute(MASTER, struct.pack("=I", socket.if_nametoindex(bridge)))
    _ask(NEWLINK, CREATE | EXCL, _LINK.pack(0, 0, 0, 0, 0) + _named(port) + master + attribute(LINKINFO, info))
    turn_on(port)


def turn_on(name: str) -> None:
    """Turns an interface on."""
    _ask(NEWLINK, 0, _LINK.pack(0, 0, socket.if_nametoindex(name), UP, UP))


def add_address(name: str, address: str, prefix_bits: int) -> None:
    """Gives an interface an IPv4 address."""
    packed = socket.inet_aton(address)
    head = struct.pack("=BBBBI", socket.AF_INET, prefix_bits, 0, 0, socket.if_nametoindex(name))
    _ask(NEWADDR, CREATE | EXCL, head + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed))


def forward(port: str, on: bool) -> None:
    """Makes a port of a bridge carry packets, or drop all of them. The interfaces at both ends stay up."""
    state = attribute(BRPORT_STATE, bytes([FORWARDING if on else DISABLED]))
    head = _LINK.pack(AF_BRIDGE, 0, socket.if_nametoindex(port), 0, 0)
    _ask(SETLINK, 0, head + attribute(PROTINFO | NESTED, state))


def _named(name: str) -> bytes:
    return attribute(IFNAME, name.encode() + b"\0")


def _ask(kind: int, flags: int, body: bytes) -> None:
    """Sends one request and waits for the kernel's answer. Raises `OSError` if the kernel refuses."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as channel:
        channel.send(_HEADER.pack(_HEADER.size + len(body), kind, REQUEST | ACK | flags, 1, 0) + body)
        answer = channel.recv(65536)
    assert struct.unpack_from("=H", answer, 4)[0] == ERROR, "a request with ACK is answered by an error message, of number 0 for success"
    number = -struct.unpack_from("=i", answer, _HEADER.size)[0]
    if number:
        raise OSError(number, os.strerror(number), f"netlink request {kind}")
