"""The names of a cluster's actors in Ray."""

NAMESPACE = "tiered_kv"


SWITCH_INTERVAL_S = 0.0005
"""In the actors' processes, how long a thread may compute while another waits for the interpreter's lock. Python's default of 5 ms would
be added to a transfer between nodes whenever the thread that reports happens to run."""


def coordinator_name(cluster: str) -> str:
    """Returns the name of a cluster's coordinator."""
    return f"coordinator:{cluster}"


def node_name(cluster: str, node_id: str) -> str:
    """Returns the name of a cluster's node."""
    return f"node:{cluster}:{node_id}"
