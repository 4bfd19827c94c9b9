"""Protocol: what worker, node and coordinator say to each other: calls, records, and their form on a socket.

May import: tiers.host (the shape of an extent), memory, policy-free vocabulary: keys, layout, blocks, errors, clock, forking.
Never knows: how any of the three does what it is asked for.
"""
