"""Runs two nodes, "n0" and "n1", and their coordinator in one process, without Ray.

It prints a line when they serve, and stops when its standard input is closed. Each node leaves a record beside its socket.
"""

import json
import sys

from tiered_kv.config import Config
from tiered_kv.embedded import InProcessCluster
from tiered_kv.protocol.node_record import NodeRecord, write_record
from tiered_kv.protocol.unix_socket import SessionServer


def main() -> None:
    """Run as `python -m tests.vllm.two_nodes '{"host": "64MiB"}' CLUSTER_NAME`."""
    with InProcessCluster(Config.of(json.loads(sys.argv[1])), nodes=2) as cluster:
        servers = []
        for node_id, node in cluster.nodes.items():
            servers.append(SessionServer(f"{node.directory}/sock", node.open_session, node.report_commits))
            write_record(NodeRecord(sys.argv[2], cluster.cluster_id, node_id, node.info()))
        try:
            print("ready", flush=True)
            sys.stdin.read()
        finally:
            for server in servers:
                server.close()


if __name__ == "__main__":
    main()
