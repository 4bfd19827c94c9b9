"""Simulator: replays request traces against eviction policies. Owns the trace reader, the replay, the offline optimum and their report.

May import: policy, store, blocks, errors; numpy, zstandard, rich, matplotlib (inside functions).
Must never know: torch, ray, tiers, node, client. Only the command line imports it.
"""
