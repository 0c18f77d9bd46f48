"""Packing: what comes back is what went in, for every width; what was not packed is refused."""

import ml_dtypes
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from quire.cache.payload import RAW, pack, unpack
from quire.errors import TierError


@given(data=st.binary(max_size=2000), repeat=st.integers(1, 50), element=st.integers(0, 9))
def test_packing_is_lossless(data: bytes, repeat: int, element: int) -> None:
    payload = data * repeat
    codec, packed = pack(payload, element)
    assert unpack(codec, packed, len(payload)) == payload
    assert len(packed) <= len(payload)


@pytest.mark.parametrize(("dtype", "element"), [(ml_dtypes.bfloat16, 2), (np.float32, 4)])
def test_numbers_of_one_scale_pack_and_come_back(dtype: type, element: int) -> None:
    numbers = np.random.default_rng(0).normal(size=50_000).astype(dtype)
    payload = numbers.tobytes()
    codec, packed = pack(payload, element)
    assert codec == element
    assert len(packed) < 0.9 * len(payload)
    assert len(packed) < len(zstandard.compress(payload, 1))  # that is what the shuffle is for
    assert unpack(codec, packed, len(payload)) == payload


def test_noise_is_kept_raw() -> None:
    payload = np.random.default_rng(0).bytes(10_000)
    assert pack(payload, 2) == (RAW, payload)


def test_the_shuffle_is_that_of_hdf5() -> None:
    codec, packed = pack(bytes(range(8)) * 1000, 4)
    planes = zstandard.decompress(packed)
    assert codec == 4
    assert planes[:4] == bytes([0, 4, 0, 4])
    assert planes[2000:2004] == bytes([1, 5, 1, 5])


FRAME = zstandard.compress(bytes(1000))
CASES = {
    "raw and short": (RAW, b"abc", 4),
    "unknown codec": (3, FRAME, 999),
    "negative codec": (-2, FRAME, 1000),
    "a width that does not divide": (8, FRAME, 1001),
    "no frame": (1, b"no frame at all", 15),
    "empty": (1, b"", 0),
    "cut": (1, FRAME[:-1], 1000),
    "more behind": (1, FRAME + b"x", 1000),
    "another size": (1, FRAME, 10),
    "no size": (1, zstandard.ZstdCompressor(write_content_size=False).compress(bytes(9)), 9),
    "a bomb": (1, zstandard.compress(bytes(1 << 28)), 1000),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_not_packed_is_refused(case: str) -> None:
    with pytest.raises(TierError):
        unpack(*CASES[case])
