"""The choice of a tier's codec, and calibrations: finding them, rejecting invalid ones, and decoding with them."""

import shutil
from dataclasses import replace

import pytest
import torch

import tiered_kv
from tests.unit.codecs.plain_calibrations import plain_calibration
from tests.unit.serving.prompts import NAMESPACE, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import Tier
from tiered_kv.client.connect import client_of
from tiered_kv.codecs.calibrated import tables as calibrations
from tiered_kv.codecs.calibrated.tables import Calibration, calibration_file
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.codec_plan import check_settings, is_exact, plan

LAYOUT = KVLayout(2, 2, 32, "bfloat16", 64)
T = LAYOUT.block_tokens
HOST, DISK, OBJECTS = Tier.HOST, Tier.DISK, Tier.OBJECTS
MEASURED = (
    {"codec": "lossless", "ratio": 1.46, "kl": 0.0, "decode_vs_memcpy": 0.13},
    {"codec": "int8", "ratio": 1.87, "kl": 2e-5, "decode_vs_memcpy": 0.16},
    {"codec": "int4", "ratio": 3.5, "kl": 4e-3, "decode_vs_memcpy": 0.11},
    {"codec": "ecuq:6e-5", "ratio": 3.9, "kl": 7e-4, "decode_vs_memcpy": 0.03},
    {"codec": "xlayer:3e-5", "ratio": 5.3, "kl": 2e-4, "decode_vs_memcpy": 0.005},
    {"codec": "xlayer:2e-4", "ratio": 14.0, "kl": 4e-3, "decode_vs_memcpy": 0.005},
)


def calibration(weights: str = NAMESPACE.weights) -> Calibration:
    return replace(plain_calibration(LAYOUT), model="made up", weights=("another", weights)).with_measured(MEASURED)


def planned(made: Calibration | None = None, **settings) -> dict[str, str]:
    return {tier.label: text for tier, text in plan(Config(**settings), made).codecs.items()}


LOWER = {"disk": "1GiB", "objects": "memory://"}


@pytest.mark.parametrize(
    ("settings", "calibrated", "expected"),
    [
        ({}, False, {"host": "raw"}),
        (LOWER, False, {"host": "raw", "disk": "lossless", "objects": "lossless"}),
        ({"quality": "near_exact", **LOWER}, False, {"host": "int8", "disk": "int8", "objects": "int8"}),
        ({"quality": "balanced", "disk": "1GiB"}, False, {"host": "int4", "disk": "int4"}),
        ({"quality": "balanced", "disk": "1GiB"}, True, {"host": "ecuq:1e-4", "disk": "ecuq:1e-4"}),
        ({"quality": "compact"}, True, {"host": "xlayer:1e-4"}),
        ({"quality": "compact", **LOWER}, True, {"host": "int8", "disk": "xlayer:1e-4", "objects": "xlayer:1e-4"}),
        ({"quality": "archive", "objects": "memory://"}, True, {"host": "int8", "objects": "xlayer:2e-4"}),
        ({"codec": "disk=int6", **LOWER}, False, {"host": "raw", "disk": "int6", "objects": "lossless"}),
        ({"quality": "near_exact", "codec": "host=raw,disk=int6", **LOWER}, False, {"host": "raw", "disk": "int6", "objects": "int8"}),
    ],
)  # fmt: skip
def test_a_quality_selects_a_codec_for_each_tier(settings: dict, calibrated: bool, expected: dict) -> None:
    assert planned(calibration() if calibrated else None, **settings) == expected


@pytest.mark.parametrize(
    ("budget", "host_alone", "host", "disk"),
    [
        ("kl=1e-6", "raw", "raw", "lossless"),
        ("kl=1e-4", "int8", "int8", "int8"),
        ("kl=1e-3", "xlayer:3e-5", "int8", "xlayer:3e-5"),
        ("kl=5e-3", "xlayer:2e-4", "int8", "xlayer:2e-4"),
        ("kl=8e-3", "xlayer:2e-4", "int4", "xlayer:2e-4"),
    ],
)
def test_an_error_budget_selects_the_smallest_codecs_within_it(budget: str, host_alone: str, host: str, disk: str) -> None:
    """Memory gets only codecs that decode fast if there is a colder tier. The errors of the tiers add up."""
    assert planned(calibration(), error_budget=budget) == {"host": host_alone}
    assert planned(calibration(), error_budget=budget, disk="1GiB") == {"host": host, "disk": disk}


def test_a_plan_has_reasons() -> None:
    made = plan(Config(error_budget="kl=1e-3", disk="1GiB", codec="host=raw"), calibration())
    assert made.as_record() == {
        "host": {"codec": "raw", "why": "set by codec"},
        "disk": {"codec": "xlayer:3e-5", "why": "smallest within KL 0.001: KL 2.0e-04, 5.30 times smaller"},
    }


@pytest.mark.parametrize(
    ("settings", "exact"),
    [({}, True), ({"quality": "near_exact"}, False), ({"quality": "near_exact", "codec": "host=raw"}, True),
     ({"codec": "host=lossless"}, False), ({"codec": "disk=int8", "disk": "1GiB"}, True), ({"error_budget": "kl=1"}, False)],
)  # fmt: skip
def test_memory_is_exact_only_if_no_codec_applies_to_it(settings: dict, exact: bool) -> None:
    check_settings(Config(**settings))
    assert is_exact(Config(**settings)) is exact


# Calibrations


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and a process without any calibration loaded."""
    monkeypatch.setenv("TIERED_KV_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrations, "_registered", {})
    (tmp_path / "calibration").mkdir()
    return tmp_path / "calibration"


def fill(client, count: int, settle) -> list[tuple[int, ...]]:
    """Store chains of noise, some of one block, until memory has compressed some blocks."""
    paths = [(turn, 1, 2) for turn in range(count)]
    for path in paths:
        client.store(tokens_of(path, LAYOUT), kv_of(path))
        settle()
    return paths


def kv_of(path: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(hash(path) % (1 << 31))
    return torch.randn(LAYOUT.kv_shape(len(path) * T), generator=generator).mul_(0.1).bfloat16()


def test_a_models_calibration_is_found_by_its_weights(folder, node_factory, checked) -> None:
    calibration().save(calibration_file(folder, NAMESPACE.weights))
    node = node_factory(host="2MiB", codec="host=xlayer:1e-3:5e-4", store_wait_ms=20_000)
    client = checked(client_of(node.info(), LAYOUT, NAMESPACE, connect=node.open_session))

    def settle() -> None:
        node.engine.drain_touches()
        node.engine.settle()

    paths = fill(client, 30, settle)
    node.check()
    coded = [path for path in paths if [each.codec for each in client.explain(tokens_of(path, LAYOUT))] == ["xlayer"] * 3]
    assert coded
    keys = [bytes.fromhex(each.key) for each in client.explain(tokens_of(coded[0], LAYOUT))]
    frames = [node.storage._read(key, node.engine.machine.blocks[key].copies[HOST]).frame for key in keys]
    assert [frame.codec.step for frame in frames] == [1e-3, 1e-3, 5e-4], "the last block of the chain is finer"
    assert [frame.codec.start for frame in frames] == [0, T, 2 * T]
    fetched = client.fetch(tokens_of(coded[0], LAYOUT))
    assert fetched.tokens == 3 * T
    assert 0 < relative_error(kv_of(coded[0]), fetched.kv) < 0.1, "a step is as large as the deviation"


def test_blocks_whose_codec_tables_are_missing_are_misses(folder, node_factory, checked, monkeypatch) -> None:
    calibration().save(calibration_file(folder, NAMESPACE.weights))
    node = node_factory(host="2MiB", codec="host=xlayer:1e-3", store_wait_ms=20_000)
    client = checked(client_of(node.info(), LAYOUT, NAMESPACE, connect=node.open_session))
    paths = fill(client, 30, lambda: node.engine.settle())
    node.engine.settle()
    path = next(path for path in paths if {each.codec for each in client.explain(tokens_of(path, LAYOUT))} == {"xlayer"})
    monkeypatch.setattr(calibrations, "_registered", {})
    assert client.fetch(tokens_of(path, LAYOUT)).tokens == 0


def test_a_calibration_file_from_the_settings_is_used(folder, tmp_path) -> None:
    calibration().save(tmp_path / "mine.tkvcal")
    for where in (tmp_path / "mine.tkvcal", tmp_path / "a folder"):
        if where.suffix == "":
            where.mkdir()
            shutil.copy(tmp_path / "mine.tkvcal", calibration_file(where, NAMESPACE.weights))
        settings = {"host": "1MiB", "quality": "compact", "calibration": str(where)}
        with tiered_kv.open(settings, layout=LAYOUT, namespace=NAMESPACE) as client:
            (found,) = client.stats()["node"]["codecs"]["plans"].values()
            assert found["host"] == {"codec": "xlayer:1e-4", "why": "quality compact"}


def test_an_unusable_calibration_is_rejected_by_name(folder, tmp_path) -> None:
    calibration("other weights").save(tmp_path / "of another")
    calibration().save(tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    (tmp_path / "none").write_text("no calibration")
    wrong = {"of another": "is of another model", "damaged": "damaged", "none": "not a calibration file", "missing": "there is no file"}
    for name, words in wrong.items():
        settings = {"host": "1MiB", "quality": "archive", "calibration": str(tmp_path / name)}
        with pytest.raises(TieredKVError, match=words) as refusal:
            tiered_kv.open(settings, layout=LAYOUT, namespace=NAMESPACE)
        assert name in str(refusal.value)
        assert refusal.value.kind in (Kind.CONFIG, Kind.CORRUPT)


def test_exact_needs_no_calibration_and_ignores_one(folder) -> None:
    calibration_file(folder, NAMESPACE.weights).write_text("no calibration")
    with tiered_kv.open({"host": "1MiB"}, layout=LAYOUT, namespace=NAMESPACE) as client:
        assert client.match([1] * T).tokens == 0
