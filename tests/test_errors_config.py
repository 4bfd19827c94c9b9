"""Errors keep their facts on the way to another process; settings are refused by name, sizes are read as people write them."""

import dataclasses
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.blocks import Hint
from tiered_kv.config import MIN_HOST_BYTES, MIN_TIER_BYTES, Config, format_size, parse_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.file_sums import user_cache


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_keeps_kind_sentence_and_context(kind, protocol):
    error = TieredKVError(kind, "host: too small", setting="host", wanted_bytes=5)
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is TieredKVError
    assert (again.kind, str(again), again.context) == (kind, "host: too small", {"setting": "host", "wanted_bytes": 5})
    assert isinstance(again.kind, Kind)


def test_context_may_have_the_names_of_the_errors_own_fields():
    """`_rebuild` passes context by keyword; what is called like a parameter must not be lost in it."""
    error = TieredKVError(Kind.CONFIG, "no", path="p", name="n", args="a", context="c")
    assert pickle.loads(pickle.dumps(error)).context == {"path": "p", "name": "n", "args": "a", "context": "c"}


def test_an_error_comes_out_of_another_process_whole():
    code = (
        "import pickle, sys; from tiered_kv import Kind, TieredKVError\n"
        "sys.stdout.buffer.write(pickle.dumps(TieredKVError(Kind.STORAGE, 'disk full', path='/x')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    error = pickle.loads(done.stdout)
    assert (error.kind, str(error), error.context) == (Kind.STORAGE, "disk full", {"path": "/x"})


def test_there_are_at_most_ten_kinds_and_each_is_its_own_text():
    assert len(Kind) <= 10
    assert all(Kind(kind.value) is kind and f"{kind}" == kind.value for kind in Kind)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (4096, 4096),
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("4KiB", 4096),
        ("4GiB", 4 << 30),
        ("4 GiB", 4 << 30),
        ("  4gib ", 4 << 30),
        ("512MiB", 512 << 20),
        ("1.5G", 3 << 29),
        ("10GB", 10**10),
        ("2m", 2 << 20),
        ("1TiB", 1 << 40),
        ("1TB", 10**12),
        ("0.5KiB", 512),
    ],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text, "host") == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "4 X", "4GiBs", "-1", "-4GiB", "four", "1e9", "0x10", "1,5G", "4GiB/s", "nan", "inf", None, True, False, [], {}, b"4GiB"],
)
def test_what_is_no_size_is_refused_with_the_settings_name(text):
    with pytest.raises(TieredKVError, match=r"^disk_segment: ") as caught:
        parse_size(text, "disk_segment")
    assert caught.value.kind is Kind.CONFIG
    assert caught.value.context == {"setting": "disk_segment"}


def test_a_negative_number_is_no_size():
    with pytest.raises(TieredKVError, match="host: must be a size of 0 bytes or more"):
        parse_size(-1, "host")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1.0 TiB"),
        (1 << 50, "1024.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_as_people_read_them(size, text):
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_what_is_shown_can_be_read_again(size):
    assert parse_size(format_size(size), "host") == pytest.approx(size, rel=0.06, abs=0.5)


@given(st.integers(0, 1 << 53))  # a size as text goes through a float
def test_whole_bytes_are_exact(size):
    assert parse_size(str(size), "host") == parse_size(size, "host") == size


def test_the_defaults_hold_their_own_rules():
    config = Config()
    assert Config.of() == Config.of(None) == Config.of({}) == config
    assert Config.of(dataclasses.asdict(config)) == config
    assert len(dataclasses.fields(Config)) <= 26


def test_settings_are_bytes_after_they_were_text():
    config = Config.of({"host": "2GiB", "disk": "10GB"}, disk_segment="1MiB")
    assert (config.host, config.disk, config.disk_segment) == (2 << 30, 10**10, 1 << 20)


def test_changes_make_another_config_and_are_checked():
    config = Config(host="64MiB")
    assert Config.of(config, block_tokens=16) == config.with_(block_tokens=16) == Config(host=64 << 20, block_tokens=16)
    assert config.block_tokens == 64
    with pytest.raises(TieredKVError, match=r"^host: "):
        config.with_(host=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.host = 1


@pytest.mark.parametrize(
    ("key", "near"),
    [("hosts", "host"), ("block_token", "block_tokens"), ("disk_paths", "disk_path"), ("heartbeat", "heartbeat_s"), ("polcy", "policy")],
)
def test_an_unknown_setting_names_the_nearest(key, near):
    with pytest.raises(TieredKVError, match=f"unknown setting '{key}'; did you mean '{near}'") as caught:
        Config.of({key: 1})
    assert (caught.value.kind, caught.value.context["setting"]) == (Kind.CONFIG, key)


def test_an_unknown_setting_that_is_like_none_names_all():
    with pytest.raises(TieredKVError) as caught:
        Config.of(zzzz=1)
    assert all(field.name in str(caught.value) for field in dataclasses.fields(Config))


BAD = [
    *[("host", value) for value in (0, -1, "0", "1KiB", "", "lots", None, True, MIN_HOST_BYTES - 1)],
    *[("disk", value) for value in (-1, 1, "1KiB", "lots", None, True, MIN_TIER_BYTES - 1)],
    *[("disk_segment", value) for value in (0, "1KiB", "lots", None)],
    *[("peer_address", value) for value in (0, "")],
    *[("block_tokens", value) for value in (0, -1, "64", None, True, 1.5)],
    *[("tenants", value) for value in ("{", 5, [], {"quota": {}}, {"quotas": {"": {"host": 1}}}, {"quotas": {"a": {"ram": 1}}})],
    *[("tenants", {"quotas": {"a": each}}) for each in ({}, {"host": 0}, {"host": "lots"}, "1GiB")],
    *[("tenants", {"secret_file": each}) for each in ("", 5)],
    *[("io_threads", value) for value in (0, -1, "2", None, True, 1.5)],
    *[("store_wait_ms", value) for value in (-1, "1", None, True, float("nan"))],
    *[("fetch_deadline_ms", value) for value in (-1, "1", None, True, float("nan"))],
    *[("heartbeat_s", value) for value in (0, -1, "1", None, True, float("nan"))],
    *[("node_timeout_s", value) for value in (0, -1, "1", None, True, float("nan"))],
    *[("policy", value) for value in ("", "LRU", "best", None, 1)],
    *[("shm_path", value) for value in ("", None, 1)],
    *[("disk_path", value) for value in (1,)],
    *[("device", value) for value in (-1, 1, "1KiB", "lots", None, True, "lots:cuda:1", ":cuda:1")],
    *[("device_name", value) for value in ("", 1)],
    *[("objects", value) for value in ("", 1)],
    *[("objects_cap", value) for value in (0, "1KiB", "lots", None)],
    *[("cost_weight", value) for value in (-0.1, 1.1, "1", None, True, float("nan"))],
    *[("seed", value) for value in (-1, "1", None, True, 1.5)],
    *[("quality", value) for value in ("", "best", "EXACT", None, 1)],
    *[("codec", value) for value in ("", "int8", "host=", "=int8", "gpu=int8", "device=int8", "host=int8,host=int4", "host=int8,", 1)],
    *[("error_budget", value) for value in ("", "1e-3", "kl", "kl=", "kl=0", "kl=-1", "kl=nan", "kl=inf", "mse=1", 1e-3)],
    *[("calibration", value) for value in ("", 1)],
    *[("metrics_port", value) for value in ("", -1, 1 << 16, None, True, 1.5)],
    *[("verify_host", value) for value in ("true", 1, 0, None)],
]


@pytest.mark.parametrize(("setting", "value"), BAD, ids=[f"{setting}={value!r}" for setting, value in BAD])
def test_a_bad_setting_names_itself(setting, value):
    with pytest.raises(TieredKVError, match=f"^{setting}: ") as caught:
        Config.of({setting: value})
    assert (caught.value.kind, caught.value.context["setting"]) == (Kind.CONFIG, setting)


def test_every_setting_can_be_bad():
    assert {setting for setting, _ in BAD} == {field.name for field in dataclasses.fields(Config)}


def test_a_size_may_say_where():
    config = Config.of(device="2GiB:cuda:1", disk="200GiB:/nvme/tkv")
    assert (config.device, config.device_name, config.disk, config.disk_path) == (2 << 30, "cuda:1", 200 << 30, "/nvme/tkv")
    assert Config.of(dataclasses.asdict(config)) == config
    assert Config.of(disk="1GiB:/x", disk_path="/x").disk_path == "/x"
    with pytest.raises(TieredKVError, match=r"^disk: .*give only one of them"):
        Config.of(disk="1GiB:/x", disk_path="/y")


def test_settings_from_a_file(tmp_path):
    path = tmp_path / "cache.toml"
    path.write_text('host = "16GiB"\ndisk = "200GiB:/nvme/tkv"\npolicy = "arc"\n')
    assert Config.from_toml(path) == Config(host=16 << 30, disk=200 << 30, disk_path="/nvme/tkv", policy="arc")
    assert Config.from_toml(path, host="1GiB", disk="1GiB:/y") == Config(host=1 << 30, disk=1 << 30, disk_path="/y", policy="arc")
    assert Config.from_toml(path, disk="1GiB").disk_path == "/nvme/tkv"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("host = ", "is not TOML"),
        ("\xff", "is not TOML"),
        ('hots = "1GiB"', "did you mean 'host'"),
        ('host = "lots"', "^host: must be a size .*'lots'"),
        ("[host]\nsize = 1", "^host: "),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path, content, words):
    path = tmp_path / "cache.toml"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(TieredKVError, match=words) as caught:
        Config.from_toml(path)
    assert caught.value.kind is Kind.CONFIG
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "hint",
    [
        {"answer_tokens": -1},
        {"answer_tokens": 1.5},
        {"answer_tokens": True},
        {"pinned_s": -1},
        {"pinned_s": float("nan")},
        {"pinned_s": float("inf")},
        {"pinned_s": True},
        {"reuse_within_s": "soon"},
        {"ended": 1},
    ],
)
def test_a_bad_hint_names_itself(hint):
    with pytest.raises(TieredKVError, match=f"^hint: {next(iter(hint))} must be") as caught:
        Hint(**hint)
    assert caught.value.kind is Kind.CONFIG


def test_a_pin_alone_foretells_nothing():
    assert not Hint().foretells
    assert not Hint(pinned_s=1).foretells
    assert Hint(answer_tokens=0).foretells
    assert Hint(reuse_within_s=0).foretells
    assert Hint(ended=True).foretells


def test_the_smallest_settings_that_can_be():
    Config(host=MIN_HOST_BYTES, disk=MIN_TIER_BYTES, disk_segment=64 << 10, block_tokens=1, io_threads=1, store_wait_ms=0)
    Config(disk=0, fetch_deadline_ms=0, heartbeat_s=0.01, node_timeout_s=0.01)


def test_where_the_users_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TIERED_KV_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "own"
    monkeypatch.delenv("TIERED_KV_CACHE")
    assert user_cache() == tmp_path / "xdg" / "tiered_kv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "tiered_kv"
    assert Config().disk_root == str(tmp_path / ".cache" / "tiered_kv" / "disk")
    assert Config(disk_path="/x").disk_root == "/x"
