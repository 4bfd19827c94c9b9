"""The same as `tiered-kv bench held`: the hit ratio of the demo's workload with a codec in half the memory.

Takes its options, such as --json.
"""

import sys

from tiered_kv.cluster.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "held", *sys.argv[1:]]))
