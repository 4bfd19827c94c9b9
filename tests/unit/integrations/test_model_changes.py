"""A model that changes while its KV is cached: results equal the plain model's, and old blocks are hits when it changes back."""

import copy
import importlib.util
import logging

import pytest
import torch
import transformers
from model_changes import CHANGES, STATIC, RealPeft, StandIn, layer, part_in_training
from tiny_models import DictClient, prompt_of, tiny

import tiered_kv
from tiered_kv import Namespace
from tiered_kv.errors import Kind
from tiered_kv.integrations.modelstate import ModelState
from tiered_kv.integrations.support import check_supported
from tiered_kv.integrations.transformers import CachedModel

BLOCK = 8
WANTED = dict(do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
PROMPT = prompt_of(3 * BLOCK + 2)
HAS_PEFT = importlib.util.find_spec("peft") is not None
ADAPTERS = [StandIn, pytest.param(RealPeft, marks=pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed"))]


@pytest.fixture
def served(checked):
    """`served(model)` returns the model with a real client."""

    def make(model):
        layout = check_supported(model).layout(BLOCK)
        client = checked(tiered_kv.open({"host": "8MiB"}, layout=layout, namespace=Namespace.of(model)))
        return CachedModel(model, client)

    return make


def assert_as_plain(cached, reused=None):
    plain = cached.model.generate(PROMPT, **WANTED)
    output = cached.generate(PROMPT, **WANTED)
    assert torch.equal(output.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    if reused is not None:
        assert cached.last_report.reused_tokens == reused


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_never_reuses_its_old_kv(change, served):
    model = tiny()
    cached = served(model)
    assert_as_plain(cached, 0)
    assert_as_plain(cached, 3 * BLOCK)
    before = cached.client.namespace
    undo = CHANGES[change](model)
    try:
        assert_as_plain(cached, 0)
        assert_as_plain(cached, 3 * BLOCK)
        assert cached.client.namespace != before
    finally:
        if undo:
            undo()
    if undo:
        assert_as_plain(cached, 3 * BLOCK)
        assert cached.client.namespace == before


@pytest.mark.parametrize("moment", ["fetch", "store"])
def test_two_models_on_one_client_never_meet_each_others_kv(moment, served, monkeypatch):
    """Also where the other one's request, of another thread, comes between the check of the model and the fetch or the store."""
    first = served(tiny())
    second = CachedModel(tiny(seed=5), first.client)
    for cached in (first, second):
        assert_as_plain(cached, 0)
        assert_as_plain(cached, 3 * BLOCK)
    first.client.new_epoch()
    call = getattr(first.client, moment)

    def late(*arguments, **options):
        (second if late.cached is first else first).ready()
        return call(*arguments, **options)

    monkeypatch.setattr(first.client, moment, late)
    for reused in (0, 3 * BLOCK):
        for late.cached in (first, second):
            assert_as_plain(late.cached, reused)


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_switching_adapters_at_every_request(adapters, served, monkeypatch):
    lora = adapters(tiny())
    cached = served(lora.model)
    for name in ("first", "second"):
        lora.set_adapter(name)
        assert_as_plain(cached, 0)
        with lora.disable_adapter():
            assert_as_plain(cached, 0)
    namespaces = set()
    monkeypatch.setattr("tiered_kv.integrations.modelstate.content_of", lambda *_: pytest.fail("the weights were read again"))
    for name in ("first", "second", "first"):
        lora.set_adapter(name)
        assert_as_plain(cached, 3 * BLOCK)
        namespaces.add(cached.client.namespace)
        with lora.disable_adapter():
            assert_as_plain(cached, 3 * BLOCK)
            namespaces.add(cached.client.namespace)
    assert len(namespaces) == 4


@pytest.mark.parametrize("adapters", ADAPTERS)
@pytest.mark.parametrize("change", ["scale_layer", "disable_adapter_layers", "merged"])
def test_scaling_or_disabling_adapters(adapters, change, served):
    lora = adapters(tiny())
    cached = served(lora.model)
    assert_as_plain(cached, 0)
    if change == "scale_layer":
        for each in lora.layers:
            each.scale_layer(3.0)
    elif change == "merged" and adapters is RealPeft:
        lora.model.merge_adapter()
    elif change == "merged":
        with torch.no_grad():
            for each in lora.layers:
                each.base_layer.weight += 2 * each.lora_B["first"].weight @ each.lora_A["first"].weight
        lora.enable(False)
    else:
        lora.enable(False)
    assert_as_plain(cached, 0)
    assert_as_plain(cached, 3 * BLOCK)


def test_a_model_with_a_new_dtype_runs_without_the_old_dtypes_cache(served):
    model = tiny()
    cached = served(model)
    assert_as_plain(cached, 0)
    model.double()
    assert_as_plain(cached, 0)
    assert_as_plain(cached, 0)
    model.float()
    assert_as_plain(cached)


def test_a_model_with_a_module_in_training_mode_runs_without_the_cache(served):
    model = tiny()
    cached = served(model)
    assert_as_plain(cached, 0)
    part_in_training(model)
    cached.generate(PROMPT, **WANTED)
    assert cached.last_report.reused_tokens == 0
    assert cached.last_report.stored.new == 0


def test_a_request_during_which_the_model_changes_stores_nothing(served):
    model = tiny()
    cached = served(model)

    class Writer:
        def put(self, value):
            with torch.no_grad():
                layer(model).self_attn.k_proj.weight.mul_(1.01)

        def end(self):
            pass

    cached.generate(PROMPT, streamer=Writer(), **WANTED)
    assert cached.last_report.stored.new == 0


def test_an_unsupported_state_runs_without_the_cache(served, caplog):
    model = tiny()
    cached = served(model)
    assert_as_plain(cached, 0)
    model.model.rotary_emb.rope_type = "dynamic"
    layer(model).mlp.act_fn = torch.nn.Tanh().eval()
    with caplog.at_level(logging.WARNING):
        plain = copy.deepcopy(model).generate(PROMPT, **WANTED)
        for _ in range(2):
            output = cached.generate(PROMPT, **WANTED)
            assert torch.equal(torch.stack(plain.logits), torch.stack(output.logits))
            assert cached.last_report.reused_tokens == 0
    assert len([each for each in caplog.records if "rope type" in each.message]) == 1


def test_a_counter_that_every_run_increases_is_no_change(served):
    class Counting(torch.nn.Tanh):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = tiny()
    layer(model).mlp.act_fn = Counting().eval()
    layout = check_supported(model).layout(BLOCK)
    state = ModelState(model)
    client = DictClient(model, layout, state.as_namespace())
    client.followed = state
    cached = CachedModel(model, client)
    assert_as_plain(cached, 0)
    assert_as_plain(cached, 3 * BLOCK)


def test_a_client_with_a_fixed_namespace_serves_only_its_first_state():
    model = tiny()
    client = DictClient(model, check_supported(model).layout(BLOCK))

    class Fixed:
        layout, fetch, store, note_prefill = client.layout, client.fetch, client.store, client.note_prefill

    cached = CachedModel(model, Fixed())
    assert_as_plain(cached, 0)
    assert_as_plain(cached, 3 * BLOCK)
    CHANGES["in place"](model)
    assert_as_plain(cached, 0)
    assert_as_plain(cached, 0)


def test_a_callers_epochs_are_shared_until_the_weight_epoch_is_raised(served):
    model, other = tiny(), tiny()
    cached = served(model)
    second = CachedModel(other, cached.client)
    assert_as_plain(cached, 0)
    assert_as_plain(second, 3 * BLOCK)
    layer(model).self_attn.k_proj.weight.data.mul_(2)  # torch does not record this write
    assert cached.client.new_epoch(7) == 7
    assert_as_plain(cached, 0)
    layer(other).self_attn.k_proj.weight.data.mul_(2)
    assert_as_plain(second, 3 * BLOCK)
    cached.client.new_epoch(8)
    assert_as_plain(cached, 0)
    cached.client.new_epoch(7)
    assert_as_plain(cached, 3 * BLOCK)
    numbers = [cached.client.new_epoch() for _ in range(3)]
    assert numbers == sorted({*numbers})
    for number in (8, 7):
        cached.client.new_epoch(number)
        assert_as_plain(cached, 0)


# --- changes that are detected when a namespace is created


@pytest.mark.parametrize("change", STATIC)
def test_a_change_of_kv_changes_the_namespace(change):
    plain, changed = tiny(), tiny()
    undo = STATIC[change](changed)
    assert Namespace.of(plain).digest == Namespace.of(tiny()).digest
    assert Namespace.of(changed).digest != Namespace.of(plain).digest
    if undo:
        undo()
        assert Namespace.of(changed).digest == Namespace.of(plain).digest


def test_foreign_code_gets_a_private_variant_and_a_log_entry(caplog):
    namespaces = []
    with caplog.at_level(logging.WARNING):
        for change in ("a hook", "a patched forward"):
            for _ in range(2):
                model = tiny()
                STATIC[change](model)
                namespaces.append(Namespace.of(model))
    assert len({each.digest for each in namespaces}) == 4
    assert all(each.variant.startswith("private ") for each in namespaces)
    assert "a forward hook of model.layers.0 (" in caplog.text
    assert "model.layers.0.mlp.forward, replaced by" in caplog.text


def test_a_hook_that_claims_to_be_a_frameworks_is_foreign():
    model = tiny()

    def steering(module, given, output):
        return output + 1

    steering.__module__ = "transformers.models.llama"
    layer(model).register_forward_hook(steering)
    assert Namespace.of(model).variant.startswith("private ")
    other = tiny()
    layer(other).mlp.forward = torch.no_grad()(lambda x: x)
    assert Namespace.of(other).variant.startswith("private ")


def test_accelerates_device_placement_is_no_change():
    accelerate = pytest.importorskip("accelerate")
    plain, placed = tiny(), tiny()
    placed = accelerate.dispatch_model(placed, device_map={"": "cpu"}, force_hooks=True)
    for module in placed.modules():
        if not hasattr(module, "_hf_hook"):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert Namespace.of(placed) == Namespace.of(plain)
    accelerate.hooks.add_hook_to_module(layer(placed).mlp, accelerate.hooks.ModelHook())
    assert Namespace.of(placed).variant.startswith("private ")


def test_frameworks_own_hooks_are_no_change():
    model = tiny()
    before = Namespace.of(model)
    with torch.no_grad():
        model(PROMPT, output_hidden_states=True, output_attentions=True)  # transformers sets hooks to record these
    assert Namespace.of(model) == before


def test_an_empty_variant_keeps_the_keys_of_older_versions():
    assert Namespace("w").digest == Namespace("w", variant="").digest != Namespace("w", variant="x").digest
    with pytest.raises(tiered_kv.TieredKVError, match="variant must be a text") as caught:
        Namespace("w", variant=None)
    assert caught.value.kind is Kind.CONFIG


def test_running_a_model_does_not_change_its_namespace():
    for family in ("llama", "gpt2"):
        model = tiny(family)
        before = Namespace.of(model)
        model.generate(PROMPT, **WANTED)
        assert Namespace.of(model) == before == ModelState(model).as_namespace()
    assert transformers.__version__
