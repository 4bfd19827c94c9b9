"""The names of a cluster's actors in Ray."""

NAMESPACE = "tiered_kv"


SWITCH_INTERVAL_S = 0.0005
"""How long a thread in an actor's process may compute while another thread waits for the interpreter's lock. With Python's default of
5 ms, a transfer between nodes would take that much longer whenever the reporting thread runs meanwhile."""


def coordinator_name(cluster: str) -> str:
    """Returns the name of a cluster's coordinator."""
    return f"coordinator:{cluster}"


def node_name(cluster: str, node_id: str) -> str:
    """Returns the name of a cluster's node."""
    return f"node:{cluster}:{node_id}"
