"""Adapters: the KV of one is never that of another, whatever their names, ids and paths."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.serving.processes import NodeProcess
from tests.vllm.engine import BLOCK, Engine

RANK, HIDDEN = 8, 576


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine], node: NodeProcess) -> Engine:
    return make_engine(enable_lora=True, max_lora_rank=RANK, max_loras=2, max_cpu_loras=8)


@pytest.fixture(autouse=True)
def fresh(engine: Engine) -> None:
    engine.forget()


def write_adapter(folder: Path, seed: int) -> Path:
    """Write an adapter that changes the queries and outputs of the attention of two layers."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    made, tensors = torch.Generator().manual_seed(seed), {}
    for layer in (0, 1):
        for name in ("q_proj", "o_proj"):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, HIDDEN, generator=made) / 8
            tensors[f"{place}.lora_B.weight"] = torch.randn(HIDDEN, RANK, generator=made) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapter(name: str, number: int, path: Path) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path))


def test_two_adapters_and_none_do_not_meet(engine: Engine, tmp_path: Path) -> None:
    prompt = engine.prompt(31, 3 * BLOCK + 4)
    given = [None, *(adapter(f"a{number}", number, write_adapter(tmp_path / str(number), number)) for number in (1, 2))]
    colds = [engine.ask(prompt, lora=each) for each in given]
    assert [cold.cached for cold in colds] == [0, 0, 0]
    assert min(colds[0].distance(colds[1]), colds[1].distance(colds[2]), colds[0].distance(colds[2])) > 0
    for each, cold in zip(given, colds, strict=True):
        again = engine.reload(prompt, lora=each)
        assert again.cached == 3 * BLOCK
        again.assert_same(cold)


def test_other_content_under_the_same_name_and_path_does_not_hit(engine: Engine, tmp_path: Path) -> None:
    prompt, path = engine.prompt(32, 3 * BLOCK + 4), write_adapter(tmp_path / "tuned", 3)
    old = engine.ask(prompt, lora=adapter("tuned", 13, path))
    write_adapter(path, 4)
    new = engine.reload(prompt, lora=adapter("tuned", 14, path))
    assert new.cached == 0
    assert new.distance(old) > 0
    again = engine.reload(prompt, lora=adapter("tuned", 14, path))
    assert again.cached == 3 * BLOCK
    again.assert_same(new)


def test_equal_content_under_another_id_and_path_of_the_same_name_is_right(engine: Engine, tmp_path: Path) -> None:
    """vLLM's hashes have the name, so only adapters of one name can share."""
    prompt = engine.prompt(33, 3 * BLOCK + 4)
    first, second = write_adapter(tmp_path / "one", 5), write_adapter(tmp_path / "two", 5)
    cold = engine.ask(prompt, lora=adapter("same", 15, first))
    engine.reload(prompt, lora=adapter("same", 16, second)).assert_same(cold)


def test_an_adapter_whose_files_change_is_not_cached_any_more(engine: Engine, tmp_path: Path) -> None:
    """Which of the two contents vLLM has in memory is not known."""
    prompt, path = engine.prompt(34, 3 * BLOCK + 4), write_adapter(tmp_path / "tuned", 6)
    old = engine.ask(prompt, lora=adapter("changing", 17, path))
    write_adapter(path, 7)
    for _ in range(2):
        again = engine.reload(prompt, lora=adapter("changing", 17, path))
        assert again.cached == 0
        again.assert_same(old)
    engine.llm.llm_engine.remove_lora(17)
    new = engine.reload(prompt, lora=adapter("changing", 17, path))
    assert new.cached == 0
    assert new.distance(old) > 0
    other = engine.reload(prompt, lora=adapter("changing", 18, path))
    assert other.cached == 0, "nothing was stored for the new content"
    other.assert_same(new)


def test_adapters_in_one_batch(engine: Engine, tmp_path: Path) -> None:
    prompt = engine.prompt(35, 3 * BLOCK + 4)
    given = [adapter(f"b{number}", number, write_adapter(tmp_path / str(number), number)) for number in (21, 22)]
    colds = [engine.ask(prompt, lora=each) for each in given]
    engine.forget()
    names = [engine.add(prompt, lora=each) for each in given]
    answers = engine.finish()
    for name, cold in zip(names, colds, strict=True):
        assert answers[name].cached == 3 * BLOCK
        assert answers[name].tokens == cold.tokens
        assert answers[name].distance(cold) < 1e-3
