"""Integrations with inference engines: move the KV of other libraries' models into the cache and out of it.

May import client, protocol, layout, keys, blocks, clock, errors, torch, and the engine that a module is named after.
Must never know ray (except in a module made for it), tiers, codecs or policy.
"""
