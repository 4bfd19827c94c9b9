"""Runs a node in its own process, without Ray.

It prints its info as one line of JSON, and stops when its standard input is closed.
"""

import json
import sys

from tiered_kv.config import Config
from tiered_kv.service.local import SessionServer
from tiered_kv.service.node import Node


def main() -> None:
    """Run as `python -m tiered_kv.bench.node '{"host": "1GiB"}' CLUSTER_ID`; the first argument is the node's config."""
    node = Node(Config.of(json.loads(sys.argv[1])), sys.argv[2], "bench")
    server = SessionServer(f"{node.directory}/sock", node.open_session, node.catch_up)
    try:
        print(json.dumps(node.info()), flush=True)
        sys.stdin.read()
    finally:
        server.close()
        node.close(remove=True)


if __name__ == "__main__":
    main()
