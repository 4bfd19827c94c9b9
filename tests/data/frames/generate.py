"""Makes a frame of version 1 for each codec that has none here yet: `python generate.py` writes it beside itself.

What is here is never made again: these are the bytes that every later version must read. A .json file says what a frame
holds: `raw` is what decodes from it.
"""

import json
from pathlib import Path

import torch

from tiered_kv.codecs import CODECS, Calibration, codec_for
from tiered_kv.codecs.calibrated.tables import EcuqTables, XlayerTables
from tiered_kv.codecs.frame import frame_encoded, open_pieces
from tiered_kv.codecs.rotation import rope_of_theta
from tiered_kv.layout import KVLayout

HERE = Path(__file__).parent
KEY, NAMESPACE = bytes(range(32)), bytes(range(100, 132))
LAYOUT = KVLayout(2, 1, 8, "bfloat16", 20)
START = 1
CALIBRATION = HERE / "v1.calibration"
PARAMETERS = {"lowrank": ":0.8", "sparse": ":0.8", "ecuq": ":0.1", "xlayer": ":0.1"}
"""Of codecs that would give way for the block of noise with their defaults."""


def block() -> torch.Tensor:
    """KV of the layout, K with sizes of its own for each channel."""
    kv = torch.randn(LAYOUT.block_shape, generator=torch.Generator().manual_seed(1))
    kv[:, 0] *= torch.arange(1, 9) / 4
    return kv.to(torch.bfloat16).view(-1).view(torch.uint8)


def calibration() -> Calibration:
    """The tables of the calibrated codecs, for the layout; from the file if it is there."""
    if CALIBRATION.exists():
        return Calibration.load(CALIBRATION)
    generator = torch.Generator().manual_seed(2)
    axes = torch.linalg.qr(torch.randn(2, 1, 16, 16, generator=generator)).Q
    predictor = torch.randn(2, 1, 16, 32, generator=generator) / 16
    xlayer = XlayerTables(torch.zeros(2, 16), torch.linspace(2, 1, 16).repeat(2, 1), torch.cat([predictor, 6 * axes], -1).bfloat16())
    ecuq = EcuqTables(torch.zeros(2, 16), torch.full((2, 16), 6.0), torch.ones(2, 16))
    sizes = {"layers": 2, "kv_heads": 1, "head_dim": 8, "rope": rope_of_theta(10_000, 8), "rope_halves": True}
    made = Calibration("golden", ("weights",), **sizes, tokens=50_000, ecuq=ecuq, xlayer=xlayer, errors={"ecuq": ((0.1, 0.1),)})
    made.save(CALIBRATION)
    return made


def write(name: str) -> None:
    """The frame of the block by the codec of that name, and its facts."""
    rope = rope_of_theta(10_000, 8)
    encoded = codec_for(name + PARAMETERS.get(name, ""), LAYOUT, rope=rope, calibration=calibration()).at(START).encode(block())
    assert not encoded.fell_back, name
    pieces = frame_encoded(KEY, NAMESPACE, encoded, LAYOUT.block_bytes)
    frame = open_pieces(pieces, KEY)
    out = torch.zeros(frame.raw_bytes, dtype=torch.uint8)
    frame.decode(out)
    facts = {
        "version": frame.version,
        "key": KEY.hex(),
        "namespace": NAMESPACE.hex(),
        "spec": {key: value.hex() if isinstance(value, bytes) else value for key, value in frame.codec.spec().items()},
        "raw_bytes": frame.raw_bytes,
        "error": frame.error,
        "raw": out.numpy().tobytes().hex(),
    }
    (HERE / f"v1-{name}.frame").write_bytes(b"".join(pieces))
    (HERE / f"v1-{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    for codec in CODECS:
        if not (HERE / f"v1-{codec.name}.frame").exists():
            write(codec.name)
