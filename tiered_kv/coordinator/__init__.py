"""Coordinator: the live nodes, the directory of their blocks, and the sum of their policies' statistics.

May import: protocol, policy (to add statistics up), keys, clock, errors.
Must never know: nodes' internals, clients, ray. All its state can be rebuilt from the nodes' reports.
"""
