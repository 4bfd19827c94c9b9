"""The same as `tiered-kv bench checkpoint`: checkpoints relative to plain calls on the same bytes.

Takes its options, such as --folder.
"""

import sys

from tiered_kv.cluster.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "checkpoint", *sys.argv[1:]]))
