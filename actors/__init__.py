"""Actors: thin Ray actors around node and coordinator, the keeper's access to Ray, and the link that calls other nodes through Ray.

May import: node, coordinator, protocol, config, errors, ray. Must never know: tiers, codecs, policy, store.
Import this folder only as `tiered_kv.actors`, through the symbolic link in `tiered_kv/`.
"""

if __name__ != "tiered_kv.actors":
    raise ImportError(f"must be imported as tiered_kv.actors, got {__name__}: one file must not become two modules")
