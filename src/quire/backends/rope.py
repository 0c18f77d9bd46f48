"""The angles of rotary position embedding, for every backend."""

import numpy as np
import numpy.typing as npt

from quire.config import RopeConfig

__all__ = ["inverse_frequencies"]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> npt.NDArray[np.float32]:
    """Radians a token of each rotated pair, float32 [head_dim / 2].

    default  theta^(-2i / head_dim)                        Su et al., 2021, arXiv:2104.09864
    linear   the same, divided by ``factor``               Chen et al., 2023, arXiv:2306.15595
    llama3   wavelengths beyond ``original_max_position / low_freq_factor`` tokens are divided by
             ``factor``, those below ``original_max_position / high_freq_factor`` are kept, and
             the ones between are blended                  Llama 3.1, arXiv:2407.21783
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    if rope.kind == "default":
        return plain
    scaled = plain / np.float32(rope.factor)
    if rope.kind == "linear":
        return scaled
    wavelength = 2 * np.pi / plain
    turns = rope.original_max_position / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * scaled + blend * plain).astype(np.float32)
