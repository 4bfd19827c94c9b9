"""Demo: the main job shown on real text and a real model, with the proof that outputs do not change.

May import: everything public, integrations, cluster, ray. Nothing but the command line imports it.
Never knows: how blocks are kept; it is a user of the cache like any other.
"""
