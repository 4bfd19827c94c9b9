"""Service: node, coordinator, directory and client as plain Python, and the transports that need no Ray.

May import: store, tiers, codecs, policy, memory, config, keys, layout, errors, clock.
Never knows: ray, transformers, or who runs it: a Ray actor, a test, or one process by itself.
"""
