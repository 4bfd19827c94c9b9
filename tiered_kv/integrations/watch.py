"""Whether a model is as it was: its tensors and their versions, modules, hooks, methods, attributes and settings. Microseconds a request.

What torch cannot see is not seen here either: writes through `tensor.data`, numpy or another library's pointer, and a hook or function
that changes what it does. Content is never read; two states that look equal here are the same state.
"""

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable
from copy import copy
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import FunctionType
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.nn.modules import module as torchs
from torch.optim.optimizer import register_optimizer_step_post_hook

from tiered_kv.identity import is_door, watched_attributes

_version = attrgetter("_version")
_training = itemgetter("training")
_address, _stride, _storage = torch.Tensor.data_ptr, torch.Tensor.stride, torch.Tensor.untyped_storage
_HOOKS_OF_ALL = (torchs._global_forward_pre_hooks, torchs._global_forward_hooks)


class Watch:
    """The state of a model at the moment of its making; `holds` says whether it is still so.

    All loops are calls of C functions over lists made here: some 0.1 ms for a model of 300 tensors in 430 modules. Keeps what is
    taken out of the model alive until it is replaced by another watch, but not the memory of tensors that are given other memory.
    """

    def __init__(self, model: Any, ignored: frozenset[tuple[str, str]] = frozenset()) -> None:
        named = list(model.named_modules())
        self.modules = [module for _, module in named]
        self._dicts = [vars(module) for module in self.modules]
        self._kinds = list(map(type, self.modules))
        classes = list(dict.fromkeys(self._kinds))
        self._classes, self._forwards = classes, list(map(_code, classes))
        self._code = _columns(
            (vars(sys.modules.get(name, sys)), _functions(name)) for name in dict.fromkeys(kind.__module__ for kind in classes)
        )
        self._code_then = [list(map(get, dicts)) for get, dicts in self._code]
        self._children = [each for module in self.modules if (each := module._modules)]
        self._children_then = [dict(each) for each in self._children]
        self._hooks = [*_HOOKS_OF_ALL, *(hooks for module in self.modules for hooks in (module._forward_pre_hooks, module._forward_hooks))]
        self._hooks_then = [dict(hooks) for hooks in self._hooks] if any(self._hooks) else []
        tensor_dicts = [each for module in self.modules for each in (module._parameters, module._buffers) if each]
        self._there = _columns((each, [name for name, tensor in each.items() if tensor is not None]) for each in tensor_dicts)
        self._absent = _columns((each, [name for name, tensor in each.items() if tensor is None]) for each in tensor_dicts)
        watched = [(vars(module), [name for name in watched_attributes(module) if (where, name) not in ignored]) for where, module in named]
        self._attributes = _columns(watched)
        self._attributes_then = [[_kept(value) for value in map(get, dicts)] for get, dicts in self._attributes]
        self._configs = _configs(self._dicts)
        self._configs_then = _kept(self._configs)
        self._counted = [*self._dicts[1:], *tensor_dicts]
        self._own_count = _own_count(self._dicts[0])
        self._counts = list(map(len, self._counted))
        self._remember_tensors()

    def _remember_tensors(self) -> None:
        self._there_then = [list(map(get, dicts)) for get, dicts in self._there]
        values = chain.from_iterable([*self._there_then, *self._attributes_then])
        self.tensors = list({id(each): each for each in values if isinstance(each, torch.Tensor)}.values())
        self._versioned = [each for each in self.tensors if not each.is_inference()]
        self._versions = list(map(_version, self._versioned))
        self._stored = list(chain.from_iterable(map(_parts, self.tensors)))
        self._addresses, self._strides = list(map(_address, self._stored)), list(map(_stride, self._stored))
        self._lost: list = []  # gets what memory a tensor had when that is gone, whose address may then be another's
        self._storages = [weakref.ref(each, self._lost.append) for each in map(_storage, self._stored)]

    def holds(self) -> bool:
        """Whether the model is as it was when this was made."""
        try:
            return self._holds()
        except (RuntimeError, ValueError, TypeError, KeyError):  # what is compared is of another kind by now
            return False

    def _holds(self) -> bool:
        return (
            not self._lost
            and list(map(_version, self._versioned)) == self._versions
            and list(map(_address, self._stored)) == self._addresses
            and list(map(_stride, self._stored)) == self._strides
            and all(all(map(is_, map(get, dicts), then)) for (get, dicts), then in zip(self._there, self._there_then, strict=True))
            and not any(any(map(get, dicts)) for get, dicts in self._absent)
            and list(map(len, self._counted)) == self._counts
            and _own_count(self._dicts[0]) == self._own_count
            and (self._hooks == self._hooks_then if self._hooks_then else not any(self._hooks))
            and self._children == self._children_then
            and list(map(type, self.modules)) == self._kinds
            and list(map(_code, self._classes)) == self._forwards
            and all(all(map(is_, map(get, dicts), then)) for (get, dicts), then in zip(self._code, self._code_then, strict=True))
            and all(list(map(get, dicts)) == then for (get, dicts), then in zip(self._attributes, self._attributes_then, strict=True))
            and self._configs == self._configs_then
        )

    def is_unwritten(self) -> bool:
        """Whether no tensor was written to in place; a part of `holds` that costs 25 µs."""
        return list(map(_version, self._versioned)) == self._versions

    def is_training(self) -> bool:
        """Whether any part of the model is in training mode, where dropout makes KV random."""
        return any(map(_training, self._dicts))

    def is_of_same_parts(self, other: "Watch") -> bool:
        """Whether both are of the same modules and tensors, whatever their state."""
        ours, theirs = [self.modules, self.tensors], [other.modules, other.tensors]
        return all(len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(ours, theirs, strict=True))


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that have the memory of one: itself, or the parts of a tensor subclass, such as a quantized weight."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return list(chain.from_iterable(map(_parts, parts)))
    return [tensor] if tensor.layout is torch.strided else []


def _own_count(values: dict) -> int:
    """How many attributes a model has, doors of this library not counted."""
    return len(values) - sum(is_door(values.get(name)) for name in ("forward", "generate"))


def _code(kind: type) -> tuple[Any, Any]:
    """What runs when a module of this class is called."""
    return kind.__call__, getattr(kind, "forward", None)


def _functions(module: str) -> list[str]:
    """The functions of a module of code that a model's classes are in, by name; torch's own are many, and nobody replaces them."""
    if module not in sys.modules or module.split(".")[0] == "torch":
        return []
    return [name for name, value in vars(sys.modules[module]).items() if isinstance(value, FunctionType)]


def _count_writes(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Have the versions of what an optimizer has written say so: fused ones write past autograd."""
    if torch.compiler.is_compiling():
        return
    stepped = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None and not each.is_inference()]
    if stepped:
        increment_version(stepped)


register_optimizer_step_post_hook(_count_writes)


def _configs(dicts: list[dict]) -> list[dict]:
    """The settings of the model and of its parts, each once."""
    configs = {id(each): each for values in dicts if (each := values.get("config")) is not None and hasattr(each, "to_dict")}
    return list(map(vars, configs.values()))


def _columns(rows: Iterable[tuple[dict, list[str]]]) -> list[tuple[Any, list[dict]]]:
    """Dicts by the names that they are asked for: one getter of one name for all dicts that have it."""
    by_name = defaultdict(list)
    for values, names in rows:
        for name in names:
            by_name[name].append(values)
    return [(itemgetter(name), dicts) for name, dicts in by_name.items()]


def _kept(value: Any, depth: int = 4) -> Any:
    """A value as it is now: a container that is changed in place is copied."""
    if depth and type(value) is dict:
        return {key: _kept(item, depth - 1) for key, item in value.items()}
    if depth and type(value) in (list, tuple):
        return type(value)(_kept(item, depth - 1) for item in value)
    return copy(value) if isinstance(value, set | dict | list) else value
