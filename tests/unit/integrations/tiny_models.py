"""Tiny random models, and a client that stores blocks in a dict, for the tests of this folder."""

import torch
import transformers

from tiered_kv.blocks import Fetched, Stored
from tiered_kv.keys import Namespace, as_token_ids
from tiered_kv.protocol.probes import ProbeBook

VOCAB = 97
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512
)


def tiny(name="llama", dtype=torch.float32, seed=0, **changes):
    """Returns a random model of the named family in evaluation mode. Its weights are large enough that greedy decoding varies."""
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SIZES | dict(num_key_value_heads=2) | changes),
        "qwen2": lambda: transformers.Qwen2Config(**SIZES | dict(num_key_value_heads=1) | changes),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES | dict(num_key_value_heads=2, head_dim=16) | changes),
        "mistral": lambda: transformers.MistralConfig(**SIZES | dict(num_key_value_heads=4, sliding_window=None) | changes),
        "gpt2": lambda: transformers.GPT2Config(**dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64) | changes),
    }
    return build(transformers.AutoModelForCausalLM.from_config, configs[name](), dtype=dtype, seed=seed)


def build(make, config, dtype=torch.float32, seed=0):
    """Returns a model of `config` with seeded random weights, and without special tokens that would end a text."""
    torch.manual_seed(seed)
    model = make(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = model.generation_config.bos_token_id = model.generation_config.pad_token_id = None
    return model


def prompt_of(tokens, seed=1):
    """Returns random ids (1, tokens)."""
    return torch.randint(1, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


class DictClient:
    """A client whose fetch and store use a dict from block key to KV (L, 2, H, T, D)."""

    def __init__(self, model, layout, namespace=None):
        self.layout = layout
        self.probes = ProbeBook()
        self.use(namespace or Namespace.of(model))
        self.blocks = {}
        self.prefills = []
        self.positions = []
        self.hints = []

    def use(self, namespace):
        self.namespace, self.chain = namespace, namespace.chain(self.layout)

    def variant_of(self, namespace, probe):
        return self.probes.match(namespace.root(self.layout), probe)

    def note_prefill(self, tokens, seconds, position=0):
        self.prefills.append((tokens, seconds))
        self.positions.append(position)

    def keys(self, ids, namespace=None):
        chain = self.chain if namespace is None else namespace.chain(self.layout)
        return chain.keys(as_token_ids(ids))

    def fetch(self, ids, out=None, *, namespace=None):
        held = []
        for key in self.keys(ids, namespace):
            if key not in self.blocks:
                break
            held.append(self.blocks[key])
        tokens = len(held) * self.layout.block_tokens
        kv = torch.cat(held, dim=3) if held else torch.empty(self.layout.kv_shape(0), dtype=self.layout.torch_dtype)
        return Fetched(tokens, kv, {"host": tokens} if tokens else {})

    def store(self, ids, kv, *, start=0, hint=None, namespace=None):
        self.hints.append(hint)
        assert start % self.layout.block_tokens == 0
        stacked = torch.stack([torch.stack(pair) for pair in kv])
        assert stacked.shape[3] == len(ids) - start
        new = present = 0
        step = self.layout.block_tokens
        for number, key in enumerate(self.keys(ids, namespace)[start // step :]):
            if key in self.blocks:
                present += 1
            else:
                new += 1
                self.blocks[key] = stacked[:, :, :, number * step : (number + 1) * step].clone()
        return Stored(new, present, 0)
