"""The library API: classes for caches within one process, for use without a cluster.

Owns: the settings of such a cache, look-up by prefix, by position and by page, and models with a cache attached. All of them
use a node in this process (`tiered_kv.embedded`), with its store machine, policies and codecs.
May import: embedded, client, node, checkpoint, integrations, codecs, tiers.objects, config, keys, layout, blocks, errors, clock;
numpy, torch.
Must never know: ray, actors, cluster, store, other tiers.
"""
