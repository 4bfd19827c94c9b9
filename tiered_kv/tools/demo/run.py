"""Runs the demo: starts a cluster and replicas, asks the questions, and compares the outputs with the reference."""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tiered_kv.cluster import start, status, stop
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.demo import report, workload
from tiered_kv.tools.demo.model import ensure_default_model, load_words

LOAD_WITHIN_S = 600.0
ANSWER_WITHIN_S = 900.0


@dataclass(frozen=True)
class DemoOptions:
    """The options of the demo; see `tiered-kv demo --help`.

    Raises (kind `config`) naming the option if a value is below 1.
    """

    model: str | None = None
    prompts: str | None = None
    dtype: str = "float32"
    replicas: int = 2
    nodes: int = 2
    new_tokens: int = 16
    questions: int = 4

    def __post_init__(self) -> None:
        for setting in ("replicas", "nodes", "new_tokens"):
            value, flag = getattr(self, setting), setting.replace("_", "-")
            if value < 1:
                raise TieredKVError(Kind.CONFIG, f"--{flag}: must be at least 1, got {value}", setting=setting)


def run_demo(options: DemoOptions, config: Config, console: Console) -> dict:
    """Run the demo and print its tables.

    Returns the results as data for JSON. At the end everything that it started is stopped, also after an error or Ctrl-C.
    """
    asked = workload.questions_from(options.prompts) if options.prompts else workload.own_questions(options.questions)
    model = options.model or str(ensure_default_model(console.print))
    prompts, tokenizer = prompts_of(model, asked, options.new_tokens)
    name = f"demo-{os.getpid()}"
    with ExitStack() as stack:
        start.up(config, name=name, nodes=options.nodes, log=console.print)
        stack.callback(stop.down, name)
        with _Processes(options, model, name, console) as processes:
            requests = _ask(options, processes, asked, prompts, console)
            about = processes.about
        cluster = status.summarize(start.describe(name))
    for request in requests:
        request |= {name: tokenizer.decode(request[f"{name.removesuffix('text')}ids"]) for name in ("output_text", "reference_text")}
    result = report.summarize(options, about, requests, cluster, config)
    report.show(result, console)
    return result


def prompts_of(model: str, asked: list[workload.Question], new_tokens: int) -> tuple[list[list[int]], Any]:
    """Returns the token ids of each question's prompt, and the tokenizer.

    Raises (kind `config`) if a prompt is empty or too long for the model.
    """
    config, tokenizer = load_words(model)
    longest = getattr(config, "max_position_embeddings", None)
    prompts = [workload.prompt_ids(tokenizer, question) for question in asked]
    for number, ids in enumerate(prompts, start=1):
        if not ids:
            raise TieredKVError(Kind.CONFIG, f"--prompts: the prompt of question {number} has no tokens", setting="prompts")
        if longest and len(ids) + new_tokens > longest:
            message = f"question {number} has {len(ids)} tokens; with {new_tokens} new ones the model allows at most {longest}"
            raise TieredKVError(Kind.CONFIG, f"--prompts: {message}", setting="prompts")
    return prompts, tokenizer


class _Processes:
    """The replicas, distributed over the Ray nodes, and the reference. Each is a Ray actor with its own model."""

    def __init__(self, options: DemoOptions, model: str, cluster: str, console: Console) -> None:
        from tiered_kv.tools.demo.replica import Reference, Replica

        ray_nodes = [node["ray_node_id"] for node in start.describe(cluster)["nodes"]]
        self._actors: list[Any] = []
        try:
            with _progress(console) as progress:
                task = progress.add_task(f"loading {options.replicas} replicas and the reference", total=options.replicas + 1)
                facts = (model, options.dtype, thread_count())
                self.replicas = [
                    self._start(Replica, ray_nodes[number % len(ray_nodes)], chr(ord("A") + number % 26), *facts, cluster)
                    for number in range(options.replicas)
                ]
                for replica in self.replicas:
                    self.about = _get(replica.describe.remote(), LOAD_WITHIN_S)
                    progress.advance(task)
                self.reference = self._start(Reference, ray_nodes[0], *facts, self.about["block_tokens"])
                _get(self.reference.__ray_ready__.remote(), LOAD_WITHIN_S)
                progress.advance(task)
        except BaseException:
            self.close()
            raise

    def _start(self, kind: type, ray_node: str, *arguments: Any) -> Any:
        here = NodeAffinitySchedulingStrategy(ray_node, soft=False)
        # without this setting Ray gives an actor with num_cpus=0 one thread
        environment = {"env_vars": {"OMP_NUM_THREADS": str(thread_count())}}
        actor = ray.remote(kind).options(num_cpus=0, scheduling_strategy=here, runtime_env=environment).remote(*arguments)
        self._actors.append(actor)
        return actor

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(
    options: DemoOptions, processes: _Processes, asked: list[workload.Question], prompts: list[list[int]], console: Console
) -> list[dict]:
    """Ask each question to the next replica in turn, so that different replicas get successive questions about a document.

    The reference answers each question right after the replica, so that both run under the same load. Returns one record for
    each question.
    """
    requests = []
    with _progress(console) as progress:
        task = progress.add_task("answering", total=len(asked))
        for number, (question, ids) in enumerate(zip(asked, prompts, strict=True)):
            progress.update(task, description=f"asking about {question.title}")
            replica = processes.replicas[number % len(processes.replicas)]
            answer = _get(replica.answer.remote(ids, options.new_tokens), ANSWER_WITHIN_S)
            progress.update(task, description=f"comparing, {question.title}")
            compared = _compared(processes.reference, ids, options, answer)
            requests.append({"document": question.title, "question": question.question, "prompt_ids": ids, **answer, **compared})
            progress.advance(task)
    return requests


def _compared(reference: Any, ids: list[int], options: DemoOptions, answer: dict) -> dict:
    """Answer the same prompt without the cache, and compare the outputs.

    The reference reuses the KV of as many tokens as the replica did, but within one process. In float32 it also runs one plain
    generate. Returns the fields to add to the request's record.
    """
    reusing = _get(reference.reusing.remote(ids, options.new_tokens, answer["reused_tokens"]), ANSWER_WITHIN_S)
    expected = reusing
    if options.dtype == "float32":
        expected = _get(reference.plain.remote(ids, options.new_tokens), ANSWER_WITHIN_S)
    return {
        "in_process_ttft_s": reusing["ttft_s"],
        "plain_ttft_s": expected["ttft_s"] if expected is not reusing else None,
        "reference_ids": expected["output_ids"],
        "equal": answer["output_ids"] == expected["output_ids"],
    }


def _get(reference: Any, wait_s: float) -> Any:
    try:
        return ray.get(reference, timeout=wait_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TieredKVError):
            raise error.cause from error
        raise TieredKVError(Kind.MODEL, f"a replica failed: {error}") from error
    except ray.exceptions.RayError as error:
        raise TieredKVError(Kind.CLUSTER, f"a replica did not answer: {error}") from error


def thread_count() -> int:
    """Returns the number of threads of each model: that of OMP_NUM_THREADS, which torch obeys too, else one for each core."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else os.cpu_count() or 1


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
