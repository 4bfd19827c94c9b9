"""Tiers: kinds of storage for blocks, each under a hard cap in bytes, and wrappers around them.

Owns: where the bytes of a block are in a tier, and reading and writing them.
May import: memory, codecs, blocks, keys, errors.
Must never know: policy, store. These decide which blocks a tier keeps.
"""
