"""What looking at a model costs a request, what attaching costs, and how far probes are apart; on this machine's CPU.

    python benchmarks/model_check.py [--json FILE] [--model default]

`check`: a llama of 302 tensors in 436 modules, the smallest of many repeats (other work on the machine only adds). `request` is what
`CachedModel` does for one request: the whole check, and that no tensor was written to before it stores. `attach`: the parts of
attaching to the model named, in seconds. `probes`: `Probe.distance` of the same weights computed in other ways, and of changed ones;
1 is the tolerance.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tiered_kv.identity import Sums, tensors_digest, walk_model
from tiered_kv.integrations.modelstate import ModelState
from tiered_kv.integrations.probing import probe_of
from tiered_kv.integrations.support import examine
from tiered_kv.integrations.watch import Watch
from tiered_kv.keys import Namespace
from tiered_kv.protocol.probes import Probe
from tiered_kv.tools.bench.fetch import machine
from tiered_kv.tools.demo.model import load_model

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = dict(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=33, num_attention_heads=2, num_key_value_heads=1)


class Still:
    """A client that is of the model's namespace."""

    namespace = Namespace("still")

    def use(self, namespace: Namespace) -> None:
        """As a client's."""
        self.namespace = namespace

    def variant_of(self, namespace: Namespace, probe: Probe) -> str:
        """As a client's, of the first worker."""
        return ""


def smallest_us(function: Callable[[], Any], repeats: int = 2000) -> float:
    """The smallest time of one call, of five in a row, in microseconds."""
    best_s = float("inf")
    for _ in range(repeats):
        begun_s = time.perf_counter()
        for _ in range(5):
            function()
        best_s = min(best_s, (time.perf_counter() - begun_s) / 5)
    return round(best_s * 1e6, 1)


def check() -> dict[str, float]:
    """What the parts of the check cost, in microseconds."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    state, client = ModelState(model), Still()
    watch = state.now().watch
    state.adopt(client)

    def request() -> None:
        assert state.adopt(client)
        assert watch.is_unwritten()

    return {
        "tensors": len(watch.tensors),
        "modules": len(watch.modules),
        "holds_us": smallest_us(watch.holds),
        "request_us": smallest_us(request),
        "watch_us": smallest_us(lambda: Watch(model), 20),
    }


def seconds(function: Callable[[], Any]) -> float:
    """What one call takes, the second time."""
    function()
    begun_s = time.perf_counter()
    function()
    return round(time.perf_counter() - begun_s, 4)


def attaching(model: Any) -> dict[str, float]:
    """What the parts of attaching to a model take, in seconds."""
    state, sums = model.state_dict(keep_vars=True), Sums()
    _, cache = examine(model)
    return {
        "examine_s": seconds(lambda: examine(model)),
        "probe_s": seconds(lambda: probe_of(cache)),
        "walk_s": seconds(lambda: walk_model(model)),
        "digest_s": seconds(lambda: tensors_digest(state)),
        "digest_known_s": seconds(lambda: tensors_digest(state, sums)),
        "probe_bytes": len(probe_of(cache).vector),
    }


def probes(name: str | None) -> list[dict]:
    """How far probes of one model are apart, by dtype: computed in other ways, and with one number changed."""
    found = []
    for dtype in DTYPES:
        model = load_model(name, dtype)[0]
        first, threads = probe_of(examine(model)[1]), torch.get_num_threads()
        apart: dict[str, float] = {}

        def note(what: str, model: Any = model, first: Probe = first, apart: dict = apart) -> None:
            apart[what] = round(first.distance(probe_of(examine(model)[1])), 3)

        torch.set_num_threads(1)
        note("one thread")
        torch.set_num_threads(threads)
        with torch.backends.mkldnn.flags(enabled=False):
            note("without oneDNN")
        model.set_attn_implementation("eager")
        note("eager attention")
        model.set_attn_implementation("sdpa")
        for attribute in ("attention_scaling", "scaling"):
            module = next(each for each in model.modules() if isinstance(getattr(each, attribute, None), float))
            before = getattr(module, attribute)
            setattr(module, attribute, before * 1.1)
            note(f"{attribute} × 1.1")
            setattr(module, attribute, before)
        found.append({"dtype": str(dtype).removeprefix("torch."), "distance": apart})
    return found


def main() -> None:
    """Measure, print, and write a file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    report = {
        "machine": machine(),
        "check": check(),
        "attach": attaching(load_model(given.model, torch.bfloat16)[0]),
        "probes": probes(given.model),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
