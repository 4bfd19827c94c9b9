"""`Watch` sees each change of a small module that has every kind of state: tensors of one element are compared by identity too."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiered_kv.integrations.watch import Watch


class Part(nn.Module):
    """Two parameters with equal content, one of one element, one absent; the same for buffers; attributes of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.one = nn.Parameter(torch.ones(1))
        self.register_parameter("absent", None)
        self.register_buffer("number", torch.tensor(2.0))
        self.register_buffer("nothing", None)
        vars(self)["loose"] = torch.tensor(3.0)  # a tensor that is neither a parameter nor a buffer
        self.scale, self.names, self.options = 0.5, ["a", "b"], {"x": [1]}

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.first


class Model(nn.Module):
    """Two parts, so that groups of modules with the same attributes have more than one member."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])


def replace(owner: str, name: str):
    """Replaces a tensor of the last part by a copy of equal content."""

    def change(part: Part) -> None:
        values = vars(part)[owner] if owner else vars(part)
        copy = values[name].detach().clone()
        values[name] = nn.Parameter(copy) if owner == "_parameters" else copy

    return change


def swap(part: Part) -> None:
    values = part._parameters
    first, second = values.pop("first"), values.pop("second")
    values["first"], values["second"] = second, first


CHANGES = {
    "a parameter": replace("_parameters", "first"),
    "a parameter of one element": replace("_parameters", "one"),
    "a buffer of one element": replace("_buffers", "number"),
    "a tensor attribute of one element": replace("", "loose"),
    "parameters that swap their names": swap,
    "a parameter more": lambda part: part.register_parameter("more", nn.Parameter(torch.ones(1))),
    "a parameter less": lambda part: part._parameters.pop("absent"),
    "an absent parameter appears": lambda part: part._parameters.update(absent=nn.Parameter(torch.ones(1))),
    "an absent buffer appears": lambda part: part._buffers.update(nothing=torch.ones(1)),
    "a parameter disappears": lambda part: part._parameters.update(one=None),
    "in place": lambda part: part.second.detach().add_(1),
    "other memory": lambda part: setattr(part.first, "data", torch.ones(3)),
    "other strides": lambda part: setattr(part.first, "data", part.first.data.expand(2, 3)[:, :1].expand(2, 3)),
    "an attribute": lambda part: setattr(part, "scale", 0.6),
    "an attribute in place": lambda part: part.options["x"].append(2),
    "an attribute more": lambda part: setattr(part, "more", 1),
    "an attribute less": lambda part: delattr(part, "scale"),
    "a hook": lambda part: part.register_forward_hook(lambda *_: None),
    "a method": lambda part: setattr(part, "forward", lambda values: values),
    "a class": lambda part: setattr(part, "__class__", type("Other", (Part,), {})),
    "a module more": lambda part: part.add_module("inner", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_seen(change):
    model = Model()
    watch = Watch(model)
    assert watch.holds()
    assert watch.holds()
    CHANGES[change](model.parts[-1])
    assert not watch.holds()
    assert Watch(model).holds()


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.device("cpu")])
def test_an_unchanged_model_holds_in_every_mode(context):
    model = Model()
    watch = Watch(model)
    with context():
        assert watch.holds()
        assert not torch.equal(model.parts[0].first, torch.zeros(3)), "tensors compare as before"
    model.eval()
    assert watch.holds(), "training mode is asked for separately"


class Noting(TorchDispatchMode):
    """Notes all operations of torch."""

    def __init__(self, noted: list) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.noted.append(function)
        return function(*args, **(kwargs or {}))


def test_a_comparison_of_different_tensors_reads_no_content():
    """The first one would compare all of a large weight."""
    model = Model()
    watch, compared = Watch(model), []
    replace("_parameters", "first")(model.parts[0])
    with Noting(compared):
        assert not watch.holds()
    assert compared == []
