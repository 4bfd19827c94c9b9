"""Probes of a model: they show changes that digests miss, and rounding does not separate replicas."""

import logging

import pytest
import torch
from model_changes import CHANGES, STATIC, layer
from tiny_models import prompt_of, tiny

from tiered_kv import Config
from tiered_kv.embedded import InProcessCluster
from tiered_kv.integrations.modelstate import ModelState
from tiered_kv.integrations.probing import probe_of
from tiered_kv.integrations.support import examine
from tiered_kv.integrations.transformers import CachedModel

FAMILIES = ("llama", "qwen2", "gpt2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 8


def probe(model):
    return probe_of(examine(model)[1])


@pytest.mark.parametrize("change", STATIC)
def test_probes_show_changes_that_digests_miss(change):
    model = tiny()
    before = probe(model)
    STATIC[change](model)
    assert before.distance(probe(model)) > 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_within_the_tolerance(family, dtype):
    model = tiny(family, dtype)
    before, threads = probe(model), torch.get_num_threads()
    try:
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert before.distance(probe(model)) < 0.7
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_probes_show_a_change_of_any_layer_except_the_last_layers_output(dtype):
    before = probe(tiny(dtype=dtype))
    for number in range(3):
        model = tiny(dtype=dtype)
        with torch.no_grad():
            layer(model, number).self_attn.v_proj.weight.mul_(1.2)
        assert before.distance(probe(model)) > 1


def test_the_probe_is_small():
    assert len(probe(tiny(num_hidden_layers=40)).vector) <= 16 << 10


@pytest.fixture
def cluster(checked):
    return checked(InProcessCluster(Config.of({"host": "8MiB", "heartbeat_s": 1000.0}), 2))


def attached(cluster, node, model, checked):
    """Returns a client as `tiered_kv.attach` creates it."""
    state = ModelState(model)
    client = checked(cluster.client(node, state.now().shape.layout(BLOCK), state.as_namespace()))
    client.followed = state
    assert state.adopt(client)
    return client


def answers(model, client):
    cached = CachedModel(model, client)
    output = cached.generate(prompt_of(3 * BLOCK + 2), do_sample=False, max_new_tokens=4)
    return output, cached.last_report.reused_tokens


@pytest.mark.parametrize("nodes", [("n0", "n0"), ("n0", "n1")])
def test_models_with_equal_digests_and_different_kv_share_no_blocks(nodes, cluster, checked, monkeypatch, caplog):
    """One process has other code for a class, as after a package update. Only the probe can detect that."""
    plain, other, third = tiny(), tiny(), tiny()
    first = attached(cluster, nodes[0], plain, checked)
    _, reused = answers(plain, first)
    assert reused == 0
    cluster.report_all()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        kind = type(layer(other).mlp)
        code = kind.forward

        def forward(self, x):
            return code(self, x) * 2

        forward.__qualname__ = code.__qualname__
        monkeypatch.setitem(forward.__globals__, "__name__", code.__globals__["__name__"])
        patch.setattr(kind, "forward", forward)
        second = attached(cluster, nodes[1], other, checked)
        assert second.namespace.variant
        assert "this model's KV of a few fixed tokens differs" in caplog.text
        plainly = other.generate(prompt_of(3 * BLOCK + 2), do_sample=False, max_new_tokens=4)
        output, reused = answers(other, second)
        assert reused == 0
        assert torch.equal(output, plainly)
        again = attached(cluster, nodes[0], third, checked)
        assert again.namespace == second.namespace, "workers with equal KV share a namespace"
        cluster.report_all()
        assert answers(third, again)[1] == 3 * BLOCK
    assert attached(cluster, nodes[1], tiny(), checked).namespace == first.namespace


def test_a_model_attached_while_the_node_is_down_is_served_when_it_returns(cluster, checked):
    model = tiny()
    state = ModelState(model)
    client = checked(cluster.client("n0", state.now().shape.layout(BLOCK), state.as_namespace()))
    client.followed = state
    cluster.nodes["n0"].close(remove=False)
    assert state.adopt(client) is None
    cluster.start_node("n0")
    client._pool._retry_at_s = float("-inf")
    assert state.adopt(client)
    assert client.namespace.variant == ""


def test_hooked_models_need_no_probe(cluster, checked):
    model = tiny()
    CHANGES["a hook"](model)
    client = attached(cluster, "n0", model, checked)
    assert client.namespace.variant.startswith("private ")
