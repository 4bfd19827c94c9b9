"""Owns the life of a cluster on machines: its state file, starting, joining and stopping Ray, the command line.

May import actors, service, ops, config, errors; psutil; ray only inside functions that need it.
Must never import torch, and must never touch a process or a file that it did not start or write itself.
"""

if __name__ != "tiered_kv.cluster":
    raise ImportError(f"import this package as tiered_kv.cluster, not as {__name__}")
