"""The disk tier: append-only segments of frames with footers, their recovery, and ownership of a folder.

May import: tiers' base and log, memory, codecs, blocks, keys, errors, forking, threads.
Never knows: policy, store, which blocks a tier keeps.
"""
