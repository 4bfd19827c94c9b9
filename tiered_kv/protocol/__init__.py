"""Protocol: the calls and records between worker, node and coordinator, and their encoding on a socket.

May import: tiers.host (the layout of an extent), memory, keys, layout, blocks, errors, clock, forking.
Must never know: how worker, node or coordinator carry out a call.
"""
