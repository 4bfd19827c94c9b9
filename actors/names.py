"""The names of a cluster's actors in Ray."""

NAMESPACE = "tiered_kv"


def coordinator_name(cluster: str) -> str:
    """Returns the name of a cluster's coordinator."""
    return f"coordinator:{cluster}"


def node_name(cluster: str, node_id: str) -> str:
    """Returns the name of a cluster's node."""
    return f"node:{cluster}:{node_id}"
