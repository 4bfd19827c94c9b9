"""The command `tiered-kv explain`: its report, its choice of a namespace, and its errors."""

import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tiered_kv
from tests.unit.serving.processes import NodeProcess
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv import Namespace
from tiered_kv.cluster.commands.cli import main
from tiered_kv.cluster.commands.explain import choose, read_tokens, show
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.model_info import ModelInfo

PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)
pytestmark = pytest.mark.usefixtures("nursery")


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def node(name: str) -> Iterator[NodeProcess]:
    with NodeProcess(name) as node:
        yield node


@pytest.fixture
def tokens_file(tmp_path: Path) -> str:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps([*TOKENS, *tokens_of((5,)), 7]))
    return str(path)


def store(name: str, namespace: Namespace = NAMESPACE) -> None:
    with tiered_kv.attach(namespace=namespace, layout=LAYOUT, cluster=name) as client:
        assert client.store(TOKENS, KV).refused == 0


def explained(capsys, *arguments: str) -> dict:
    assert main(["explain", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments: str) -> str:
    """Runs the command, which must end with status 1 or 2. Returns its error text."""
    status = main(["explain", *arguments])
    text = capsys.readouterr().out
    assert status == (2 if "(config)" in text else 1)
    assert "Traceback" not in text
    return " ".join(text.split())


def test_the_only_namespace_of_the_node_is_used(name: str, node: NodeProcess, tokens_file: str, capsys) -> None:
    store(name)
    report = explained(capsys, "--tokens", tokens_file, "--name", name)
    assert [block["why"] for block in report["blocks"]] == ["hit"] * 4 + ["never_stored"]
    assert (report["tokens"], report["hit_tokens"], report["block_tokens"]) == (81, 64, 16)
    assert report["whys"] == {"hit": 4, "never_stored": 1}
    assert report["namespace"]["weights"] == NAMESPACE.weights
    assert main(["explain", "--tokens", tokens_file, "--name", name]) == 0
    text = capsys.readouterr().out
    assert "0–3" in text and "64–79" in text and "never stored" in text
    assert "a fetch would return 64 of 81 tokens" in text


def test_a_namespace_is_chosen_by_its_fields(name: str, node: NodeProcess, tokens_file: str, capsys) -> None:
    store(name)
    with tiered_kv.attach(namespace=replace(NAMESPACE, dtype="bfloat16"), layout=LAYOUT, cluster=name):
        pass
    assert "must fit one of these namespaces" in refused(capsys, "--tokens", tokens_file, "--name", name)
    report = explained(capsys, "--tokens", tokens_file, "--name", name, "--namespace", "dtype=bf")
    assert report["whys"] == {"other_namespace": 4, "never_stored": 1}
    assert report["blocks"][0]["details"]["fields"] == {"dtype": ["bfloat16", ""]}
    assert explained(capsys, "--tokens", tokens_file, "--name", name, "--namespace", "dtype=")["hit_tokens"] == 64


def test_the_command_does_not_change_how_the_model_is_described(name: str, node: NodeProcess, tokens_file: str, capsys) -> None:
    with tiered_kv.attach(namespace=NAMESPACE, layout=LAYOUT, cluster=name, rope=b"\0" * 32, rope_halves=False) as client:
        client.store(TOKENS, KV)
        explained(capsys, "--tokens", tokens_file, "--name", name)
        with client._pool.session(5.0) as session:
            [known] = session.namespaces("default")
    assert (known["rope"], known["rope_halves"]) == (b"\0" * 32, False)


def test_a_model_and_a_prompt_name_the_namespace_and_the_tokens(name: str, node: NodeProcess, tmp_path: Path, capsys) -> None:
    model, folder = saved_model(tmp_path)
    prompt = " ".join(f"w{at % 90}" for at in range(70))
    with tiered_kv.attach(model, block_tokens=64, cluster=name) as client:
        kv = client.layout
        ids = [at % 90 + 1 for at in range(70)]
        client.store(ids, torch.zeros(kv.kv_shape(70), dtype=kv.torch_dtype))
    report = explained(capsys, prompt, "--model", folder, "--name", name)
    assert report["whys"] == {"hit": 1}
    assert report["tokens"] == 70
    report = explained(capsys, prompt, "--model", folder, "--name", name, "--dtype", "bfloat16")
    assert report["whys"] == {"other_namespace": 1}
    assert "dtype" in report["blocks"][0]["details"]["fields"]


def saved_model(folder: Path):
    """Saves a tiny model with a tokenizer whose words are w0, w1, … Returns the model as loaded, and its folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from tests.unit.integrations.tiny_models import tiny

    place = folder / "model"
    tiny("llama").save_pretrained(place)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{at}": at + 1 for at in range(90)}}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(place)
    return transformers.AutoModelForCausalLM.from_pretrained(place), str(place)


# Errors


def test_an_unknown_model_is_a_clear_error(name: str, node: NodeProcess, capsys, tmp_path: Path) -> None:
    missing = str(tmp_path / "no model")
    text = refused(capsys, "hello", "--model", missing, "--name", name)
    assert "--model: must be a folder or a Hugging Face id" in text and missing in text
    assert "--dtype: must be auto or a floating-point dtype" in refused(
        capsys, "hello", "--model", missing, "--dtype", "int7", "--name", name
    )


def test_without_a_cluster_the_error_says_how_to_start_one(name: str, tokens_file: str, capsys) -> None:
    assert f"no cluster '{name}' on this machine; start one with: tiered-kv up" in refused(capsys, "--tokens", tokens_file, "--name", name)
    assert "no cluster" in refused(capsys, "hello", "--model", "any/model", "--name", name), "before a model is loaded"


def test_a_tenant_without_workers_is_a_clear_error(name: str, node: NodeProcess, tokens_file: str, capsys) -> None:
    store(name)
    assert "no worker of tenant 'acme' has attached" in refused(capsys, "--tokens", tokens_file, "--name", name, "--tenant", "acme")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either a PROMPT or --tokens FILE"),
        (["hello", "--tokens", "x"], "either a PROMPT or --tokens FILE"),
        (["hello"], "--model: must be given with a PROMPT"),
        (["hello", "--model", "m", "--namespace", "dtype=x"], "--namespace: not allowed with --model"),
    ],
)
def test_contradicting_options_are_refused(capsys, arguments: list[str], words: str) -> None:
    assert words in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2", "must be a JSON list"),
        (b"1 two 3", "must be a JSON list"),
        (b"\xff\xfe\x00", "must be a JSON list"),
        (b"[[1, 2]]", "flat list of whole numbers, got [1, 2]"),
        (b"[1, 2.5]", "got 2.5"),
        (b"[1, true]", "got True"),
        (b"", "got none"),
        (b"[]", "got none"),
    ],
)
def test_a_broken_token_file_is_a_clear_error(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(content)
    with pytest.raises(TieredKVError, match="--tokens: ") as caught:
        read_tokens(str(path))
    assert words in str(caught.value)
    assert caught.value.kind is Kind.CONFIG
    with pytest.raises(TieredKVError, match="No such file"):
        read_tokens(str(tmp_path / "missing"))


def test_token_files_may_be_json_or_plain_numbers(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "tokens"
    for text in ("[1, 2, 3]", "1 2\n3\n"):
        path.write_text(text)
        assert read_tokens(str(path)) == [1, 2, 3]
    monkeypatch.setattr("sys.stdin", io.StringIO("4 5"))
    assert read_tokens("-") == [4, 5]


# Without a node


def known(**fields: object) -> dict:
    namespace = replace(NAMESPACE, **fields)
    return ModelInfo(LAYOUT, namespace.weights, namespace=asdict(namespace)).as_message()


def test_namespaces_that_differ_in_their_weight_epoch_count_as_one() -> None:
    newest = known(weight_epoch=7)
    assert choose([newest, known()], None, "default") is newest
    assert choose([known(dtype="a"), known(dtype="b")], "dtype=b", "default")["namespace"]["dtype"] == "b"


@pytest.mark.parametrize("wanted", ["dtyp=b", "dtype", "=b"])
def test_a_malformed_choice_names_the_fields(wanted: str) -> None:
    with pytest.raises(TieredKVError, match="FIELD one of weights, tenant"):
        choose([known()], wanted, "default")


def test_a_choice_that_fits_nothing_lists_what_there_is() -> None:
    with pytest.raises(TieredKVError, match="fits none of these namespaces: weights=made up for , dtype=a"):
        choose([known(dtype="a")], "dtype=b", "default")


def test_a_prompt_without_a_whole_block_says_so() -> None:
    said = io.StringIO()
    show({"block_tokens": 64, "blocks": [], "tokens": 5}, Console(file=said, width=40))
    assert "has no whole block of 64 tokens" in " ".join(said.getvalue().split())


def test_the_help_has_examples(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text and text.count("tiered-kv explain ") >= 3
