"""A node's figures: those of `status` and reports, and those that only its metrics have.

May import: what `node` may. Must never know: how figures are exported, clients, ray.
"""
