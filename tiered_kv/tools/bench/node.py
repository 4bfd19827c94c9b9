"""Runs a node in its own process, without Ray.

The process prints the node's info as one line of JSON, and stops when its standard input is closed. It writes a node record
beside the socket, as a cluster's node does, with the given cluster name.
"""

import json
import sys

from tiered_kv.config import Config
from tiered_kv.node.node import Node
from tiered_kv.protocol.node_record import NodeRecord, write_record
from tiered_kv.protocol.unix_socket import SessionServer


def main() -> None:
    """Run as `python -m tiered_kv.tools.bench.node CONFIG CLUSTER_ID [CLUSTER_NAME]`. CONFIG is JSON, such as '{"host": "1GiB"}'."""
    node = Node(Config.of(json.loads(sys.argv[1])), sys.argv[2], "bench")
    server = SessionServer(f"{node.directory}/sock", node.open_session, node.report_commits)
    write_record(NodeRecord(sys.argv[3] if len(sys.argv) > 3 else sys.argv[2], sys.argv[2], "bench", node.info()))
    try:
        print(json.dumps(node.info()), flush=True)
        sys.stdin.read()
    finally:
        server.close()
        node.close(remove=True)


if __name__ == "__main__":
    main()
