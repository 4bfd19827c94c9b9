"""The library API: caches within one process, as code that knows the modular KV-cache parts calls them.

Owns: the settings of such a cache, look-up by prefix, by position and by page, and models with a cache attached. All of it
stands on a node of this process (`tiered_kv.embedded`); there is no second store, policy or codec here.
May import: embedded, client, node, checkpoint, integrations, codecs, tiers.objects, config, keys, layout, blocks, errors, clock;
numpy, torch.
Must never know: ray, actors, cluster, store, other tiers.
"""
