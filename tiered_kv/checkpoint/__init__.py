"""Writes and restores checkpoints of a cluster: repository, manifest, leases, garbage collection, verification.

May import: node (to load within one process), protocol, tiers, codecs, memory, config, layout, keys, blocks, errors, clock; msgpack.
Never knows: ray, actors, cluster, policy, integrations. It calls nodes only through a function that callers pass (`CallNodes`).
"""
