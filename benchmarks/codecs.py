"""The same as `tiered-kv bench codec`: encode and decode of each codec as a ratio to memcpy. Takes its options, such as --json."""

import sys

from tiered_kv.cluster.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "codec", *sys.argv[1:]]))
