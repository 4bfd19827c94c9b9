"""A cache attached to a model: equal results with fewer tokens computed. Requests that cannot use it run without it, or raise."""

import copy
import io
import threading

import pytest
import torch
import transformers
from library_config import BLOCK, CONFIG, GREEDY
from tiny_models import VOCAB, build, prompt_of, tiny

from tiered_kv import CacheMode
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.library.model import ModelCacheWrapper, TransformersKVCache

FAMILIES = ("llama", "qwen2", "gpt2")


def tokens_run(model):
    """Returns a list to which each run of the embeddings appends (rows, tokens): all tokens that are really computed."""
    runs = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, given: runs.append(tuple(given[0].shape)))
    return runs


def padded(side, *lengths, pad=0):
    """Returns input_ids and attention_mask of prompts of these lengths, with a common prefix, padded on one side."""
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), pad), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        prompt = torch.cat([prompt_of(2 * BLOCK), prompt_of(width, seed=row + 2)], 1)[0, :length]
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where], mask[row, where] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_reuses_every_whole_block_with_equal_output(family, attached):
    model = tiny(family)
    inputs = {"input_ids": prompt_of(5 * BLOCK + 3), "attention_mask": torch.ones(1, 5 * BLOCK + 3, dtype=torch.long)}
    wanted = dict(GREEDY, use_cache=True, return_dict_in_generate=True, output_logits=True)
    plain = model.generate(**inputs, **wanted)
    runs = tokens_run(model)
    cache = attached(model)
    runs.clear()
    cold = model.generate(**inputs, **wanted)
    assert runs == [(1, 5 * BLOCK + 3)] + [(1, 1)] * 4
    runs.clear()
    warm = model.generate(**inputs, **wanted)
    assert runs == [(1, 3)] + [(1, 1)] * 4
    assert cache.last_report.reused_tokens == 5 * BLOCK
    for output in (cold, warm):
        assert torch.equal(output.sequences, plain.sequences)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)
    assert cache.get_cache_stats()["hit_rate"] == 0.5
    assert cache.get_cache_stats()["passed"] == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_gives_the_logits_of_all_tokens(family, attached):
    model = tiny(family)
    ids = prompt_of(3 * BLOCK + 2)
    with torch.no_grad():
        plain, last = model(ids), model(ids, logits_to_keep=2)
        runs = tokens_run(model)
        cache = attached(model)
        for _ in range(2):
            output = model(ids)
            assert torch.equal(output.logits, plain.logits)
            assert output.past_key_values.get_seq_length() == 3 * BLOCK + 2
        runs.clear()
        kept = model(ids, logits_to_keep=2)
    assert runs == [(1, 2)], "a call that needs only the last logits reuses the prefix"
    torch.testing.assert_close(kept.logits, last.logits, rtol=1e-4, atol=1e-4)
    assert cache.cache.match(ids).tokens == 3 * BLOCK
    assert torch.equal(model.generate(ids, **GREEDY), cache.attachment._hooks["generate"]._plain(ids, **GREEDY))


def test_gradients_and_losses_equal_those_of_the_plain_model(attached):
    model = tiny()
    ids = prompt_of(3 * BLOCK)
    plain = torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0]
    runs = tokens_run(model)
    attached(model)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0], plain)
        kept = model(ids, logits_to_keep=1).logits
        assert kept.requires_grad
    runs.clear()
    torch.autograd.grad(model(ids, logits_to_keep=1).logits.sum(), model.model.embed_tokens.weight)
    assert runs == [(1, 3 * BLOCK)], "gradients need the whole prompt computed"


CASES = {
    "left padding": dict(padded("left", 20, 27, 33), pad_token_id=0),
    "equal lengths": dict(padded("left", 24, 24)),
    "one padded prompt": dict(padded("left", 20, 33)) | {"input_ids": padded("left", 20, 33)["input_ids"][:1]},
    "beams": dict(input_ids=prompt_of(26), num_beams=3),
    "beams in a batch": dict(padded("left", 20, 27), num_beams=2, pad_token_id=0),
    "several beams each": dict(input_ids=prompt_of(26), num_beams=4, num_return_sequences=2),
    "several samples": dict(input_ids=prompt_of(26), num_return_sequences=3, do_sample=True),
    "samples in a batch": dict(padded("left", 20, 27), num_return_sequences=2, do_sample=True, pad_token_id=0),
    "sampling": dict(input_ids=prompt_of(26), do_sample=True, temperature=0.8, top_k=20),
    "repetition penalty": dict(padded("left", 20, 27), repetition_penalty=1.3, pad_token_id=0),
}
CASES["one padded prompt"]["attention_mask"] = CASES["one padded prompt"]["attention_mask"][:1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_batches_beams_and_samples_are_served(family, case, attached):
    model = tiny(family)
    inputs = dict(GREEDY, **CASES[case]) if "do_sample" not in CASES[case] else dict(CASES[case], max_new_tokens=5)
    outputs, runs = [], tokens_run(model)
    torch.manual_seed(5)
    outputs.append(model.generate(**inputs))
    plain_tokens = runs[0][1]
    cache = attached(model)
    for _ in range(2):
        runs.clear()
        torch.manual_seed(5)
        outputs.append(model.generate(**inputs))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert plain_tokens - runs[0][1] >= 2 * BLOCK
    assert cache.last_report.reused_tokens > 0
    assert cache.attachment.skipped == {}


def test_a_batch_and_single_prompts_share_their_blocks(attached):
    model = tiny()
    batch = padded("left", 20, 33)
    row = batch["input_ids"][0, 13:][None]
    plain = model.generate(row, **GREEDY)
    cache = attached(model)
    model.generate(**batch, pad_token_id=0, **GREEDY)
    assert torch.equal(model.generate(row, **GREEDY), plain)
    assert cache.last_report.reused_tokens == 2 * BLOCK


PASSED = {
    "right padding": (dict(padded("right", 20, 27), pad_token_id=0), "generate: attention_mask"),
    "assisted": (dict(input_ids=prompt_of(20), prompt_lookup_num_tokens=3), "generate: prompt_lookup_num_tokens"),
    "no cache": (dict(input_ids=prompt_of(20), use_cache=False), "generate: use_cache"),
    "hidden states": (dict(input_ids=prompt_of(20), output_hidden_states=True), "generate: output_hidden_states"),
    "static cache": (dict(input_ids=prompt_of(20), cache_implementation="static"), "generate: cache_implementation"),
    "pad token as a token": (dict(input_ids=prompt_of(20), pad_token_id=int(prompt_of(20)[0, 3])), "generate: input_ids"),
}


@pytest.mark.parametrize("case", PASSED)
def test_requests_that_cannot_use_the_cache_run_without_it(case, attached):
    model = tiny()
    inputs, reason = PASSED[case]
    plain = model.generate(**inputs, **GREEDY)
    cache = attached(model)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert cache.get_cache_stats()["passed"] == {reason: 2}
    assert cache.get_cache_stats()["num_entries"] == 0


def test_assisted_decoding_with_an_assistant_model(attached):
    model, assistant = tiny(), tiny(seed=1)
    ids = prompt_of(20)
    plain = model.generate(ids, **GREEDY)
    attached(model), attached(assistant)
    for _ in range(2):
        assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), plain)


def test_forward_with_a_batch(attached):
    model = tiny()
    right, left = padded("right", 20, 27), padded("left", 20, 27)
    with torch.no_grad():
        plain = [model(**each).logits for each in (right, left)]
        cache = attached(model)
        for _ in range(2):
            for each, wanted in zip((right, left), plain, strict=True):
                assert torch.equal(model(**each).logits, wanted)
    assert cache.attachment.skipped == {"forward: attention_mask": 2}
    assert cache.cache.match(right["input_ids"][0, :20]).tokens == 2 * BLOCK
    assert torch.equal(model.generate(right["input_ids"][:1, :20], **GREEDY), tiny().generate(right["input_ids"][:1, :20], **GREEDY))


def test_a_callers_own_decode_loop(attached):
    model = tiny()
    attached(model)
    ids, tokens = prompt_of(20), []
    wanted = model.generate(ids, **GREEDY)[0, 20:].tolist()
    with torch.no_grad():
        output = model(ids, logits_to_keep=1)
        for _ in range(5):
            tokens.append(int(output.logits[0, -1].argmax()))
            output = model(torch.tensor([[tokens[-1]]]), past_key_values=output.past_key_values)
    assert tokens == wanted


def test_streaming(attached):
    class Listener:
        def __init__(self):
            self.heard = []

        def put(self, value):
            self.heard += value.flatten().tolist()

        def end(self):
            self.heard.append("end")

    model = tiny()
    attached(model)
    for _ in range(2):
        listener = Listener()
        output = model.generate(prompt_of(20), streamer=listener, **GREEDY)
        assert listener.heard == [*output[0].tolist(), "end"]


def test_chat_templates(attached):
    words = {f"w{number}": number for number in range(VOCAB)}
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}w1 {{ message.content }} w2 {% endfor %}"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", chat_template=template)
    model = tiny()
    talk = [{"role": "user", "content": " ".join(f"w{number}" for number in range(3, 40))}]
    cache, reused = attached(model, tokenizer=tokenizer), []
    for _ in range(3):
        inputs = tokenizer.apply_chat_template(talk, return_dict=True, return_tensors="pt")
        output = model.generate(**inputs, **GREEDY)
        assert torch.equal(output, tiny().generate(**inputs, **GREEDY))
        reused.append(cache.last_report.reused_tokens)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "w5 w6 w7"}]
    assert reused == sorted(reused)
    assert reused[1] >= 4 * BLOCK
    assert cache.get_cache_stats()["passed"] == {}


@pytest.mark.gpu
def test_a_model_on_a_gpu_gives_equal_output(attached):
    model = tiny().to("cuda")
    ids = prompt_of(20).to("cuda")
    plain = model.generate(ids, **GREEDY)
    cache = attached(model)
    for inputs in (ids, ids, ids.repeat(2, 1)):
        assert torch.equal(model.generate(inputs, **GREEDY)[:1], plain)
    assert cache.last_report.reused_tokens == 4 * BLOCK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_any_dtype_is_cached_in_that_dtype(dtype, attached):
    model = tiny(dtype=dtype)
    ids = prompt_of(20)
    plain = model.generate(ids, **GREEDY)
    cache = attached(model)
    assert cache.facts.dtype == str(dtype).removeprefix("torch.")
    for _ in range(2):
        assert torch.equal(model.generate(ids, **GREEDY), plain)
    assert cache.last_report.reused_tokens == 2 * BLOCK


def test_a_change_of_dtype_or_weights_starts_a_new_namespace(attached):
    model, other = tiny(), tiny(seed=3)
    ids = prompt_of(20)
    cache = attached(model)
    model.generate(ids, **GREEDY)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.generate(ids, **GREEDY), other.generate(ids, **GREEDY))
    assert cache.last_report.reused_tokens == 0
    model.generate(ids, **GREEDY)
    assert cache.last_report.reused_tokens == 2 * BLOCK
    model.double(), other.double()
    assert torch.equal(model.generate(ids, **GREEDY), other.generate(ids, **GREEDY))
    assert cache.last_report.reused_tokens == 0
    model.lm_head.weight.data.mul_(0.5)
    cache.refresh()
    model.generate(ids, **GREEDY)
    assert cache.last_report.reused_tokens == 0


def test_other_weights_at_the_same_address_start_a_new_namespace(attached):
    model, ids = tiny(), prompt_of(20)
    numbers = model.model.embed_tokens.weight.detach().numpy().copy()
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.from_numpy(numbers))
    cache = attached(model)
    model.generate(ids, **GREEDY)
    numbers[:] = numbers[::-1].copy()
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.from_numpy(numbers))
    model.generate(ids, **GREEDY)
    assert cache.last_report.reused_tokens == 0


def test_hooks_that_change_kv_start_a_new_namespace(attached):
    model, plain, ids = tiny(), tiny(), prompt_of(20)
    cache = attached(model)
    model.generate(ids, **GREEDY)
    for each in (model, plain):
        each.model.embed_tokens.register_forward_hook(lambda module, given, output: output + 1.0)
    wanted = plain.generate(ids, **GREEDY)
    for reused in (0, 2 * BLOCK):
        assert torch.equal(model.generate(ids, **GREEDY), wanted)
        assert cache.last_report.reused_tokens == reused
    for each in (model, plain):
        each.model.embed_tokens._forward_hooks.clear()
    assert torch.equal(model.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))
    assert cache.last_report.reused_tokens == 2 * BLOCK, "blocks stored without hooks are still cached"


def test_compiled_models(attached):
    model = tiny()
    ids = prompt_of(20)
    with torch.no_grad():
        plain, text = model(ids).logits, model.generate(ids, **GREEDY)
        with pytest.raises(TieredKVError, match=r"torch\.compile; attach the model itself"):
            TransformersKVCache(CONFIG, model=torch.compile(model, backend="eager"))
        attached(model)
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(ids).logits, plain)
            assert torch.equal(compiled.generate(ids, **GREEDY), text)


def test_two_threads_generate_with_equal_output(attached):
    model = tiny()
    prompts = [torch.cat([prompt_of(3 * BLOCK), prompt_of(4, seed=seed)], 1) for seed in range(6)]
    plain = [model.generate(ids, **GREEDY) for ids in prompts]
    cache, wrong = attached(model), []

    def work():
        for ids, wanted in zip(prompts, plain, strict=True):
            if not torch.equal(model.generate(ids, **GREEDY), wanted):
                wrong.append(ids)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert cache.get_cache_stats()["hits"] >= 5 * 3


def test_a_detached_model_has_its_own_methods_back(attached):
    model = tiny()
    before = dict(vars(model))
    cache = attached(model)
    assert cache.is_attached
    cache.detach(), cache.detach()
    assert vars(model) == before
    assert not cache.is_attached
    model.generate(prompt_of(20), **GREEDY)
    assert cache.get_cache_stats()["lookups"] == 0


def test_a_failing_cache_fails_no_request(attached, monkeypatch):
    model = tiny()
    ids = prompt_of(20)
    plain = model.generate(ids, **GREEDY)
    with torch.no_grad():
        logits = model(ids).logits
        cache = attached(model)
        cache.cache.close()  # as another thread may do
        for inputs in ({"input_ids": ids}, {"input_ids": ids.repeat(2, 1)}):
            assert torch.equal(model.generate(**inputs, **GREEDY)[:1], plain)
        assert torch.equal(model(ids).logits, logits)


def test_attaching_raises_if_there_is_too_little_memory(tmp_path):
    model = tiny()
    with pytest.raises(TieredKVError, match="shm_path"):
        TransformersKVCache(CONFIG.with_(tiers={"shm_path": str(tmp_path / "nowhere")}), model=model)
    assert "generate" not in vars(model)


def test_detaching_keeps_methods_that_were_set_over_the_cache(attached):
    model = tiny()
    cache = attached(model)
    ours = model.forward
    model.forward = theirs = lambda *arguments, **options: ours(*arguments, **options)
    cache.detach()
    assert model.forward is theirs
    assert model(prompt_of(20)).logits.shape == (1, 20, VOCAB)
    assert cache.get_cache_stats()["num_entries"] == 0


def test_a_model_has_one_cache_and_its_copies_have_none(attached):
    model = tiny()
    cache = attached(model)
    with pytest.raises(TieredKVError, match="attached already"):
        TransformersKVCache(CONFIG, model=model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.lm_head.weight.mul_(-1)
        assert torch.equal(clone(prompt_of(20)).logits, -model(prompt_of(20)).logits)
    assert clone.generate.__self__ is clone
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.generate.__self__ is loaded
    assert torch.equal(loaded(prompt_of(20)).logits, model(prompt_of(20)).logits)
    assert cache.is_attached


def test_calls_in_training_mode(attached):
    model = tiny(attention_dropout=0.5).train()
    with pytest.raises(TieredKVError, match=r"model\.eval"):
        TransformersKVCache(CONFIG, model=model)
    cache = attached(model, CONFIG.with_(cache_mode=CacheMode.TRAINING))
    assert all(module.training for module in model.modules())
    ids = prompt_of(20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.eval()
        fresh = tiny(attention_dropout=0.5)
        fresh.load_state_dict(model.state_dict())
        for reused in (0, 2 * BLOCK):
            assert torch.equal(model.generate(ids, **GREEDY), fresh.generate(ids, **GREEDY))
            assert cache.last_report.reused_tokens == reused
        model.train()
    served = tiny()
    attached(served)
    served.train()
    for call in (served, served.generate):
        with pytest.raises(TieredKVError, match=r"cache_mode=CacheMode\.TRAINING"):
            call(ids)


def test_bulk_mode_stores_prompts_only(attached):
    model = tiny()
    cache = attached(model, CONFIG.with_(cache_mode="bulk"))
    model.generate(prompt_of(BLOCK), do_sample=False, max_new_tokens=3 * BLOCK)
    assert cache.get_cache_stats()["num_entries"] == 1


def test_a_decoder_without_a_language_head_is_cached(attached):
    model = build(transformers.AutoModel.from_config, tiny("gpt2").config)
    ids = prompt_of(20)
    with torch.no_grad():
        plain = model(ids).last_hidden_state
        cache = attached(model)
        for _ in range(2):
            assert torch.equal(model(input_ids=ids).last_hidden_state, plain)
    assert cache.cache.match(ids).tokens == 2 * BLOCK
    assert (cache.facts.num_layers, cache.facts.num_heads, cache.facts.head_dim, cache.facts.max_length) == (3, 4, 8, 64)


def test_the_figures_of_the_model_are_detected(attached):
    facts = attached(tiny("llama")).facts
    assert (facts.num_layers, facts.num_attention_heads, facts.num_heads, facts.head_dim) == (3, 4, 2, 8)
    assert (facts.max_length, facts.dtype) == (512, "float32")


def test_models_without_a_kv_cache_are_rejected():
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    encoder = build(transformers.AutoModel.from_config, transformers.BertConfig(**sizes))
    before = dict(vars(encoder))
    for attach in (lambda: TransformersKVCache(CONFIG, model=encoder), lambda: ModelCacheWrapper(encoder, CONFIG)):
        with pytest.raises(TieredKVError, match="BertModel cannot be served") as caught:
            attach()
        assert caught.value.kind is Kind.MODEL
    assert vars(encoder) == before
    with pytest.raises(TieredKVError, match="not a transformers model"):
        TransformersKVCache(CONFIG, model=torch.nn.Linear(2, 2))
    for config in (CONFIG, None):
        with pytest.raises(TieredKVError, match="there is no model"):
            TransformersKVCache(config).attach()
