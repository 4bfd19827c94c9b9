"""Admission: decides below which roots blocks may become visible on a node. Owns the weight epochs, what is known of roots, and purges.

May import: store, tiers, policy, protocol, memory, keys, blocks, errors; and `node` for typing. Must never know: ray, clients.
"""
