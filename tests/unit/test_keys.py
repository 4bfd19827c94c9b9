"""Keys and namespaces: equal exactly when KV is the same."""

import json
import os
import subprocess
import sys
import types
from hashlib import blake2b

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv import identity
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.identity import tensors_digest, tokenizer_digest
from tiered_kv.keys import ChainKeys, Namespace, as_token_ids, chain_keys
from tiered_kv.layout import KVLayout

ROOT = bytes(range(32))
tokens = st.integers(0, 2**32 - 1)
prompts = st.lists(tokens, max_size=40)
SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | changes)).eval()


def namespace_by_hand(**changes):
    return Namespace(**dict(weights="w") | changes)


# --- token ids


@given(prompts)
def test_the_same_ids_in_any_form(ids):
    expected = np.array(ids, "<u4")
    forms = [
        ids,
        tuple(ids),
        np.array(ids, "int64"),
        np.array(ids, ">u4"),
        np.array(ids, "uint64")[None],
        torch.tensor(ids, dtype=torch.long),
        torch.tensor([ids]),
    ]
    for form in forms:
        got = as_token_ids(form)
        assert got.dtype == np.dtype("<u4")
        assert got.flags.c_contiguous
        assert np.array_equal(got, expected)


def test_strided_ids():
    assert as_token_ids(np.arange(10)[::3]).tolist() == [0, 3, 6, 9]
    assert as_token_ids(torch.arange(10)[::3]).tolist() == [0, 3, 6, 9]


@pytest.mark.parametrize(
    "ids",
    [
        [1.0],
        [True],
        ["1"],
        "123",
        b"123",
        None,
        7,
        {1: 2},
        {1, 2},
        [[1], [2]],
        [[1], [2, 3]],
        [[[1]]],
        [-1],
        [2**32],
        [2**64],
        [-(2**70)],
        [None],
        torch.tensor([1.5]),
        torch.tensor([1.0], dtype=torch.bfloat16),
        torch.zeros(2, 3, dtype=torch.long),
        torch.tensor(3),
        torch.empty(3, dtype=torch.long, device="meta"),
        np.array([1, 2], "datetime64[s]"),
        object(),
        (item for item in [1, 2]),
    ],
)
def test_what_is_no_prompt_is_refused(ids):
    with pytest.raises(TieredKVError, match="token_ids") as caught:
        as_token_ids(ids)
    assert caught.value.kind == Kind.TOKENS


# --- chains


@given(prompts, st.integers(1, 9))
def test_a_chain_is_blake2b_of_parent_and_tokens(ids, block_tokens):
    expected, parent = [], ROOT
    for start in range(0, len(ids) - block_tokens + 1, block_tokens):
        data = b"".join(token.to_bytes(4, "little") for token in ids[start : start + block_tokens])
        parent = blake2b(parent + data, digest_size=32).digest()
        expected.append(parent)
    keys = chain_keys(ROOT, as_token_ids(ids), block_tokens)
    assert keys == expected
    assert len(keys) == len(ids) // block_tokens


@given(prompts, st.integers(1, 5), st.integers(0, 12))
def test_a_chain_can_go_on_from_any_block(ids, block_tokens, first):
    keys = chain_keys(ROOT, as_token_ids(ids), block_tokens)
    first = min(first, len(keys))
    parent = keys[first - 1] if first else ROOT
    assert chain_keys(parent, as_token_ids(ids), block_tokens, first) == keys[first:]


@given(prompts, prompts, st.integers(1, 5))
def test_keys_are_equal_exactly_for_equal_prefixes(one, other, block_tokens):
    pairs = zip(chain_keys(ROOT, as_token_ids(one), block_tokens), chain_keys(ROOT, as_token_ids(other), block_tokens), strict=False)
    for number, (a, b) in enumerate(pairs, start=1):
        assert (a == b) == (one[: number * block_tokens] == other[: number * block_tokens])


GOLDEN = ["074622ce8b5d9840", "c55fb6047be78991"]


def test_a_known_chain_stays_what_it_is():
    """Keys of blocks on disk and in other processes: a change here makes every stored block unreachable."""
    namespace = namespace_by_hand(tenant="t", rope="r")
    keys = chain_keys(namespace.root(KVLayout(2, 1, 8, "float16", 2)), as_token_ids([1, 2, 3, 4, 5]), 2)
    assert [key.hex()[:16] for key in keys] == GOLDEN


# --- chains of ranks

worlds = st.sampled_from([1, 2, 3, 4, 8])


def chain_of(rank=0, world=1, heads=24, block_tokens=2, **changes):
    """The chain of one rank of a model of 24 KV heads."""
    return namespace_by_hand(rank=rank, world=world, **changes).chain(KVLayout(2, heads // world, 8, "float16", block_tokens))


def test_a_chain_of_a_model_in_one_piece_is_the_plain_one():
    namespace, layout = namespace_by_hand(tenant="t", rope="r"), KVLayout(2, 1, 8, "float16", 2)
    chain = namespace.chain(layout)
    assert chain == ChainKeys(namespace.root(layout), namespace.root(layout), 2)
    assert [key.hex()[:16] for key in chain.keys(as_token_ids([1, 2, 3, 4, 5]))] == GOLDEN


GOLDEN_OF_RANKS = [["543a573086f7fdf1", "3952cd19261470dd"], ["0816f6d7cd0316da", "657e6cfe6de09bf6"]]


def test_known_chains_of_ranks_stay_what_they_are():
    for rank, golden in enumerate(GOLDEN_OF_RANKS):
        chain = namespace_by_hand(tenant="t", rope="r", rank=rank, world=2).chain(KVLayout(2, 1, 8, "float16", 2))
        assert [key.hex()[:16] for key in chain.keys(as_token_ids([1, 2, 3, 4, 5]))] == golden


@given(prompts, worlds)
def test_the_keys_of_a_rank_are_those_of_the_whole_model_xor_a_digest_of_its_root(ids, world):
    ids = as_token_ids(ids)
    whole = chain_of()
    for rank in range(world):
        chain = chain_of(rank, world)
        assert chain.root == namespace_by_hand(rank=rank, world=world).root(KVLayout(2, 24 // world, 8, "float16", 2))
        mask = blake2b(b"tiered_kv rank\0" + chain.root, digest_size=32).digest() if world > 1 else bytes(32)
        expected = [bytes(a ^ b for a, b in zip(key, mask, strict=True)) for key in whole.keys(ids)]
        assert chain.keys(ids) == expected
        assert [chain.whole_key(key) for key in expected] == whole.keys(ids)


@given(prompts, worlds, st.integers(0, 25))
def test_a_ranks_chain_can_go_on_from_any_block(ids, world, first):
    ids, chain = as_token_ids(ids), chain_of(world - 1, world)
    keys = chain.keys(ids)
    first = min(first, len(keys))
    assert chain.keys(ids, first) == keys[first:]
    if first:
        assert chain.keys(ids, first, keys[first - 1]) == keys[first:]


@given(st.binary(min_size=32, max_size=32), worlds)
def test_whole_keys_and_keys_of_ranks_are_inverse(key, world):
    for rank in range(world):
        chain = chain_of(rank, world)
        assert chain.whole_key(chain.rank_key(key)) == key == chain.rank_key(chain.whole_key(key))
        assert (chain.rank_key(key) == key) == (world == 1)


def test_blocks_of_ranks_worlds_and_models_are_never_the_same():
    ids = as_token_ids(range(20))
    chains = [
        chain_of(rank, world, **other) for world in (1, 2, 4) for rank in range(world) for other in ({}, {"tenant": "b"}, {"epoch": 1})
    ]
    keys = [key for chain in chains for key in chain.keys(ids)]
    assert len(set(keys)) == len(keys) == 10 * len(chains) == 210
    assert not {chain.root for chain in chains} & set(keys)


def test_only_models_of_as_many_heads_in_all_are_the_same_whole():
    ids = as_token_ids(range(20))
    assert chain_of(1, 2).whole_root == chain_of(3, 4).whole_root == chain_of().root
    assert chain_of(1, 2, heads=48).whole_root != chain_of(1, 2).whole_root
    assert not {chain_of(0, 2, heads=48).whole_key(key) for key in chain_of(0, 2, heads=48).keys(ids)} & set(chain_of().keys(ids))


# --- namespaces


@given(
    st.dictionaries(
        st.sampled_from(["tokenizer", "adapter", "architecture", "rope", "dtype", "kv_scales", "tenant"]), st.text(min_size=1, max_size=3)
    )
)
def test_every_field_counts(changes):
    changed = namespace_by_hand(**changes)
    assert (changed.digest == namespace_by_hand().digest) == (changed == namespace_by_hand())


def test_neighbouring_fields_do_not_run_together():
    assert namespace_by_hand(tokenizer="ab").digest != namespace_by_hand(tokenizer="a", adapter="b").digest


def test_the_layout_is_part_of_the_root():
    namespace = namespace_by_hand()
    roots = {namespace.root(KVLayout(2, 1, 8, dtype, block)) for dtype in ("float16", "bfloat16") for block in (8, 16)}
    assert len(roots) == 4
    assert namespace.digest not in roots


@pytest.mark.parametrize(
    "changes",
    [
        dict(weights=""),
        dict(weights=None),
        dict(weights=b"x"),
        dict(tenant=""),
        dict(tenant=None),
        dict(rank=1),
        dict(rank=-1),
        dict(world=0),
        dict(rank="0"),
        dict(world=1.5),
        dict(epoch=None),
        dict(epoch=True),
        dict(rope=None),
        dict(dtype=torch.float16),
        dict(kv_scales=[1.0]),
    ],
)
def test_a_namespace_of_nonsense_is_refused(changes):
    with pytest.raises(TieredKVError, match=r"namespace|tenant"):
        namespace_by_hand(**changes)


def digest_of(model, tokenizer=None, **facts):
    return Namespace.of(model, tokenizer, **facts).digest


def test_one_ulp_of_one_weight_is_another_model():
    one, other = model_of(), model_of()
    assert digest_of(one) == digest_of(other)
    with torch.no_grad():
        weight = other.model.layers[1].mlp.up_proj.weight
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(torch.inf))
    assert digest_of(one) != digest_of(other)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_again_is_the_same_model(tmp_path, tied):
    model = model_of(tie_word_embeddings=tied)
    before = digest_of(model)
    model.save_pretrained(tmp_path / "a")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    again.save_pretrained(tmp_path / "b", max_shard_size="4KB")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32, attn_implementation="eager")
    assert before == digest_of(model) == digest_of(again) == digest_of(third)


def test_running_or_freezing_a_model_changes_nothing():
    model = model_of()
    before = digest_of(model)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)
    model.requires_grad_(False)
    model.config.use_cache = False
    assert digest_of(model) == before


def test_another_dtype_is_another_model():
    wide, narrow = model_of(), model_of().to(torch.bfloat16)
    assert digest_of(wide) != digest_of(narrow) == digest_of(model_of().to(torch.bfloat16))
    assert digest_of(narrow.float()) != digest_of(wide)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        dict(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        dict(rms_norm_eps=1e-5),
    ],
)
def test_a_setting_that_changes_kv_is_another_model(changes):
    plain, changed = model_of(), model_of(**changes)
    changed.load_state_dict(plain.state_dict())
    assert digest_of(plain) != digest_of(changed)


def test_frequencies_changed_by_hand_are_another_model():
    model = model_of()
    before = digest_of(model)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    assert digest_of(model) != before


def test_the_class_of_the_model_counts():
    class Other(transformers.LlamaForCausalLM):
        pass

    plain = model_of()
    other = Other(plain.config)
    other.load_state_dict(plain.state_dict())
    assert digest_of(other) != digest_of(plain)


def test_tenants_ranks_and_epochs_are_kept_apart():
    model = model_of()
    digests = {
        digest_of(model),
        digest_of(model, tenant="b"),
        digest_of(model, world=2),
        digest_of(model, rank=1, world=2),
        digest_of(model, epoch=1),
    }
    assert len(digests) == 5


def vocabulary(**tokens):
    return types.SimpleNamespace(get_vocab=lambda: tokens)


def test_the_tokenizer_counts_but_not_its_order():
    model = model_of()
    assert digest_of(model, vocabulary(a=1, b=2)) == digest_of(model, vocabulary(b=2, a=1))
    assert digest_of(model, vocabulary(a=1, b=2)) != digest_of(model, vocabulary(a=2, b=1)) != digest_of(model)
    assert tokenizer_digest(None) == ""
    with pytest.raises(TieredKVError, match="get_vocab"):
        tokenizer_digest("gpt2")


class Adapter:
    """As peft's settings of one adapter: a to_dict with a set and with facts about its origin in it."""

    def __init__(self, **facts):
        self.facts = dict(peft_type="LORA", r=8, target_modules={"q_proj", "v_proj", "k_proj"}, base_model_name_or_path="/a") | facts

    def to_dict(self):
        return self.facts


def with_adapter(adapter, **state):
    model = model_of()
    model.peft_config = {"default": adapter}
    for name, value in state.items():
        setattr(model.model.layers[0].self_attn.q_proj, name, value)
    return digest_of(model)


def test_adapters_count_with_settings_and_state():
    digests = [
        digest_of(model_of()),
        with_adapter(Adapter()),
        with_adapter(Adapter(r=4)),
        with_adapter(Adapter(), active_adapter=["default"]),
        with_adapter(Adapter(), disable_adapters=True),
        with_adapter(Adapter(), merged_adapters=["default"]),
        with_adapter(Adapter(), scaling={"default": 0.5}),
        with_adapter(Adapter(), scaling={"default": 1.0}),
    ]
    assert len(set(digests)) == len(digests)
    assert with_adapter(Adapter()) == with_adapter(Adapter(base_model_name_or_path="/b", inference_mode=True))


def test_a_namespace_is_the_same_in_every_process():
    """Sets in settings come in another order in every process."""
    code = (
        "import types, torch; from tiered_kv.identity import adapter_digest\n"
        "a = types.SimpleNamespace(to_dict=lambda: {'target_modules': {'q_proj', 'v_proj', 'k_proj', 'o_proj'}, 2: frozenset('abcdef')})\n"
        "print(adapter_digest(types.SimpleNamespace(peft_config={'x': a}, named_modules=lambda: [])))"
    )
    ran = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": str(seed)}
        ).stdout
        for seed in (1, 2)
    ]
    assert ran[0] == ran[1] != ""


def test_a_text_names_an_engines_own_weights():
    assert Namespace.of("checkpoint-7") == Namespace(weights="checkpoint-7")
    assert Namespace.of("checkpoint-7").digest != Namespace.of("checkpoint-8").digest
    for nonsense in ("", None, 7, torch.nn.Linear(1, 1)):
        with pytest.raises(TieredKVError, match="namespace"):
            Namespace.of(nonsense)


# --- content of weights


def test_names_shapes_and_dtypes_count():
    value = torch.arange(12.0)
    states = [
        dict(a=value),
        dict(b=value),
        dict(a=value.view(3, 4)),
        dict(a=value.view(4, 3)),
        dict(a=value.view(torch.int32)),
        dict(a=value, b=value),
        dict(a=value.flip(0)),
        dict(a=value.view(3, 4).T),
        {},
        dict(a=value[:0]),
        dict(a=value[0]),
        dict(a=None),
        dict(a="x"),
    ]
    assert len({tensors_digest(state) for state in states}) == len(states)


def test_order_ties_and_strides_do_not_count():
    value = torch.arange(12.0).view(3, 4)
    tied = {"a": value, "b": value}
    assert tensors_digest(tied) == tensors_digest({"b": value.clone(), "a": value.clone()})
    assert tensors_digest({"a": value.T}) == tensors_digest({"a": value.T.contiguous()})


def test_tensors_that_begin_at_one_address_are_told_apart():
    value = torch.arange(12.0)
    state = {"a": value[:6], "b": value[:6].view(torch.int32), "c": value[::2]}
    assert tensors_digest(state) == tensors_digest({name: item.clone() for name, item in state.items()})


@pytest.mark.parametrize("value", [torch.empty(2, device="meta"), torch.eye(3).to_sparse(), object()])
def test_weights_without_readable_content_are_refused(value):
    with pytest.raises(TieredKVError, match=r"layer\.weight") as caught:
        tensors_digest({"layer.weight": value})
    assert caught.value.kind == Kind.MODEL


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_torchs_own_quantized_tensors_are_refused():
    with pytest.raises(TieredKVError, match="qint8"):
        tensors_digest({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)})


class Wrapped:
    """A tensor made of others, as quantization libraries have them."""

    def __init__(self, data, scale, bits):
        self.data, self.scale, self.bits = data, scale, bits

    def __tensor_flatten__(self):
        return ["data", "scale"], {"bits": self.bits}


def test_tensors_made_of_others_are_read_to_the_bottom():
    ones, twos = torch.ones(4), torch.full((4,), 2.0)
    states = [
        Wrapped(ones, ones, 8),
        Wrapped(ones, twos, 8),
        Wrapped(twos, ones, 8),
        Wrapped(ones, ones, 4),
        ones,
        (ones, twos),
        (twos, ones),
        {"x": ones},
    ]
    assert len({tensors_digest({"w": state}) for state in states}) == len(states)
    assert tensors_digest({"w": Wrapped(ones, twos, 8)}) == tensors_digest({"w": Wrapped(ones.clone(), twos.clone(), 8)})


def test_pieces_of_a_large_tensor_make_one_sum():
    value = torch.arange(1000.0)
    whole = b"".join(bytes(piece) for piece in identity._byte_pieces(value))
    parts = list(identity._byte_pieces(value, piece_bytes=96))
    assert whole == value.numpy().tobytes() == b"".join(bytes(piece) for piece in parts)
    assert len(parts) > 1


def test_namespaces_are_readable_json():
    assert json.loads(json.dumps(namespace_by_hand().__dict__))["weights"] == "w"
