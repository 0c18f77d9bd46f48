"""The native backend: C++ kernels for the CPU, bit-exact within a variant.

Weights stay where they are (memory-mapped, in the checkpoint's dtype); activations are float32.
Bf16 weights and pages are multiplied with activations rounded to bf16 and summed in float32; fp16
and fp32 ones are computed in float32. What runs is the fastest variant of the same source that the
processor supports: avx512bf16, avx512, avx2 or portable.
"""

from quire.backends.native.backend import NativeBackend

__all__ = ["NativeBackend"]
