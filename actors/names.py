"""Under which names a cluster's actors are found in Ray."""

NAMESPACE = "tiered_kv"


def coordinator_name(cluster: str) -> str:
    """The coordinator of a cluster."""
    return f"coordinator:{cluster}"


def node_name(cluster: str, node_id: str) -> str:
    """One node of a cluster."""
    return f"node:{cluster}:{node_id}"
