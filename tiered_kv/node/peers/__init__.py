"""Peers: a node's streams to and from other nodes, and its look-ups in the coordinator's directory without Ray.

May import: what `node` may. Must never know: Ray, clients, eviction policies.
"""
