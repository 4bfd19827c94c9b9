"""Client: what runs in a worker's process: reading from shared memory, storing through sessions, and finding the node again.

May import: protocol, tiers (readers of extents and segments), memory, codecs, keys, layout, blocks, errors, clock, forking, threads.
Never knows: node, coordinator, store, policy, ray, transformers.
"""
