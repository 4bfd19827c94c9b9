"""Attaches to a cluster as a worker of the model that the command line names."""

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tiered_kv
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.identity import tokenizer_digest
from tiered_kv.keys import Namespace
from tiered_kv.tools.demo.model import load_model

if TYPE_CHECKING:
    from tiered_kv.client.client import Client


def attach_model(cluster: str, model: str, dtype: str, tenant: str, known: Collection[Namespace]) -> tuple["Client", Any]:
    """Load a model and attach to the node on this machine. Returns the client, and the model's tokenizer.

    `known`: the namespaces that the node knows. If one of them has the digest of this tokenizer, the workers gave their tokenizer to
    `attach`, and the client uses that namespace. Raises as `load_model` and `tiered_kv.attach`.
    """
    loaded, tokenizer = load_model(model, dtype_of(dtype))
    client = tiered_kv.attach(loaded, tenant=tenant, cluster=cluster)
    with_tokenizer = replace(client.namespace.plain(), tokenizer=tokenizer_digest(tokenizer))
    if client.namespace.plain() not in known and with_tokenizer in known:
        client.use(with_tokenizer)
    return client, tokenizer


def dtype_of(text: str) -> Any:
    """Returns the torch dtype of this name, or "auto". Raises (kind `config`) for other names."""
    import torch

    found = "auto" if text == "auto" else getattr(torch, text, None)
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise TieredKVError(Kind.CONFIG, f"--dtype: must be auto or a floating-point dtype such as bfloat16, got {text!r}", setting="dtype")
    return found
