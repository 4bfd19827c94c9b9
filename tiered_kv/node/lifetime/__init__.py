"""The lifetime of a node: counts of its service, and its end, with blocks that are handed over or written to disk.

May import: node, protocol, store, blocks, keys, errors. Must never know: clients, ray.
"""
