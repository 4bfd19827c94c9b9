"""Traces for tests: in memory, as files, and as hypothesis strategies."""

import json
from pathlib import Path

from hypothesis import strategies as st

from tests.contracts.policy import chain_to
from tiered_kv.tools.simulate.trace import Trace, read_trace

BLOCK_TOKENS = 10
DATA = Path(__file__).parents[2] / "data" / "sim"


def line(time_ms: float, ids: list, input_tokens: int | None = None, output_tokens: int = 5) -> dict:
    """Returns a request for a trace file. Its last id is a partial block, unless `input_tokens` is given."""
    tokens = len(ids) * BLOCK_TOKENS - 3 if input_tokens is None else input_tokens
    return {"timestamp": time_ms, "input_length": tokens, "output_length": output_tokens, "hash_ids": ids}


def write(path: Path, lines: list) -> Path:
    """Writes a trace file. Lines that are strings are written as they are, others as JSON."""
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


def trace_of(folder: Path, chains: list[list]) -> Trace:
    """Returns a trace with one chain of full blocks a second."""
    lines = [line(1000 * at, chain, len(chain) * BLOCK_TOKENS) for at, chain in enumerate(chains)]
    return read_trace(write(folder / "trace.jsonl", lines), block_tokens=BLOCK_TOKENS)


CHAINS = st.lists(st.integers(1, 40).map(chain_to), min_size=1, max_size=50)
"""Chains of one binary tree, one for each request."""
