"""Which models can use the cache, from their config and from a run of a few tokens."""

import types

import pytest
import torch
import transformers
from tiny_models import SIZES, VOCAB, build, tiny

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.transformers import check_supported, layout_of
from tiered_kv.layout import KVLayout


@pytest.mark.parametrize(("name", "heads", "dim"), [("llama", 2, 8), ("qwen2", 1, 8), ("qwen3", 2, 16), ("mistral", 4, 8), ("gpt2", 4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_is_that_of_the_models_cache(name, heads, dim, dtype):
    assert layout_of(tiny(name, dtype), 16) == KVLayout(3, heads, dim, dtype, 16)


def test_default_block_is_64_tokens():
    assert layout_of(tiny()).block_tokens == 64


def other(config_class, make=None, **changes):
    make = make or transformers.AutoModelForCausalLM.from_config
    return lambda: build(make, getattr(transformers, config_class)(**SIZES | changes))


SERVED = {
    "multi-query gpt-bigcode": other("GPTBigCodeConfig", n_embd=32, n_head=4, n_layer=3, n_positions=64, multi_query=True, n_inner=48),
    "alibi bloom": other("BloomConfig", n_head=4, n_layer=2),
    "opt": other("OPTConfig", ffn_dim=48, word_embed_proj_dim=32, pad_token_id=1),
    "linear rope": other("LlamaConfig", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "yarn rope": other(
        "LlamaConfig", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    ),
    "mixture of experts": other("MixtralConfig", num_key_value_heads=2, num_local_experts=4, sliding_window=None),
    "local attention by mask alone": other(
        "GPTNeoConfig", num_hidden_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=2
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_supported_models(case):
    shape = check_supported(SERVED[case]())
    assert shape.dtype == torch.float32
    if "multi-query" in case:
        assert shape.kv_heads == 1


REFUSED = {
    "encoder": (other("BertConfig", transformers.AutoModel.from_config), "does not generate"),
    "not causal": (other("BertConfig", transformers.BertLMHeadModel, is_decoder=False), "cannot be served"),
    "encoder-decoder": (
        lambda: build(
            transformers.T5ForConditionalGeneration,
            transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        ),
        "encoder-decoder",
    ),
    "no language head": (other("LlamaConfig", transformers.LlamaModel), "does not generate"),
    "sliding window": (other("MistralConfig", sliding_window=8, num_key_value_heads=2), "sliding window or chunk of 8"),
    "sliding window in some layers": (
        other("Qwen2Config", use_sliding_window=True, sliding_window=16, max_window_layers=1, num_key_value_heads=2),
        "layer 1 attends",
    ),
    "gemma 2": (other("Gemma2Config", num_key_value_heads=2, head_dim=8, sliding_window=16), "sliding window"),
    "mamba": (
        lambda: build(
            transformers.MambaForCausalLM, transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2)
        ),
        "recurrent state",
    ),
    "latent attention": (
        other(
            "DeepseekV3Config",
            num_key_value_heads=4,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            n_shared_experts=1,
        ),
        "must be alike|cannot be served",
    ),
    "dynamic rope": (other("LlamaConfig", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
    "longrope": (
        other(
            "LlamaConfig",
            rope_parameters={
                "rope_type": "longrope",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 256,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
        ),
        "'longrope'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_models_are_rejected_with_the_reason(case):
    make, reason = REFUSED[case]
    with pytest.raises(TieredKVError, match=reason) as caught:
        check_supported(make())
    assert caught.value.kind == Kind.MODEL


def test_a_model_with_image_input_is_rejected():
    model = tiny()
    config = types.SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda decoder: model.config)
    composite = types.SimpleNamespace(config=config, can_generate=lambda: True)
    with pytest.raises(TieredKVError, match="images"):
        check_supported(composite)


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (types.SimpleNamespace(peft_type="PeftType.PREFIX_TUNING"), "trained vectors"),
        (types.SimpleNamespace(peft_type="LORA", is_prompt_learning=True), "trained vectors"),
        (types.SimpleNamespace(peft_type="XLORA"), "come later"),
        (types.SimpleNamespace(peft_type="LORA", alora_invocation_tokens=[1, 2]), "come later"),
    ],
)
def test_adapters_whose_kv_depends_on_more_than_the_prefix_are_rejected(adapter, reason):
    model = tiny()
    model.peft_config = {"default": adapter}
    with pytest.raises(TieredKVError, match=reason):
        check_supported(model)


def test_a_plain_lora_is_supported():
    model = tiny()
    model.peft_config = {"default": types.SimpleNamespace(peft_type="PeftType.LORA", is_prompt_learning=False)}
    assert check_supported(model).layers == 3


def test_training_mode_and_autocast_are_rejected():
    with pytest.raises(TieredKVError, match=r"model\.eval"):
        check_supported(tiny().train())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TieredKVError, match="autocast"):
        check_supported(tiny())


def test_an_object_that_is_no_model_is_rejected():
    with pytest.raises(TieredKVError, match="not a transformers model"):
        check_supported(torch.nn.Linear(2, 2))


class ForgetsPositions(transformers.LlamaForCausalLM):
    """Numbers the tokens of every call from 0, like a model whose positions ignore the cache."""

    def forward(self, input_ids=None, position_ids=None, **inputs):
        return super().forward(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **inputs)


class LooksAhead(transformers.LlamaForCausalLM):
    """Adds a part of the last token's embedding to every token's."""

    def forward(self, input_ids=None, **inputs):
        embeds = self.get_input_embeddings()(input_ids)
        return super().forward(inputs_embeds=embeds + 0.1 * embeds[:, -1:], **inputs)


class SharesLayers(transformers.LlamaForCausalLM):
    """Leaves the last layer of the cache empty."""

    def forward(self, past_key_values=None, **inputs):
        output = super().forward(past_key_values=past_key_values, **inputs)
        output.past_key_values.layers[-1].reset()
        return output


class Breaks(transformers.LlamaForCausalLM):
    """Raises if there is a cached prefix."""

    def forward(self, past_key_values=None, **inputs):
        if past_key_values.get_seq_length():
            raise NotImplementedError("no prefix, please")
        return super().forward(past_key_values=past_key_values, **inputs)


@pytest.mark.parametrize(
    ("lying", "reason"),
    [
        (ForgetsPositions, "computed in two parts"),
        (LooksAhead, "computed in two parts"),
        (SharesLayers, "with KV of its own, got"),
        (Breaks, "NotImplementedError: no prefix, please"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_run_rejects_models_whose_config_looks_supported(lying, reason, dtype):
    with pytest.raises(TieredKVError, match=reason):
        check_supported(build(lying, tiny().config, dtype))


def test_the_probe_draws_no_random_number_and_leaves_the_model_alone():
    model = tiny()
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.5
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    settings = model.generation_config.to_dict()
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    check_supported(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.generation_config.to_dict() == settings
    assert calls == [8, 5, 3]
