// Norms, rotary embedding, activations and copies: each works on one row, in a fixed order.

namespace quire {
namespace {

inline float sum_of(const float* x, int64_t n, float shift, bool squared) {
    F16 acc = F16::zero(), minus = F16::set(shift);
    for (int64_t i = 0; i < n; i += 16) {
        int some = int(n - i < 16 ? n - i : 16);
        F16 v = some == 16 ? F16::load(x + i) : load_some(x + i, some);
        if (squared) {
            v = keep(v - minus, 0, some, F16::zero());
            acc = fma(v, v, acc);
        } else {
            acc = acc + v;
        }
    }
    return sum(acc);
}

template <class Op>
inline void each_lane(int64_t n, float* y, Op op) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) op(i, 16).store(y + i);
    if (i < n) store_some(op(i, int(n - i)), y + i, int(n - i));
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
    F16 scale = F16::set(1.0f / std::sqrt(sum_of(x, n, 0.0f, true) / float(n) + eps));
    each_lane(n, y, [&](int64_t i, int m) {
        return load_some(x + i, m) * scale * load_some(weight + i, m);
    });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                float* y) {
    float mean = sum_of(x, n, 0.0f, false) / float(n);
    F16 centre = F16::set(mean);
    F16 scale = F16::set(1.0f / std::sqrt(sum_of(x, n, mean, true) / float(n) + eps));
    each_lane(n, y, [&](int64_t i, int m) {
        return fma((load_some(x + i, m) - centre) * scale, load_some(weight + i, m),
                   load_some(bias + i, m));
    });
}

// y may be x.
void rope(const float* x, const float* cos, const float* sin, int64_t half, float* y) {
    for (int64_t i = 0; i < half; i += 16) {
        int some = int(half - i < 16 ? half - i : 16);
        F16 a = load_some(x + i, some), b = load_some(x + half + i, some);
        F16 c = load_some(cos + i, some), s = load_some(sin + i, some);
        store_some(a * c - b * s, y + i, some);
        store_some(b * c + a * s, y + half + i, some);
    }
}

// One pass of butterflies over x [n]: numbers `apart` from each other become their sum and difference.
inline void butterflies(float* x, int64_t n, int64_t apart) {
    for (int64_t i = 0; i < n; i += 2 * apart) {
        int64_t j = i;
        for (; j + 16 <= i + apart; j += 16) {
            F16 a = F16::load(x + j), b = F16::load(x + j + apart);
            (a + b).store(x + j);
            (a - b).store(x + j + apart);
        }
        for (; j < i + apart; ++j) {
            float a = x[j], b = x[j + apart];
            x[j] = a + b;
            x[j + apart] = a - b;
        }
    }
}

// The same in sixteen numbers, of which a compiler makes shuffles.
template <int apart>
inline void butterflies_of_16(float* x) {
    float y[16];
    for (int i = 0; i < 16; ++i) {
        float low = x[i & ~apart], high = x[i | apart];
        float sum = low + high, difference = low - high;
        y[i] = i & apart ? difference : sum;
    }
    std::memcpy(x, y, sizeof y);
}

// See quire.rotation, which does the same operations in the same order. y may be x.
void hadamard(const float* x, int64_t n, float* y) {
    if (y != x) std::memcpy(y, x, size_t(n) * 4);
    for (int64_t block, left = n; left > 0; left -= block, y += block) {
        for (block = 1; 2 * block <= left;) block *= 2;
        for (int64_t i = 0; i + 16 <= block; i += 16) {
            butterflies_of_16<1>(y + i), butterflies_of_16<2>(y + i);
            butterflies_of_16<4>(y + i), butterflies_of_16<8>(y + i);
        }
        int64_t apart = block < 16 ? 1 : 16;
        for (; apart < block; apart *= 2) butterflies(y, block, apart);
        F16 scale = F16::set(float(1.0 / std::sqrt(double(block))));
        each_lane(block, y, [&](int64_t i, int m) { return load_some(y + i, m) * scale; });
    }
}

inline F16 sigmoid(F16 x) {
    return F16::set(1.0f) / (F16::set(1.0f) + exp(F16::zero() - x));
}

inline F16 gelu_exact(F16 x) {
    alignas(64) float v[LANES];
    x.store(v);
    for (float& lane : v) lane = 0.5f * lane * (1.0f + std::erf(lane * 0.70710678118654752f));
    return F16::load(v);
}

// silu; gelu in its tanh form, 0.5 x (1 + tanh(u)) = x sigmoid(2 u); gelu; relu.
inline F16 activated(F16 x, int kind) {
    switch (kind) {
        case 0: return x * sigmoid(x);
        case 1: {
            F16 u = F16::set(1.5957691216057308f) * fma(F16::set(0.044715f) * x * x, x, x);
            return x * sigmoid(u);
        }
        case 2: return gelu_exact(x);
        default: return max(x, F16::zero());
    }
}

void activate(const float* x, int kind, int64_t n, float* y) {
    each_lane(n, y, [&](int64_t i, int m) { return activated(load_some(x + i, m), kind); });
}

void multiply(const float* x, const float* z, int64_t n, float* y) {
    each_lane(n, y, [&](int64_t i, int m) { return load_some(x + i, m) * load_some(z + i, m); });
}

void add(const float* x, const float* z, int64_t n, float* y) {
    each_lane(n, y, [&](int64_t i, int m) { return load_some(x + i, m) + load_some(z + i, m); });
}

void widen(const void* x, Dtype dtype, int64_t n, float* y) {
    if (dtype == Dtype::f32) {
        std::memcpy(y, x, size_t(n) * 4);
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(x);
    for (int64_t i = 0; i < n; ++i)
        y[i] = dtype == Dtype::bf16 ? bf16_to_float(from[i]) : fp16_to_float(from[i]);
}

float read(const uint8_t* x, int64_t bytes) {
    F16 acc[8];
    for (F16& a : acc) a = F16::zero();
    for (int64_t i = 0; i + 512 <= bytes; i += 512)
        for (int j = 0; j < 8; ++j)
            acc[j] = max(acc[j], F16::load(reinterpret_cast<const float*>(x + i) + 16 * j));
    for (int j = 1; j < 8; ++j) acc[0] = max(acc[0], acc[j]);
    return max(acc[0]);
}

float multiply_add(int64_t steps) {
    F16 acc[PROBE_CHAINS];
    for (F16& a : acc) a = F16::zero();
    Pairs x = Pairs::set(0x3f803f80u), y = Pairs::set(0x2e802e80u);
    for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 24  // so that every accumulator is a register
        for (int i = 0; i < PROBE_CHAINS; ++i) acc[i] = dot_pairs(acc[i], x, y);
    }
    for (int i = 1; i < PROBE_CHAINS; ++i) acc[0] = acc[0] + acc[i];
    return sum(acc[0]);
}

}  // namespace
}  // namespace quire
