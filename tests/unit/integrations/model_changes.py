"""Functions that change the KV of a tiny llama. Each returns a function that reverts the change, or None."""

import sys
import types
from contextlib import contextmanager

import torch
from torch.nn.modules import module as torchs


def layer(model, number=0):
    return model.model.layers[number]


def training_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()


def fused_training_step(model):
    """Which writes past autograd."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()


def other_weights(model):
    return {name: value.flip(0) if value.ndim > 1 else value.clone() for name, value in model.state_dict().items()}


def loaded_weights(model):
    model.load_state_dict(other_weights(model))


def assigned_weights(model):
    model.load_state_dict(other_weights(model), assign=True)


def in_place(model):
    with torch.no_grad():
        layer(model).self_attn.k_proj.weight.mul_(1.5)


def other_memory(model):
    weight = layer(model).self_attn.k_proj.weight
    before = weight.data
    weight.data = weight.data * 1.5

    def undo():
        weight.data = before

    return undo


def turned_memory(model):
    weight = layer(model).self_attn.q_proj.weight
    weight.data = weight.data.t()

    def undo():
        weight.data = weight.data.t()

    return undo


def memory_there_and_back(model):
    """Replace weights twice, as a trainer does. The second copy may get the address of the freed first one."""
    weight = layer(model).self_attn.v_proj.weight
    for factor in (1.5, 1.5):
        weight.data = weight.data * factor


def replaced_parameter(model):
    attention = layer(model).self_attn
    before = attention.v_proj.weight
    attention.v_proj.weight = torch.nn.Parameter(before.detach() * 2)
    return lambda: setattr(attention.v_proj, "weight", before)


def added_bias(model):
    projection = layer(model).self_attn.v_proj
    projection.bias = torch.nn.Parameter(torch.ones(projection.out_features))


def hook(model):
    return layer(model).register_forward_hook(lambda module, given, output: output + torch.arange(32) / 32).remove


def pre_hook(model):
    return layer(model, 1).register_forward_pre_hook(lambda module, given: (given[0] + torch.arange(32) / 32, *given[1:])).remove


def hook_of_all_modules(model):
    embedding = model.model.embed_tokens
    return torchs.register_module_forward_hook(
        lambda module, given, output: output + torch.arange(32) / 32 if module is embedding else None
    ).remove


def rope_in_place(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def rope_replaced(model):
    rope = model.model.rotary_emb
    before = rope.inv_freq
    rope.inv_freq = before * 0.5
    return lambda: setattr(rope, "inv_freq", before)


def number(where, name, factor):
    def change(model):
        module = where(model)
        before = getattr(module, name)
        setattr(module, name, before * factor)
        return lambda: setattr(module, name, before)

    return change


attention_scaling = number(lambda model: model.model.rotary_emb, "attention_scaling", 1.3)
scaling = number(lambda model: layer(model).self_attn, "scaling", 2.0)
epsilon = number(lambda model: layer(model).input_layernorm, "variance_epsilon", 1e6)


def replaced_module(model):
    mlp = layer(model).mlp
    before, mlp.act_fn = mlp.act_fn, torch.nn.Tanh().eval()
    return lambda: setattr(mlp, "act_fn", before)


def replaced_class(model):
    class Scaled(type(layer(model).mlp)):
        def forward(self, x):
            return super().forward(x) * 2

    mlp = layer(model).mlp
    before, mlp.__class__ = type(mlp), Scaled
    return lambda: setattr(mlp, "__class__", before)


def patched_forward(model):
    mlp = layer(model).mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) * 2
    return lambda: delattr(mlp, "forward")


def patched_class(model):
    kind = type(layer(model).mlp)
    plain = kind.forward
    kind.forward = lambda self, x: plain(self, x) * 2
    return lambda: setattr(kind, "forward", plain)


def patched_call(model):
    kind = type(layer(model).mlp)
    plain = kind.__call__
    kind.__call__ = lambda self, *given: plain(self, *given) * 2
    return lambda: delattr(kind, "__call__")


def patched_function(model):
    code = sys.modules[type(model).__module__]
    plain = code.rotate_half
    code.rotate_half = lambda x: -plain(x)
    return lambda: setattr(code, "rotate_half", plain)


def part_in_training(model):
    layer(model).self_attn.attention_dropout = 0.5
    layer(model).self_attn.train()


STATIC = {
    "a hook": hook,
    "a replaced module": replaced_module,
    "a patched forward": patched_forward,
    "attention_scaling": attention_scaling,
    "scaling": scaling,
    "an epsilon": epsilon,
    "a buffer that is not persistent": rope_in_place,
}
"""The changes that digests of weights and settings do not detect."""

CHANGES = STATIC | {
    "a training step": training_step,
    "a training step, fused": fused_training_step,
    "memory turned": turned_memory,
    "a patched call": patched_call,
    "a patched function": patched_function,
    "load_state_dict": loaded_weights,
    "load_state_dict, assigned": assigned_weights,
    "in place": in_place,
    "other memory": other_memory,
    "other memory twice": memory_there_and_back,
    "a replaced parameter": replaced_parameter,
    "a new bias": added_bias,
    "a pre-hook": pre_hook,
    "a hook of all modules": hook_of_all_modules,
    "a replaced buffer": rope_replaced,
    "another class": replaced_class,
    "a patched class": patched_class,
}


class LoraLinear(torch.nn.Module):
    """A linear layer with adapters, with the names and methods of peft's layers."""

    def __init__(self, base, names, rank=4):
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for name in names:
            self.lora_A[name] = torch.nn.Linear(base.in_features, rank, bias=False)
            self.lora_B[name] = torch.nn.Linear(rank, base.out_features, bias=False)
        self.scaling = dict.fromkeys(names, 2.0)
        self.merged_adapters = []
        self._active_adapter = [names[0]]
        self._disable_adapters = False
        self.eval()

    def forward(self, x):
        output = self.base_layer(x)
        for name in [] if self._disable_adapters else self._active_adapter:
            output = output + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]
        return output

    def scale_layer(self, factor):
        for name in self._active_adapter:
            self.scaling[name] *= factor


class StandIn:
    """A stand-in for peft: the few methods that switch adapters, on a model with `LoraLinear` layers."""

    def __init__(self, model):
        self.layers = []
        for each in model.model.layers:
            each.self_attn.v_proj = LoraLinear(each.self_attn.v_proj, ["first", "second"])
            self.layers.append(each.self_attn.v_proj)
        model.peft_config = {name: types.SimpleNamespace(peft_type="LORA", to_dict=lambda: {"r": 4}) for name in ("first", "second")}
        self.model = model

    def set_adapter(self, name):
        for each in self.layers:
            each._active_adapter = [name]

    @contextmanager
    def disable_adapter(self):
        self.enable(False)
        yield
        self.enable(True)

    def enable(self, enabled):
        for each in self.layers:
            each._disable_adapters = not enabled


class RealPeft(StandIn):
    """The same methods with peft itself."""

    def __init__(self, model):
        import peft

        config = peft.LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False, lora_dropout=0.0)
        self.model = peft.get_peft_model(model, config, adapter_name="first")
        self.model.add_adapter("second", config)
        self.model.eval()
        self.layers = [each.self_attn.v_proj for each in model.model.layers]
        self.set_adapter = self.model.set_adapter
        self.disable_adapter = self.model.disable_adapter

    def enable(self, enabled):
        base = self.model.base_model
        base.enable_adapter_layers() if enabled else base.disable_adapter_layers()
