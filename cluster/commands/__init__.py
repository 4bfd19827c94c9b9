"""The command line: modules with the commands of `tiered-kv`, and the code that they share.

May import: cluster, actors, checkpoint, config, errors; tools, torch and ray only inside functions that need them.
Never knows: how nodes do their work.
"""
