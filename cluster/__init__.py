"""Starts, inspects and stops clusters on real machines: state files, starting, joining and stopping Ray, and the command line.

May import actors, client, node, protocol, checkpoint, config, errors; psutil; ray only inside functions that need it.
Must never import torch. Must never touch a process that it did not start, or a file that it did not write.
"""

if __name__ != "tiered_kv.cluster":
    raise ImportError(f"import this package as tiered_kv.cluster, not as {__name__}")
