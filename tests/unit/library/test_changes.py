"""A model that changes while a cache in this process is attached: the same changes and checks as for a cluster's client."""

import pytest
import torch
from library_config import BLOCK, GREEDY
from model_changes import CHANGES, StandIn
from tiny_models import prompt_of, tiny

WANTED = dict(GREEDY, return_dict_in_generate=True, output_logits=True)
PROMPT = prompt_of(3 * BLOCK + 2)


def assert_as_plain(cache, model, reused):
    cache.detach()
    plain = model.generate(PROMPT, **WANTED)
    cache.attach()
    output = model.generate(PROMPT, **WANTED)
    assert torch.equal(output.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert cache.last_report.reused_tokens == reused


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_never_reuses_its_old_kv(change, attached):
    model = tiny()
    cache = attached(model)
    for reused in (0, 3 * BLOCK):
        assert_as_plain(cache, model, reused)
    undo = CHANGES[change](model)
    try:
        for reused in (0, 3 * BLOCK):
            assert_as_plain(cache, model, reused)
    finally:
        if undo:
            undo()
    if undo:
        assert_as_plain(cache, model, 3 * BLOCK)


def test_switching_and_scaling_adapters_separates_their_blocks(attached):
    model = tiny()
    lora = StandIn(model)
    cache = attached(model)
    assert_as_plain(cache, model, 0)
    with lora.disable_adapter():
        assert_as_plain(cache, model, 0)
    assert_as_plain(cache, model, 3 * BLOCK)
    lora.set_adapter("second")
    assert_as_plain(cache, model, 0)
    for each in lora.layers:
        each.scale_layer(2.0)
    assert_as_plain(cache, model, 0)
    lora.set_adapter("first")
    assert_as_plain(cache, model, 0)  # the other adapter's scaling is part of the model's state, so this is a miss, never a wrong block


@pytest.mark.parametrize("change", ["in place", "a hook", "another dtype"])
def test_forward_reuses_no_kv_of_the_model_before_a_change(change, attached):
    model = tiny()
    cache = attached(model)
    with torch.no_grad():
        for _ in range(2):
            model(PROMPT, logits_to_keep=1)
        model.double() if change == "another dtype" else CHANGES[change](model)
        output = [model(PROMPT, logits_to_keep=1).logits for _ in range(3)]
        cache.detach()
        for each in output:
            torch.testing.assert_close(each, model(PROMPT, logits_to_keep=1).logits, rtol=1e-4, atol=1e-4)
