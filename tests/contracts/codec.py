"""The contract of every codec. Subclass it in a test module, define the fixture `codec`, and loosen `assert_same` for a lossy codec."""

from dataclasses import FrozenInstanceError

import msgpack
import pytest
import torch

from tiered_kv.codecs import codec_by_id, codec_by_name, codec_from_spec
from tiered_kv.codecs.base import Codec, byte_view
from tiered_kv.codecs.frame import frame_encoded, open_pieces
from tiered_kv.errors import Kind, TieredKVError


class CodecContract:
    """The test suite. `sizes` are block sizes in bytes that the codec accepts."""

    sizes = (1, 63, 64, 4096, 100_003)

    @pytest.fixture
    def codec(self) -> Codec:
        raise NotImplementedError

    def assert_same(self, decoded: torch.Tensor, raw: torch.Tensor) -> None:
        assert torch.equal(decoded, raw)

    def block(self, nbytes: int) -> torch.Tensor:
        """Returns a block for which the codec does not fall back."""
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(nbytes))

    def test_a_block_decodes(self, codec: Codec) -> None:
        for nbytes in self.sizes:
            raw, out = self.block(nbytes), torch.zeros(nbytes, dtype=torch.uint8)
            encoded = codec.encode(raw)
            encoded.codec.decode(encoded.payload, out)
            self.assert_same(out, raw)

    def test_a_block_decodes_from_a_frame(self, codec: Codec) -> None:
        key, root, raw = bytes(range(32)), bytes(32), self.block(self.sizes[-1])
        encoded = codec.encode(raw, carried_error=1e-6)
        frame = open_pieces(frame_encoded(key, root, encoded, raw.numel()), key, root)
        assert (frame.codec, frame.error, frame.raw_bytes) == (encoded.codec, encoded.error, raw.numel())
        frame.decode(out := torch.zeros_like(raw))
        self.assert_same(out, raw)

    def test_the_block_of_the_suite_is_encoded_without_fallback(self, codec: Codec) -> None:
        encoded = codec.encode(self.block(self.sizes[-1]))
        assert (encoded.codec, encoded.fell_back) == (codec, "")

    def test_only_a_lossy_codec_adds_error(self, codec: Codec) -> None:
        added = codec.encode(self.block(self.sizes[-1]), carried_error=1e-6).error - 1e-6
        assert (added > 0) is codec.is_lossy

    def test_encoding_leaves_the_block_unchanged_and_is_deterministic(self, codec: Codec) -> None:
        raw = self.block(self.sizes[-1])
        before = raw.clone()
        assert bytes(codec.encode(raw).payload) == bytes(codec.encode(raw).payload)
        assert torch.equal(raw, before)

    def test_payloads_are_bytes_within_their_bound(self, codec: Codec) -> None:
        for nbytes in self.sizes:
            encoded = codec.encode(self.block(nbytes))
            assert isinstance(encoded.payload, memoryview)
            assert (encoded.payload.format, encoded.payload.ndim) == ("B", 1)
            assert encoded.payload.nbytes <= encoded.codec.max_payload_bytes(nbytes)

    def test_decodes_from_read_only_and_unaligned_bytes(self, codec: Codec) -> None:
        raw = self.block(self.sizes[-1])
        payload = bytes(codec.encode(raw).payload)
        for source in (memoryview(payload), memoryview(bytearray(b"x" + payload))[1:]):
            out = torch.zeros_like(raw)
            codec.decode(source, out)
            self.assert_same(out, raw)

    def test_encodes_and_decodes_any_part_of_a_larger_tensor(self, codec: Codec) -> None:
        raw = self.block(self.sizes[-1])
        room = torch.zeros(raw.numel() + 5, dtype=torch.uint8)
        room[1:-4] = raw
        encoded = codec.encode(room[1:-4])
        room[1:-4] = 0
        codec.decode(memoryview(bytes(codec.encode(raw).payload)), room[3:-2])
        self.assert_same(room[3:-2].clone(), raw)
        assert encoded.codec == codec
        assert not room[:3].any() and not room[-2:].any()

    def test_a_payload_of_another_length_is_corrupt(self, codec: Codec) -> None:
        raw = self.block(self.sizes[-1])
        payload = byte_view(codec.encode(raw).payload)
        for damaged in (payload[:-1], payload[:0], memoryview(bytes(payload) + b"x")):
            with pytest.raises(TieredKVError) as caught:
                codec.decode(damaged, torch.zeros_like(raw))
            assert caught.value.kind is Kind.CORRUPT

    def test_decoding_into_a_block_of_another_size_is_refused(self, codec: Codec) -> None:
        raw = self.block(self.sizes[-1])
        with pytest.raises(TieredKVError) as caught:
            codec.decode(codec.encode(raw).payload, torch.zeros(raw.numel() + 64, dtype=torch.uint8))
        assert caught.value.kind is Kind.CORRUPT

    def test_encodes_only_flat_bytes(self, codec: Codec) -> None:
        wrong = [torch.zeros(64), torch.zeros(8, 8, dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8)[::2], b"bytes"]
        for raw in wrong:
            with pytest.raises(TieredKVError) as caught:
                codec.encode(raw)
            assert caught.value.kind is Kind.LAYOUT

    def test_the_spec_restores_the_codec(self, codec: Codec) -> None:
        again = codec_from_spec(msgpack.unpackb(msgpack.packb(codec.spec())))
        assert (again, hash(again), type(again)) == (codec, hash(codec), type(codec))

    def test_is_registered_under_id_and_name(self, codec: Codec) -> None:
        assert 0 <= codec.id <= 255
        assert type(codec_by_id(codec.id)) is type(codec_by_name(codec.name)) is type(codec)

    def test_a_spec_with_other_parameters_is_refused(self, codec: Codec) -> None:
        with pytest.raises(TieredKVError) as caught:
            codec_from_spec(codec.spec() | {"no_such_parameter": 1})
        assert caught.value.kind is Kind.CONFIG

    def test_is_frozen(self, codec: Codec) -> None:
        with pytest.raises(FrozenInstanceError):
            codec.spec_of_another = 1
