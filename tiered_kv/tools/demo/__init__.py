"""The demo: model replicas share prefixes of real documents, and their outputs are compared with runs without the cache.

May import: everything public, integrations, cluster, ray. Only the command line imports it.
Never knows: how blocks are stored. It uses the cache as any user does.
"""
