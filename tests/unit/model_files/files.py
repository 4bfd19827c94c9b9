"""What the tests of a model's files share: names, and helpers that are no fixtures."""

import pytest

from tiered_kv import file_sums
from tiered_kv.errors import Kind, TieredKVError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "dtype": "bfloat16", "transformers_version": "5.0"}


def as_a_new_process():
    file_sums._known.clear()


def error_of(call, *arguments, **options):
    with pytest.raises(TieredKVError) as caught:
        call(*arguments, **options)
    assert caught.value.kind == Kind.MODEL
    return str(caught.value)


def overwrite(name, content=b"other"):
    def change(model):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(content)

    return change
