"""Admission: decides for each root whether its blocks may become visible on a node. Owns weight epochs, the book of roots, and purges.

May import: store, tiers, policy, protocol, memory, keys, blocks, errors; and `node` for typing. Must never know: ray, clients.
"""
