"""Ray Serve LLM: two replicas of one model share their prefixes, inside the Ray cluster that `tiered-kv up` started.

Needs vLLM (docs/vllm.md), `pip install 'ray[serve]' pyarrow`, and a cluster: `tiered-kv up --host 4GiB`. Then
`python examples/ray_serve_llm.py [MODEL] [--in-turn]`. MODEL is a folder or a Hugging Face id (default: the demo's model).

Ray's prefix-aware router sends a prompt to the replica that has seen its beginning. The other replica has it from tiered_kv when it
gets the prompt after all, because the first one is busy or has ended. `--in-turn` shows that: each prompt goes to one replica, then to
the other. Ends with the time to the first token, and with how many blocks the cluster has given.
"""

import argparse
import itertools
import json
import os
import statistics
import time
import urllib.request

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.request_router import PrefixCacheAffinityRouter
from ray.serve.request_router import RequestRouter

from tiered_kv.cluster import status, survey
from tiered_kv.cluster.attach import join
from tiered_kv.tools.demo.model import ensure_default_model

PORT = 18000
ANSWER_WITHIN_S = 600
SMALL = {"num_cpus": 0.1}
"""For the actors beside the engines. With the default of one CPU each, Serve would wait for ever on a machine of two cores."""
TOPICS = ["lighthouse", "ferry", "mill", "orchard"]
SENTENCE = "On day {day} the keeper of the {topic} wrote down the weather, the wind first and then the height of the water. "
DAYS = 55  # about 1,400 tokens


class InTurn(RequestRouter):
    """Sends each request to the next replica."""

    def initialize_state(self, **_: object) -> None:
        self._next = itertools.count()

    async def choose_replicas(self, candidate_replicas, pending_request=None):
        replicas = sorted(candidate_replicas, key=lambda replica: str(replica.replica_id))
        return [[replicas[next(self._next) % len(replicas)]]]


def app_of(model: str, router: type) -> serve.Application:
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    config = LLMConfig(
        model_loading_config={"model_id": "demo", "model_source": model},
        deployment_config={
            "autoscaling_config": None,
            "num_replicas": 2,
            "request_router_config": RequestRouterConfig(request_router_class=router),
            "ray_actor_options": SMALL,  # beside the bundle below
        },
        accelerator_config={"kind": "gpu" if has_gpu else "cpu"},
        placement_group_config={"bundles": [{"CPU": 0.5, "GPU": 1} if has_gpu else {"CPU": 0.5}]},
        engine_kwargs={
            "max_model_len": 2048,
            "enforce_eager": True,
            "kv_transfer_config": {"kv_connector": "TieredKV", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"},
        },
        runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONHASHSEED": "0", **seen_by_replicas()}},
    )
    ingress = {"num_replicas": 1, "autoscaling_config": None, "ray_actor_options": SMALL}
    return build_openai_app({"llm_configs": [config], "ingress_deployment_config": ingress})


def seen_by_replicas() -> dict[str, str]:
    """Returns the variables of this process that the replicas need too."""
    names = ("TIERED_KV_STATE", "PYTHONPATH", "HF_HUB_OFFLINE", "VLLM_HOST_IP")
    return {name: os.environ[name] for name in names if name in os.environ}


def first_token_s(prompt: str) -> float:
    """Ask for a few tokens. Returns the seconds until the first one."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 4, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begun_s = time.perf_counter()
    with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as response:
        for line in response:
            if line.startswith(b"data: {") and json.loads(line[6:]).get("choices"):
                return time.perf_counter() - begun_s
    raise RuntimeError("the request gave no token")


def blocks_given() -> int:
    """Returns how many blocks the workers have loaded from the cluster."""
    return status.summarize(survey.survey("default", None))["hit_blocks"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", nargs="?", help="folder or Hugging Face id (default: the demo's model)")
    options.add_argument(
        "--in-turn", action="store_true", help="send each request to the next replica, instead of Ray's prefix-aware router"
    )
    given = options.parse_args()
    model = given.model or str(ensure_default_model(print))
    join("default")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    begun_s = time.monotonic()
    try:
        serve.run(app_of(model, InTurn if given.in_turn else PrefixCacheAffinityRouter))
        print(f"two replicas are ready after {time.monotonic() - begun_s:.0f} s")
        for number in range(2):
            first_token_s(f"Warm up {number}.")
        ratios = []
        for topic in TOPICS:
            prompt = "".join(SENTENCE.format(day=day, topic=topic) for day in range(DAYS))
            before = blocks_given()
            cold_s, second_s = first_token_s(prompt), first_token_s(prompt)
            time.sleep(1.0)  # nodes report their figures at each heartbeat
            ratios.append(second_s / cold_s)
            print(
                f"{topic}: first token after {cold_s:.2f} s; asked again {second_s:.2f} s ({ratios[-1]:.2f} of cold),"
                f" {blocks_given() - before} blocks from the cluster"
            )
        print(f"median: {statistics.median(ratios):.2f} of cold; load of this machine {os.getloadavg()[0]:.1f}")
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
