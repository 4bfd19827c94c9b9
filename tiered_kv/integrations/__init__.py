"""Engines: how the KV of a model that others wrote comes into the cache and out of it.

May import client, protocol, layout, keys, blocks, clock, errors, torch and the engine that a module is named after.
Must never know ray (but for a module made for it), tiers, codecs or policy.
"""
