"""Benchmarks of the cache on this machine. Each figure is compared with a baseline (memcpy, plain calls) in the same run.

May import: everything public, node, client, cluster, ray. Only the command line imports it.
Never knows: how blocks are stored. It measures what a worker sees.
"""
