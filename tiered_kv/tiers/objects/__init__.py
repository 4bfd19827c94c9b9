"""The objects tier and the packs of checkpoints: immutable packs in a folder or in object storage, and the object stores.

May import: tiers' base and log, codecs, blocks, keys, errors, threads; obstore inside functions.
Never knows: policy, store, which blocks a tier keeps.
"""
