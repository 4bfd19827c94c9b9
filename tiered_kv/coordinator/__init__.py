"""Coordinator: which nodes live, which node has which block, and what the nodes' policies have counted together.

May import: protocol, policy (to add statistics up), keys, clock, errors.
Never knows: nodes' internals, clients, ray. It loses nothing that nodes cannot tell it again.
"""
