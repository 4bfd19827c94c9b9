"""Surveys a cluster, as `tiered-kv status` does, for each line of its input. So no survey waits for an interpreter to start.

python -m tests.faults.surveyor NAME
"""

import json
import sys

from tiered_kv.cluster.survey import survey
from tiered_kv.errors import TieredKVError
from tiered_kv.protocol import unix_socket  # noqa: F401 - imports torch, whose time should not count


def main() -> None:
    """Print a line of JSON for each line of the input: `degraded`, a list of texts, and `nodes`, the ids of those that are listed."""
    for _ in sys.stdin:
        try:
            about = survey(sys.argv[1])
            found = {"degraded": about["degraded"], "nodes": [node["node"] for node in about["nodes"]]}
        except TieredKVError as error:
            found = {"degraded": [str(error)], "nodes": []}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
