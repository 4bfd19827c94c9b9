"""Node: the process that owns the tiers of one machine, serves its workers and its peers, and reports to the coordinator.

May import: protocol, store, tiers, codecs, policy, memory, config, keys, layout, blocks, errors, clock, forking, threads.
Never knows: client, ray, transformers, or who runs it: a Ray actor, a test, or one process by itself.
"""
