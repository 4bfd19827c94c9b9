"""A node's part of checkpoints: writes its blocks to packs, loads blocks of mounted packs, and reshards tensor-parallel ranks.

May import: node's other modules, tiers, codecs, layout, keys, errors. `tiered_kv.checkpoint` drives it by the requests in `steps`.
Never knows: manifests, other nodes, or the purpose of a checkpoint.
"""
