"""Tests of the calibration file: it loads as saved, every damage is reported with the file's name, and blocks need its tables."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.codecs.calibrations import calibration, kv_of, layout_of
from tests.unit.codecs.kv import as_bytes
from tiered_kv.codecs import codec_for
from tiered_kv.codecs.calibrated.tables import BOUND_MARGIN, Calibration, calibration_of, register
from tiered_kv.codecs.frame import encode_frame, open_frame
from tiered_kv.errors import Kind, TieredKVError


def assert_refused(path: Path, kind: Kind, match: str) -> None:
    with pytest.raises(TieredKVError, match=match) as caught:
        Calibration.load(path)
    assert caught.value.kind is kind
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_calibration_loads_as_saved(groups: int, tmp_path: Path) -> None:
    made = calibration(groups).with_measured([{"codec": "int4", "ratio": 3.5, "kl": 4e-3}])
    made.save(tmp_path / "sub" / "a.calibration")
    again = Calibration.load(tmp_path / "sub" / "a.calibration")
    for name in (
        "fingerprint",
        "model",
        "weights",
        "layers",
        "kv_heads",
        "head_dim",
        "rope",
        "rope_halves",
        "tokens",
        "errors",
        "measured",
    ):
        assert getattr(again, name) == getattr(made, name), name
    for one, other in zip([*again.ecuq, *again.xlayer], [*made.ecuq, *made.xlayer], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.calibration"]
    assert (tmp_path / "sub" / "a.calibration").stat().st_mode & 0o777 == 0o644


def test_the_fingerprint_covers_the_tables_and_not_the_measurements() -> None:
    made = calibration()
    assert made.with_measured([{"codec": "int8"}]).fingerprint == made.fingerprint == calibration().fingerprint
    others = [calibration(seed=1), calibration(2), calibration(rope=b""), replace(made, rope_halves=False)]
    others.append(replace(made, ecuq=made.ecuq._replace(width=made.ecuq.width * 2)))
    assert len({each.fingerprint for each in [made, *others]}) == 6


@pytest.mark.parametrize("at", [0, 4, 6, 12, 200, -100, -1])
def test_every_damage_is_named_with_the_file(at: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    calibration().save(path)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)
    kind, match = {0: (Kind.CONFIG, "not a calibration"), 4: (Kind.CONFIG, "newer")}.get(at, (Kind.CORRUPT, "checksum"))
    assert_refused(path, kind, match)


@pytest.mark.parametrize(("size", "match"), [(0, "not a calibration"), (9, "not a calibration"), (50, "checksum"), (1000, "checksum")])
def test_a_truncated_file_is_refused(size: int, match: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    calibration().save(path)
    path.write_bytes(path.read_bytes()[:size])
    assert_refused(path, Kind.CORRUPT if match == "checksum" else Kind.CONFIG, match)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", Kind.CONFIG, "cannot be read")
    assert_refused(tmp_path, Kind.CONFIG, "cannot be read")


def test_a_calibration_that_cannot_be_written_raises_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TieredKVError, match="cannot be written") as caught:
        calibration().save(tmp_path / "file" / "a")
    assert caught.value.kind is Kind.STORAGE


@pytest.mark.parametrize("part", ["mean", "width"])
def test_invalid_tables_are_refused(part: str) -> None:
    tables = calibration().ecuq
    for wrong in (getattr(tables, part)[:, 1:], getattr(tables, part) * torch.nan):
        with pytest.raises(TieredKVError, match="tiny") as caught:
            replace(calibration(), ecuq=tables._replace(**{part: wrong}))
        assert caught.value.kind is Kind.CONFIG


def test_bounds_are_interpolated_and_extrapolated_from_the_steps_tried() -> None:
    made = calibration()
    assert made.bound("xlayer", 1e-3) == pytest.approx(BOUND_MARGIN * 1e-4)
    assert made.bound("xlayer", 1e-3) < made.bound("xlayer", 1e-2) < made.bound("xlayer", 1e-1)
    assert made.bound("xlayer", 1e-4) == pytest.approx(BOUND_MARGIN * 1e-6)
    assert replace(made, errors={}).bound("ecuq", 1e-4) == float("inf")


@pytest.mark.parametrize("name", ["ecuq:1e-1", "xlayer:1e-1"])
def test_a_block_whose_calibration_is_not_registered_is_corrupt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, key = calibration(), bytes(32)
    kv = kv_of(made, layout_of(), start=64)
    whole = b"".join(encode_frame(key, key, codec_for(name, layout_of(), calibration=made).at(64), as_bytes(kv)))
    monkeypatch.setattr("tiered_kv.codecs.calibrated.tables._registered", {})
    frame = open_frame(whole, key)
    with pytest.raises(TieredKVError, match=made.fingerprint) as caught:
        frame.decode(torch.zeros(frame.raw_bytes, dtype=torch.uint8))
    assert caught.value.kind is Kind.CORRUPT
    assert calibration_of(register(made)) is made
    frame.decode(torch.zeros(frame.raw_bytes, dtype=torch.uint8))
