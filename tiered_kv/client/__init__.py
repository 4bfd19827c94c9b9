"""Client: the part that runs in a worker's process. It reads shared memory, stores through sessions, and reconnects to its node.

May import: protocol, tiers (readers of extents and segments), memory, codecs, keys, layout, blocks, errors, clock, forking, threads.
Must never know: node, coordinator, store, policy, ray, transformers.
"""
