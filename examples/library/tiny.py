"""The model of these examples: a tiny Llama with random weights, which needs no download. Replace it by your own."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 256


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))
