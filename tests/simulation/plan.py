"""The plan of a simulation: everything that a seed decides before it starts. It can be made smaller and run again.

Each seed switches some operations and faults off ("swarm testing", Groce et al., ISSTA 2012): a fault that happens all the time
hides bugs that show only without it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, NamedTuple

DOCUMENTS = 8
BLOCKS = 6
SHARE, SHARES = 0.3, {"bad frames": 0.6, "bad disk": 0.5, "crash while packing": 0.5}
"""The share of seeds in which a fault may happen: larger for those that only do harm at certain moments."""
RUN_S = 0.6
"""For about this long, in simulated seconds, faults happen."""


class Step(NamedTuple):
    """One operation of a worker, or one fault. `at_s`: when a fault happens, or how long a worker waits before the operation."""

    who: str
    what: str
    at_s: float
    arguments: dict[str, Any]

    def __str__(self) -> str:
        arguments = " ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.who:4} {self.what} {arguments}".rstrip()


@dataclass(frozen=True)
class Plan:
    """A simulation that can be run.

    `settings`: those of the nodes. `threads`: of each worker. `engines`: the workers with pages of their own. `streams`: whether blocks
    and look-ups go through streams, or only through the link that stands for Ray. `steps`: operations in each worker's order, and faults
    in theirs.
    """

    seed: int
    nodes: int
    workers: int
    settings: dict[str, Any]
    switch_share: float
    step_s: float
    fences: bool
    threads: int = 1
    engines: frozenset[int] = frozenset()
    streams: bool = False
    steps: list[Step] = field(default_factory=list)

    def without(self, dropped: set[int]) -> "Plan":
        """Returns the plan without the steps of these numbers."""
        return replace(self, steps=[step for number, step in enumerate(self.steps) if number not in dropped])

    def node_of(self, worker: int) -> str:
        """Returns the node on whose machine a worker runs."""
        return f"n{worker % self.nodes}"


Drawn = dict[str, Any]
OPERATIONS: dict[str, Callable[[Random], Drawn]] = {
    "fetch": lambda draw: {"document": draw.randrange(DOCUMENTS), "blocks": draw.randint(1, BLOCKS), "ms": draw.choice((20, 100, 1000))},
    "store": lambda draw: {"document": draw.randrange(DOCUMENTS), "blocks": draw.randint(1, BLOCKS)},
    "match": lambda draw: {"document": draw.randrange(DOCUMENTS)},
    "hint": lambda draw: {"document": draw.randrange(DOCUMENTS), "pinned_s": draw.choice((0.1, 1.0))},
    "reopen": lambda draw: {},
    "new_epoch": lambda draw: {"epoch": draw.randrange(3)},
    "stats": lambda draw: {},
}
WEIGHTS = {"fetch": 10, "store": 8, "match": 1, "hint": 1, "reopen": 0.5, "new_epoch": 0.5, "stats": 0.5}


def _node(draw: Random, nodes: int) -> str:
    return f"n{draw.randrange(nodes)}"


FAULTS: dict[str, Callable[[Random, int, int], tuple[str, Drawn]]] = {
    "crash": lambda draw, nodes, workers: (
        _node(draw, nodes),
        {"steps": draw.randrange(400), "again_s": draw.choice((0.0, 0.3)) * draw.random()},
    ),
    "crash while packing": lambda draw, nodes, workers: (_node(draw, nodes), {"again_s": draw.choice((0.0, 0.01)) * draw.random()}),
    "remove files": lambda draw, nodes, workers: (_node(draw, nodes), {"again_s": draw.choice((0.0, 0.3)) * draw.random()}),
    "restart": lambda draw, nodes, workers: (_node(draw, nodes), {"remove": draw.random() < 0.3}),
    "stop": lambda draw, nodes, workers: (_node(draw, nodes), {"for_s": draw.random() * 0.5}),
    "slow": lambda draw, nodes, workers: (_node(draw, nodes), {"pause_s": draw.choice((0.001, 0.05)), "for_s": draw.random() * 0.5}),
    "crash worker": lambda draw, nodes, workers: (f"w{draw.randrange(workers)}", {"steps": draw.randrange(300)}),
    "crash coordinator": lambda draw, nodes, workers: (
        "coordinator",
        {"steps": draw.randrange(50), "again_s": draw.choice((0.0, 0.3)) * draw.random()},
    ),
    "stop coordinator": lambda draw, nodes, workers: ("coordinator", {"for_s": draw.random() * 0.5}),
    "cut": lambda draw, nodes, workers: (
        _node(draw, nodes),
        {"from_": draw.choice(("coordinator", _node(draw, nodes))), "for_s": draw.random() * 0.5},
    ),
    "full disk": lambda draw, nodes, workers: (_node(draw, nodes), {"for_s": draw.random() * 0.5}),
    "bad disk": lambda draw, nodes, workers: (
        _node(draw, nodes),
        {
            "errors": draw.choice((0.0, 0.3)),
            "flips": draw.choice((0.0, 0.3)),
            "misdirected": draw.choice((0.0, 0.7)),
            "for_s": draw.random(),
        },
    ),
    "slow disk": lambda draw, nodes, workers: (_node(draw, nodes), {"pause_s": draw.choice((0.01, 0.5)), "for_s": draw.random() * 0.5}),
    "hung disk": lambda draw, nodes, workers: (_node(draw, nodes), {"for_s": draw.random() * 0.5}),
    "torn write": lambda draw, nodes, workers: (_node(draw, nodes), {"again_s": draw.choice((0.0, 0.3)) * draw.random()}),
    "flip": lambda draw, nodes, workers: (_node(draw, nodes), {"where": draw.choice(("disk", "host", "index"))}),
    "bad objects": lambda draw, nodes, workers: (
        _node(draw, nodes),
        {"errors": draw.choice((0.0, 0.3)), "pause_s": draw.choice((0.001, 0.3)), "for_s": draw.random() * 0.5},
    ),
    "wall clock": lambda draw, nodes, workers: ("", {"jump_s": draw.choice((-3600.0, 3600.0))}),
    "bad network": lambda draw, nodes, workers: (
        "",
        {
            "lost": draw.choice((0.0, 0.2)),
            "twice": draw.choice((0.0, 0.3)),
            "delay_s": draw.choice((0.002, 0.2)),
            "for_s": draw.random() * 0.5,
        },
    ),
    "bad frames": lambda draw, nodes, workers: (
        "",
        {"damaged": draw.choice((0.0, 0.5)), "misdirected": draw.choice((0.2, 1.0)), "for_s": draw.random() * 0.5},
    ),
    "bad sockets": lambda draw, nodes, workers: (
        "",
        {"breaks": draw.choice((0.0, 0.05)), "delay_s": draw.choice((0.0, 0.02)), "for_s": draw.random() * 0.5},
    ),
}


def plan_of(seed: int) -> Plan:
    """Returns the plan of a seed."""
    draw = Random(seed)
    nodes = draw.choice((1, 1, 2, 2, 3))
    workers = nodes + draw.randrange(3)
    settings: dict[str, Any] = {
        "host": draw.choice((32 << 10, 48 << 10, 96 << 10)),
        "disk": draw.choice((0, 64 << 10, 128 << 10)),
        "device": draw.choice((0, 12 << 10, 16 << 10)),
        "policy": draw.choice(("lru", "adaptive", "s3fifo")),
        "verify_host": draw.random() < 0.3,
        "codec": draw.choice((None, None, "host=lossless")),
        "io_threads": draw.randint(1, 2),
        "objects_cap": draw.choice((0, 0, 0, 128 << 10)),
    }
    steps = _faults(draw, nodes, workers, settings)
    engines = draw.choice((0.0, 0.0, 0.5, 1.0))
    documents, wait_s = draw.sample(range(DOCUMENTS), draw.randint(2, DOCUMENTS)), draw.choice((0.001, 0.01, 0.05))
    for worker in range(workers):
        steps += _operations(draw, worker, documents, wait_s)
    return Plan(
        seed=seed,
        nodes=nodes,
        workers=workers,
        settings=settings,
        switch_share=draw.choice((0.05, 0.2, 0.5)),
        step_s=draw.choice((2e-6, 2e-5)),
        fences=draw.random() < 0.8,
        threads=draw.choice((1, 1, 2)),
        engines=frozenset(worker for worker in range(workers) if draw.random() < engines),
        streams=draw.random() < 0.6,
        steps=steps,
    )


def _faults(draw: Random, nodes: int, workers: int, settings: Drawn) -> list[Step]:
    enabled = [name for name in FAULTS if draw.random() < SHARES.get(name, SHARE) and _applies(name, nodes, settings)]
    steps: list[Step] = []
    for _ in range(draw.randint(0, 10) if enabled else 0):
        name = draw.choice(enabled)
        who, arguments = FAULTS[name](draw, nodes, workers)
        if name == "flip" and not _may_flip(arguments["where"], settings):
            continue
        steps.append(Step(who, name, draw.random() * RUN_S, arguments))
    return sorted(steps, key=lambda step: step.at_s)


def _applies(name: str, nodes: int, settings: Drawn) -> bool:
    if name == "bad objects":
        return bool(settings["objects_cap"])
    return (bool(settings["disk"]) or ("disk" not in name and name != "torn write")) and (nodes > 1 or name != "bad frames")


def _may_flip(where: str, settings: Drawn) -> bool:
    """Whether docs/failures.md promises that a bit flipped there is found before a worker gets the bytes."""
    if where == "disk":
        return bool(settings["disk"])
    return settings["verify_host"] and not settings["device"] if where == "host" else not settings["device"]


def _operations(draw: Random, worker: int, documents: list[int], wait_s: float) -> list[Step]:
    enabled = [name for name in OPERATIONS if name in ("fetch", "store") or draw.random() < 0.3]
    weights = [WEIGHTS[name] for name in enabled]
    steps = []
    for _ in range(draw.randint(10, 40)):
        name = draw.choices(enabled, weights)[0]
        arguments = OPERATIONS[name](draw)
        if "document" in arguments:
            arguments["document"] = draw.choice(documents)
        steps.append(Step(f"w{worker}", name, draw.choice((0.0, 0.0, 0.1, 1.0)) * draw.random() * wait_s, arguments))
    return steps
