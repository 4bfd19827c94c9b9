"""generate with prefixes from the cache: equal output, fewer computed tokens, and no request fails because of the cache."""

import logging
from dataclasses import replace

import pytest
import torch
import transformers
from tiny_models import DictClient, prompt_of, tiny

from tiered_kv.blocks import Fetched, Stored
from tiered_kv.clock import ManualClock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.transformers import CachedModel, cache_from_kv, check_supported, kv_from_cache, kv_pairs

BLOCK = 8
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
GREEDY = dict(do_sample=False, max_new_tokens=5)


def served(model, **options):
    shape = check_supported(model)
    client = DictClient(model, shape.layout(BLOCK))
    return CachedModel(model, client, shape=shape, **options), client


def tokens_run(model):
    """Returns a list to which every forward pass of the model appends its number of tokens."""
    runs = []
    model.register_forward_pre_hook(lambda module, args, kwargs: runs.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    return runs


def filled_cache(model, tokens):
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt_of(tokens), past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical_and_copies_nothing(family, dtype):
    model = tiny(family, dtype)
    cache = filled_cache(model, 20)
    kv = kv_from_cache(cache, 0, 20)
    assert kv.shape == check_supported(model).layout().kv_shape(20)
    again = cache_from_kv(kv, model.config)
    assert again.get_seq_length() == 20
    for number, (before, after) in enumerate(zip(cache.layers, again.layers, strict=True)):
        assert torch.equal(before.keys, after.keys)
        assert torch.equal(before.values, after.values)
        assert after.keys.data_ptr() == kv[number, 0].data_ptr()
        assert after.values.data_ptr() == kv[number, 1].data_ptr()
    for layer, (keys, values) in zip(again.layers, kv_pairs(again, 3, 11), strict=True):
        assert keys.data_ptr() == layer.keys[0, :, 3:].data_ptr()
        assert torch.equal(values, layer.values[0, :, 3:11])
    assert torch.equal(kv_from_cache(again, 3, 11), kv[..., 3:11, :])


def test_converting_tokens_outside_the_cache_raises():
    model = tiny()
    with pytest.raises(TieredKVError, match="within the 4 tokens") as caught:
        kv_pairs(filled_cache(model, 4), 0, 5)
    assert caught.value.kind == Kind.LAYOUT
    with pytest.raises(TieredKVError, match="no shape"):
        kv_pairs(transformers.DynamicCache(config=model.config), 0, 0)
    with pytest.raises(TieredKVError, match=r"must have the shape \(3, 2"):
        cache_from_kv(torch.zeros(2, 2, 2, 4, 8), model.config)
    assert cache_from_kv(torch.zeros(3, 2, 2, 0, 8), model.config).get_seq_length() == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1, 4 * BLOCK - 1])
def test_reuse_changes_no_token_and_logits_only_by_rounding(family, tokens):
    model = tiny(family)
    prompt = prompt_of(tokens)
    wanted = dict(GREEDY, return_dict_in_generate=True, output_logits=True)
    plain = model.generate(prompt, **wanted)
    runs = tokens_run(model)
    cached, _ = served(model, store_generated=False)
    runs.clear()
    cold = cached.generate(prompt, **wanted)
    assert runs == [tokens, 1, 1, 1, 1]
    assert cached.last_report.stored == Stored(tokens // BLOCK, 0, 0)
    runs.clear()
    warm = cached.generate(prompt, **wanted)
    reused = min(tokens // BLOCK * BLOCK, tokens - 1)
    assert runs == [tokens - reused, 1, 1, 1, 1]
    report = cached.last_report
    assert (report.prompt_tokens, report.reused_tokens, report.computed_prompt_tokens) == (tokens, reused, tokens - reused)
    assert sum(report.reused_tokens_by_tier.values()) == reused
    assert report.generated_tokens == 5
    assert report.stored == Stored(0, 0, 0)
    assert torch.equal(plain.sequences, cold.sequences)
    assert torch.equal(plain.sequences, warm.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(warm.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_equals_the_models_own_cropped_cache(family):
    model = tiny(family, torch.bfloat16)
    cached, _ = served(model)
    prompt = prompt_of(2 * BLOCK + 3)
    cached.generate(prompt, **GREEDY)
    own = filled_cache(model, prompt.shape[1])
    own.crop(-3)
    wanted = dict(GREEDY, return_dict_in_generate=True, output_logits=True)
    expected = model.generate(prompt, past_key_values=own, **wanted)
    warm = cached.generate(prompt, **wanted)
    assert cached.last_report.reused_tokens == 2 * BLOCK
    assert torch.equal(expected.sequences, warm.sequences)
    assert torch.equal(torch.stack(expected.logits), torch.stack(warm.logits))


def test_fetched_kv_is_never_written():
    model = tiny()
    cached, client = served(model)
    prompt = prompt_of(3 * BLOCK + 2)
    cached.generate(prompt, **GREEDY)
    kept = client.fetch(prompt)
    client.fetch = lambda ids, out=None, **_: kept
    before = kept.kv.clone()
    cached.generate(prompt, max_new_tokens=20, do_sample=False)
    assert cached.last_report.reused_tokens == 3 * BLOCK
    assert torch.equal(kept.kv, before)


def test_a_conversation_reuses_generated_tokens():
    model = tiny()
    cached, client = served(model)
    first = cached.generate(prompt_of(BLOCK), max_new_tokens=BLOCK + 2, do_sample=False)
    assert len(client.blocks) == 2
    assert cached.last_report.stored.new == 2
    follow_up = torch.cat([first, prompt_of(3, seed=2)], dim=1)
    plain = model.generate(follow_up, **GREEDY)
    assert torch.equal(cached.generate(follow_up, **GREEDY), plain)
    assert cached.last_report.reused_tokens == 2 * BLOCK


def test_the_last_generated_token_has_no_kv_and_is_not_stored():
    model = tiny()
    cached, client = served(model)
    cached.generate(prompt_of(BLOCK), max_new_tokens=BLOCK, do_sample=False)  # the 16th token was not computed
    assert len(client.blocks) == 1


def test_storing_generated_tokens_can_be_disabled():
    cached, client = served(tiny(), store_generated=False)
    cached.generate(prompt_of(BLOCK + 1), max_new_tokens=3 * BLOCK, do_sample=False)
    assert len(client.blocks) == 1


def test_gpt2_reuses_prefixes_up_to_its_last_position():
    model = tiny("gpt2", n_positions=4 * BLOCK)
    cached, _ = served(model)
    prompt = prompt_of(4 * BLOCK - 5)
    plain = model.generate(prompt, **GREEDY)
    for _ in range(2):
        assert torch.equal(cached.generate(prompt, **GREEDY), plain)
    assert cached.last_report.reused_tokens == 3 * BLOCK


@pytest.mark.parametrize(
    "given", [dict(do_sample=True, temperature=0.7), dict(repetition_penalty=1.5, do_sample=False), dict(prefill_chunk_size=3)]
)
def test_sampling_and_other_decoding_settings_give_equal_output(given):
    model = tiny()
    cached, _ = served(model)
    prompt = prompt_of(2 * BLOCK + 5)
    outputs = []
    for run in (model.generate, cached.generate, cached.generate):
        torch.manual_seed(3)
        outputs.append(run(prompt, max_new_tokens=6, **given))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert cached.last_report.reused_tokens == 2 * BLOCK


def test_a_prompt_may_have_several_types_and_shapes():
    model = tiny()
    cached, _ = served(model)
    prompt = prompt_of(BLOCK + 2)
    plain = model.generate(prompt, **GREEDY)
    for form in (prompt[0], prompt[0].tolist(), prompt.tolist(), prompt.int()):
        assert torch.equal(cached.generate(form, **GREEDY), plain)
    assert torch.equal(cached.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY), plain)


def test_the_answers_length_is_passed_to_the_policy():
    cached, client = served(tiny(), store_generated=False)
    _, report = cached.run(prompt_of(BLOCK), **GREEDY)
    assert [hint.answer_tokens for hint in client.hints] == [report.generated_tokens]
    assert report.generated_tokens > 0


def test_the_report_measures_the_first_token_and_the_fetch():
    model = tiny()
    clock = ManualClock()
    model.register_forward_pre_hook(lambda module, args: clock.advance(1.0))
    cached, client = served(model, clock=clock)
    fetch, store = client.fetch, client.store
    client.fetch = lambda ids, out=None, **_: clock.advance(0.5) or fetch(ids)
    client.store = lambda *given, **named: clock.advance(4.0) or store(*given, **named)
    _, report = cached.run(prompt_of(BLOCK), **GREEDY)
    assert (report.seconds_fetch, report.seconds_to_first_token, report.seconds_store) == (0.5, 1.5, 4.0)
    assert cached.last_report is None
    assert client.prefills == [(BLOCK, 1.0)]
    cached.run(prompt_of(BLOCK + 3), **GREEDY)
    assert client.prefills[1:] == [(3, 1.0)], "only computed tokens count, not fetched ones"
    assert client.positions == [0, BLOCK]


def test_the_report_has_the_declined_tokens():
    cached, client = served(tiny())
    fetch = client.fetch
    client.fetch = lambda ids, out=None, **_: replace(fetch(ids), declined=7)
    _, report = cached.run(prompt_of(BLOCK), **GREEDY)
    assert report.declined_tokens == 7


class Listener:
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_the_callers_streamer_gets_every_token():
    cached, _ = served(tiny())
    listener = Listener()
    output = cached.generate(prompt_of(BLOCK), streamer=listener, **GREEDY)
    assert listener.heard == output[0].tolist()
    assert listener.ended


def failing(kind):
    def fail(*given, **named):
        raise TieredKVError(kind, "gone") if isinstance(kind, Kind) else kind("gone")

    return fail


@pytest.mark.parametrize("kind", [Kind.TRANSPORT, Kind.CLOSED, Kind.CLUSTER, Kind.CORRUPT, OSError, RuntimeError, KeyError])
@pytest.mark.parametrize("verbs", [("fetch",), ("store",), ("fetch", "store")])
def test_a_failing_client_fails_no_request(kind, verbs, caplog):
    model = tiny()
    cached, client = served(model)
    prompt = prompt_of(BLOCK + 1)
    plain = model.generate(prompt, **GREEDY)
    for verb in verbs:
        setattr(client, verb, failing(kind))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(cached.generate(prompt, **GREEDY), plain)
    assert len(caplog.records) == len(verbs)
    if "fetch" in verbs:
        assert cached.last_report.reused_tokens == 0


LAYOUT_ERRORS = {
    "other dtype": lambda kv: Fetched(BLOCK, kv.double(), {"host": BLOCK}),
    "fewer tokens than said": lambda kv: Fetched(BLOCK, kv[..., :-1, :], {"host": BLOCK}),
    "other heads": lambda kv: Fetched(BLOCK, kv[:, :, :1], {"host": BLOCK}),
    "more tokens than asked": lambda kv: Fetched(8 * BLOCK, torch.cat([kv] * 8, dim=3), {"host": 8 * BLOCK}),
    "nothing": lambda kv: None,
}


@pytest.mark.parametrize("case", LAYOUT_ERRORS)
def test_an_invalid_fetch_result_is_a_miss(case):
    model = tiny()
    cached, client = served(model)
    prompt = prompt_of(BLOCK + 1)
    plain = cached.generate(prompt, **GREEDY)
    answer = LAYOUT_ERRORS[case](client.fetch(prompt).kv)
    client.fetch = lambda ids, out=None, **_: answer
    assert torch.equal(cached.generate(prompt, **GREEDY), plain)
    assert cached.last_report.reused_tokens == 0


def test_an_error_of_the_model_reaches_the_caller():
    cached, client = served(tiny())
    with pytest.raises(ValueError, match="max_new_tokens"):
        cached.generate(prompt_of(BLOCK), max_new_tokens=0)
    assert not client.blocks


def test_recomputed_tokens_do_not_count_as_reused():
    model = tiny()
    cached, client = served(model)
    prompt = prompt_of(2 * BLOCK)
    cached.generate(prompt, **GREEDY)
    found = client.fetch(prompt)
    client.fetch = lambda ids, out=None, **_: Fetched(found.tokens, found.kv, {"host": 2 * BLOCK - 1, "disk": 1})
    cached.generate(prompt, **GREEDY)
    assert cached.last_report.reused_tokens_by_tier == {"host": 2 * BLOCK - 1}


REFUSED = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "assistant_model": object(),
    "prompt_lookup_num_tokens": 3,
    "use_mtp": True,
    "penalty_alpha": 0.6,
    "custom_generate": "somewhere/on-the-hub",
    "token_healing": True,
    "use_cache": False,
    "cache_implementation": "static",
    "output_attentions": True,
    "output_hidden_states": True,
    "past_key_values": object(),
    "inputs_embeds": torch.zeros(1, 9, 32),
    "inputs": torch.ones(1, 9, dtype=torch.long),
    "position_ids": torch.zeros(1, 9, dtype=torch.long),
    "token_type_ids": torch.zeros(1, 9, dtype=torch.long),
    "pixel_values": torch.zeros(1),
    "attention_mask": torch.tensor([[0] + [1] * 8]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_requests_are_rejected_before_any_work(name):
    model = tiny()
    cached, client = served(model)
    client.fetch = client.store = lambda *given, **named: pytest.fail("the client was asked")
    runs = tokens_run(model)
    with pytest.raises(TieredKVError, match=name) as caught:
        cached.generate(prompt_of(9), **{name: REFUSED[name]})
    assert caught.value.kind == Kind.MODEL
    assert caught.value.context["argument"] == name
    assert not runs


def test_unsupported_settings_in_a_generation_config_are_rejected():
    model = tiny()
    cached, _ = served(model)
    with pytest.raises(TieredKVError, match="num_beams"):
        cached.generate(prompt_of(9), generation_config=transformers.GenerationConfig(num_beams=3))
    model.generation_config.num_beams = 3
    with pytest.raises(TieredKVError, match="num_beams"):
        cached.generate(prompt_of(9))
    cached.generate(prompt_of(9), num_beams=1, max_new_tokens=1)


def test_batches_padding_and_invalid_prompts_are_rejected():
    model = tiny()
    cached, _ = served(model)
    with pytest.raises(TieredKVError, match="one prompt") as caught:
        cached.generate(prompt_of(8).repeat(2, 1))
    assert caught.value.kind == Kind.MODEL
    for nothing in (torch.empty(1, 0, dtype=torch.long), [0.5], [-1], ["a"], None):
        with pytest.raises(TieredKVError) as caught:
            cached.generate(nothing)
        assert caught.value.kind == Kind.TOKENS
    padded = torch.cat([torch.zeros(1, 1, dtype=torch.long), prompt_of(8)], dim=1)
    with pytest.raises(TieredKVError, match="pad_token_id 0"):
        cached.generate(padded, pad_token_id=0)
    wanted = dict(GREEDY, pad_token_id=0, attention_mask=torch.ones_like(padded))
    assert torch.equal(cached.generate(padded, **wanted), model.generate(padded, **wanted))


def test_training_and_autocast_are_rejected_at_every_request():
    model = tiny()
    cached, _ = served(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TieredKVError, match="autocast"):
        cached.generate(prompt_of(9))
    model.train()
    with pytest.raises(TieredKVError, match=r"model\.eval"):
        cached.generate(prompt_of(9))


def test_an_unsupported_model_is_rejected_at_once():
    with pytest.raises(TieredKVError, match="sliding window"):
        CachedModel(tiny("mistral", sliding_window=4), client=None)


def test_a_request_reuses_the_previous_buffer_without_changing_its_output(monkeypatch):
    """The client really writes into `out`, and must not change the cache of an earlier request."""
    model = tiny("llama")
    cached, client = served(model)
    inner, given = client.fetch, []

    def fetch(ids, out=None, **options):
        found = inner(ids, **options)
        given.append(out)
        out[..., : found.tokens, :].copy_(found.kv)
        out[..., found.tokens :, :].fill_(float("nan"))
        return Fetched(found.tokens, out[..., : found.tokens, :], found.tokens_by_tier)

    client.fetch = fetch
    prompts = [prompt_of(3 * BLOCK + 2, seed) for seed in (1, 2)]
    for prompt in prompts:
        cached.generate(prompt, max_new_tokens=3, do_sample=False)
    first = cached.generate(prompts[0], max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    kept = kv_from_cache(first.past_key_values, 0, 3 * BLOCK)
    second = cached.generate(prompts[1], max_new_tokens=3, do_sample=False)
    assert len({out.data_ptr() for out in given}) == 1
    assert torch.equal(kept, kv_from_cache(first.past_key_values, 0, 3 * BLOCK))
    assert torch.equal(second, model.generate(prompts[1], max_new_tokens=3, do_sample=False))
    monkeypatch.setattr("tiered_kv.integrations.transformers.SCRATCH_BYTES_MAX", 1)
    assert cached._take_scratch(10) is None


def test_a_client_of_another_model_is_rejected():
    model = tiny("llama")
    other = DictClient(tiny("gpt2"), check_supported(tiny("gpt2")).layout(BLOCK))
    with pytest.raises(TieredKVError, match="another model"):
        CachedModel(model, other)
