"""Memory: a node's blocks in shared memory. Owns the arena's extents, the index and its seqlock, and the readers' view.

May import: layout, keys, blocks, errors; torch, numpy, msgpack and psutil.
Never knows: policy, codecs, tiers, ray. One process writes the index, any number of processes read it.
"""
