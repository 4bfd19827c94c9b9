"""The library API: caches within one process, with the classes of the modular KV-cache library.

<<<<<<< HEAD
Owns: the settings of such a cache, look-up by prefix, by position and by page, and models with a cache attached. All of them
use a node in this process (`tiered_kv.embedded`). There is no second store, policy or codec here.
=======
Owns: the settings of such a cache, look-up by prefix, by position and by page, and models with a cache attached. All of it
stands on a node of this process (`tiered_kv.embedded`); there is no second store, policy or codec here.
>>>>>>> l7
May import: embedded, client, node, checkpoint, integrations, codecs, tiers.objects, config, keys, layout, blocks, errors, clock;
numpy, torch.
Must never know: ray, actors, cluster, store, other tiers.
"""
