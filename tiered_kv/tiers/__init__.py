"""Tiers: places that hold blocks under a hard byte cap, and wrappers round them.

Owns: where in a tier a block's bytes lie, and their way in and out. May import: memory, codecs, blocks, keys, errors.
Must never know: policy, store; which block deserves its place is decided elsewhere.
"""
