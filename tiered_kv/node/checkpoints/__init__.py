"""A node's part of checkpoints: writing its blocks into packs, loading packs that were mounted, and resharding tensor-parallel ranks.

May import: node's other modules, tiers, codecs, layout, keys, errors. Driven step by step by `tiered_kv.checkpoint`.
Never knows: manifests, which nodes there are, or why a checkpoint is taken.
"""
