"""Bench: what the cache costs on this machine, always beside a memcpy of the same bytes in the same run.

May import: everything public, service, cluster, ray. Nothing but the command line imports it.
Never knows: how blocks are kept; it measures what a worker sees.
"""
