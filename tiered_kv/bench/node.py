"""A node in a process of its own, without Ray: prints its info as one line of JSON, ends when its standard input does."""

import json
import sys

from tiered_kv.config import Config
from tiered_kv.service.local import SessionServer
from tiered_kv.service.node import Node


def main() -> None:
    """`python -m tiered_kv.bench.node '{"host": "1GiB"}' CLUSTER_ID`."""
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
