"""The command line: one module for each command of `tiered-kv`, and what they share.

May import: cluster, actors, checkpoint, config, errors; tools, torch and ray only inside functions that need them.
Never knows: how nodes do their work.
"""
