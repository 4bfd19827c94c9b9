"""Answers from the cache equal answers computed cold, to the last bit."""

from collections.abc import Callable

import pytest
import torch

from tests.unit.serving.processes import NodeProcess
from tests.vllm.engine import ANSWER, BLOCK, Engine


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., Engine], node: NodeProcess) -> Engine:
    return make_engine(enable_prompt_embeds=True)


@pytest.fixture(autouse=True)
def fresh(engine: Engine) -> None:
    """Each test begins with nothing in vLLM's own cache."""
    engine.forget()


def salted(prompt: list[int], salt: str) -> dict[str, object]:
    return {"prompt_token_ids": prompt, "cache_salt": salt}


def test_repeat_and_reload(engine: Engine) -> None:
    prompt = engine.prompt(1, 4 * BLOCK + 10)
    cold = engine.ask(prompt)
    assert engine.counts["stored_blocks"] == 4
    repeat = engine.ask(prompt)
    for _ in range(3):
        again = engine.reload(prompt)
        assert (cold.cached, repeat.cached, again.cached) == (0, 4 * BLOCK, 4 * BLOCK)
        assert engine.counts["loaded_blocks_host"] == engine.counts["loaded_blocks"] == 4
        assert not engine.counts["failed_blocks"] and not engine.counts["stored_blocks"]
        repeat.assert_same(cold)
        again.assert_same(cold)


def test_another_prompt_with_the_same_end_gets_nothing(engine: Engine) -> None:
    prompt, other = engine.prompt(2, 3 * BLOCK), engine.prompt(3, 3 * BLOCK)
    first = engine.ask(prompt)
    mixed = engine.reload(other[:BLOCK] + prompt[BLOCK:])
    assert mixed.cached == 0
    assert mixed.distance(first) > 0


def test_the_next_turn_loads_blocks_made_while_decoding(engine: Engine) -> None:
    prompt = engine.prompt(4, BLOCK + 5)
    first = engine.ask(prompt, max_tokens=2 * BLOCK)
    turn = prompt + first.tokens + engine.prompt(5, 20)
    complete = (len(prompt) + 2 * BLOCK - 1) // BLOCK  # the last token of an answer has no KV yet
    repeat = engine.ask(turn)
    assert repeat.cached == complete * BLOCK
    again = engine.reload(turn)
    assert again.cached == engine.counts["loaded_blocks"] * BLOCK == len(turn) // BLOCK * BLOCK
    again.assert_same(repeat)
    cold = engine.reload(salted(turn, "cold"))
    assert (cold.cached, cold.tokens) == (0, again.tokens)
    assert again.distance(cold) < 1e-4  # KV made token by token is rounded otherwise than KV made at once, in vLLM's own cache as well


def test_part_from_vllm_and_part_from_us(engine: Engine) -> None:
    prompt = engine.prompt(6, 4 * BLOCK + 3)
    cold = engine.ask(prompt)
    engine.forget()
    engine.ask(prompt[: BLOCK + 1])
    engine.counts.clear()
    mixed = engine.ask(prompt)
    assert mixed.cached == 4 * BLOCK
    assert engine.counts["loaded_blocks"] == 3
    mixed.assert_same(cold)


def test_part_from_us_and_the_rest_computed(engine: Engine) -> None:
    prompt = engine.prompt(7, 5 * BLOCK + 3)
    cold = engine.ask(salted(prompt, "cold"))
    engine.ask(prompt[: 2 * BLOCK + 1])
    mixed = engine.reload(prompt)
    assert mixed.cached == 2 * BLOCK
    assert engine.counts["stored_blocks"] == 3
    mixed.assert_same(cold)
    whole = engine.reload(prompt)
    assert whole.cached == 5 * BLOCK
    whole.assert_same(cold)


def test_a_prompt_that_ends_with_a_block(engine: Engine) -> None:
    prompt = engine.prompt(8, 4 * BLOCK)
    cold = engine.ask(prompt)
    again = engine.reload(prompt)
    assert again.cached == engine.counts["loaded_blocks"] * BLOCK == 3 * BLOCK  # vLLM computes the last block for its logits
    again.assert_same(cold)


@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_short_prompts(engine: Engine, tokens: int) -> None:
    prompt = engine.prompt(9, tokens)
    cold = engine.ask(salted(prompt, "cold"))
    engine.ask(prompt)
    again = engine.reload(prompt)
    assert again.cached == (tokens - 1) // BLOCK * BLOCK
    again.assert_same(cold)


def test_a_batch_of_four_of_which_two_share_a_prefix(engine: Engine) -> None:
    prompts = [engine.prompt(seed, 3 * BLOCK + seed) for seed in (11, 12, 13)]
    prompts.append(prompts[0][: 2 * BLOCK] + engine.prompt(14, BLOCK))
    alone = [engine.reload(salted(prompt, "alone")) for prompt in prompts]
    engine.forget()
    engine.run(*prompts)
    repeat = engine.run(*prompts)
    engine.forget()
    again = engine.run(*prompts)
    for mine, theirs, cold in zip(again, repeat, alone, strict=True):
        assert mine.cached >= 2 * BLOCK
        mine.assert_same(theirs)
        assert mine.tokens == cold.tokens
        assert mine.distance(cold) < 1e-4  # a batch's products are rounded otherwise, with or without a cache
    assert not engine.counts["failed_blocks"]


def test_equal_requests_at_the_same_time(engine: Engine) -> None:
    prompt = engine.prompt(15, 3 * BLOCK + 4)
    cold = engine.ask(prompt)
    engine.forget()
    for answer in engine.run(*[prompt] * 4):
        assert answer.tokens == cold.tokens
        assert answer.distance(cold) < 1e-4
    assert engine.counts["loaded_blocks"] == 3, "the others use the blocks that were loaded for the first"


def test_salts_separate(engine: Engine) -> None:
    prompt = engine.prompt(16, 3 * BLOCK + 4)
    cold = engine.ask(salted(prompt, "one"))
    assert engine.reload(salted(prompt, "two")).cached == 0
    assert engine.reload(prompt).cached == 0
    again = engine.reload(salted(prompt, "one"))
    assert again.cached == 3 * BLOCK
    again.assert_same(cold)


def test_a_reset_forgets(engine: Engine) -> None:
    prompt = engine.prompt(17, 3 * BLOCK + 4)
    cold = engine.ask(prompt)
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    engine.zero()
    again = engine.ask(prompt)
    assert again.cached == 0
    again.assert_same(cold)
    third = engine.reload(prompt)
    assert third.cached == 3 * BLOCK
    third.assert_same(cold)


def embeddings(engine: Engine, prompt: list[int]) -> torch.Tensor:
    return engine.runner.model.model.embed_tokens(torch.tensor(prompt)).detach().clone()


def test_prompt_embeddings(engine: Engine) -> None:
    first = {"prompt_embeds": embeddings(engine, engine.prompt(18, 3 * BLOCK + 4))}
    second = {"prompt_embeds": embeddings(engine, engine.prompt(19, 3 * BLOCK + 4))}
    colds = [engine.ask(first), engine.ask(second)]
    assert colds[1].cached == 0, "all embeddings have the same token ids"
    assert colds[0].distance(colds[1]) > 0
    for each, cold in zip((first, second), colds, strict=True):
        again = engine.reload(each)
        assert again.cached in (0, 3 * BLOCK)
        again.assert_same(cold)
    changed = first["prompt_embeds"].clone()
    changed[0, 0] += 1.0
    assert engine.reload({"prompt_embeds": changed}).cached == 0


def test_embeddings_and_tokens_do_not_meet(engine: Engine) -> None:
    prompt = engine.prompt(20, 2 * BLOCK + 4)
    zeros = [0] * len(prompt)
    cold = engine.ask(salted(zeros, "cold"))
    engine.ask({"prompt_embeds": embeddings(engine, prompt)})
    again = engine.reload(zeros)
    assert again.cached == 0
    again.assert_same(cold)


def test_sampling_with_prompt_logprobs_computes_the_prompt(engine: Engine) -> None:
    """vLLM skips its own cache for them, so a load would be of no use and must not happen."""
    prompt = engine.prompt(21, 2 * BLOCK + 4)
    cold = engine.ask(prompt)
    again = engine.reload(prompt, prompt_logprobs=1)
    assert again.cached == 0
    again.assert_same(cold)


def test_counts_agree(engine: Engine) -> None:
    prompt = engine.prompt(22, 4 * BLOCK + 4)
    engine.ask(prompt)
    longer = prompt[: 2 * BLOCK] + engine.prompt(23, 2 * BLOCK + 4)
    again = engine.reload(longer)
    assert again.cached == 2 * BLOCK
    assert (engine.counts["asked_blocks"], engine.counts["promised_blocks"], engine.counts["loaded_blocks"]) == (4, 2, 2)
    assert len(again.tokens) == ANSWER
