"""The same as `tiered-kv bench fetch`: look-up, fetch and store as a ratio to memcpy. Takes its options, such as --json."""

import sys

from tiered_kv.cluster.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "fetch", *sys.argv[1:]]))
