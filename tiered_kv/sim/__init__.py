"""Sim: replays request traces against eviction policies. Owns the trace reader, the replay, the offline optimum, and their report.

May import: policy, store, blocks, errors; numpy, zstandard, rich, matplotlib (inside functions).
Never knows: torch, ray, tiers, service. Imported by the command line only.
"""
