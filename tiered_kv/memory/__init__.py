"""Memory: a node's blocks in shared memory. Owns the arena's extents, the index with its seqlock, and the view that readers use.

May import: layout, keys, blocks, errors; torch, numpy, msgpack and psutil.
Never knows: policy, codecs, tiers, ray. One process writes the index, any number of processes read it.
"""
