"""Actors: thin Ray shells round node and coordinator, and the link that reaches other nodes through Ray.

May import: node, coordinator, protocol, config, errors, ray. Never knows: tiers, codecs, policy, store.
The folder is imported as `tiered_kv.actors` only, through the link in `tiered_kv/`.
"""

if __name__ != "tiered_kv.actors":
    raise ImportError(f"import tiered_kv.actors, not {__name__}: one file must not become two modules")
