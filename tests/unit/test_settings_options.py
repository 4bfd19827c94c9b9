"""The options of `up` and `demo` that are settings: on the command line alone, and overriding a file."""

from pathlib import Path

import pytest

from tiered_kv import Config
from tiered_kv.cluster.commands import cli
from tiered_kv.config import POLICIES
from tiered_kv.errors import TieredKVError
from tiered_kv.policy import POLICY_NAMES


def config(*options: str, command: str = "up") -> Config:
    return cli._config(cli.parser().parse_args([command, *options]))


@pytest.mark.parametrize("command", ["up", "demo"])
def test_without_options_the_settings_are_the_defaults(command: str) -> None:
    assert config(command=command) == Config()


def test_all_tiers_on_one_command_line() -> None:
    tiers = "--device 2GiB:cuda:1 --host 16GiB --disk 200GiB:/nvme/tkv --objects s3://bucket/x --objects-cap 1TiB"
    assert config(*tiers.split(), "--policy", "arc", "--block-tokens", "16") == Config(
        device=2 << 30,
        device_name="cuda:1",
        host=16 << 30,
        disk=200 << 30,
        disk_path="/nvme/tkv",
        objects="s3://bucket/x",
        objects_cap=1 << 40,
        policy="arc",
        block_tokens=16,
    )


def test_a_switch_is_on_or_left_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text("verify_host = true\n")
    assert config("--verify-host") == config("--config", str(path)) == Config(verify_host=True)


def test_options_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text('host = "16GiB"\nio_threads = 3\n')
    assert config("--config", str(path), "--host", "1GiB") == Config(host=1 << 30, io_threads=3)


def test_a_bad_option_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(TieredKVError, match=r"^policy: must be one of .*, got 'best'"):
        config("--policy", "best")
    with pytest.raises(TieredKVError, match=r"config: cannot read"):
        config("--config", str(tmp_path / "none.toml"))


def test_settings_and_policies_know_the_same_names() -> None:
    assert set(POLICIES) == set(POLICY_NAMES)
