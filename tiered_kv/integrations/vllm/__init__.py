"""vLLM uses a cluster as a second prefix cache: `"kv_connector": "TieredKV"` in its `--kv-transfer-config` (docs/vllm.md).

The scheduler's side looks blocks up, and the workers' side copies them. Both use the node's shared memory. They may import the client and
`cluster.attach`, but never ray, node or coordinator. Once the engine runs, no method that vLLM calls (a hook) may raise an exception.
"""


def register() -> None:
    """Make the connector known to vLLM under the name TieredKV. vLLM calls this in each of its processes (entry point group)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "TieredKV" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector("TieredKV", "tiered_kv.integrations.vllm.connector", "TieredKV")
