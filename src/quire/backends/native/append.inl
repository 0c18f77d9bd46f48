// Keys and values of one token into their slot, in the pool's formats: the definitions of formats.py,
// operation by operation, so that the stored bytes are the same.

namespace quire {
namespace {

// Numbers of one head: where they go, and how far apart those of consecutive dimensions lie.
template <class Number, class Round>
inline void append_plain(const Pool& pool, bool key, int64_t head, int64_t token, const float* x,
                         Round round) {
    const Store& store = key ? pool.key : pool.value;
    Number* to = static_cast<Number*>(store.data) + head * store.dim * pool.page_size;
    for (int64_t d = 0; d < store.dim; ++d)
        to[key ? pool.key_at(d, token) : pool.value_at(d, token)] = round(x[d]);
}

// The largest absolute value; infinite or NaN if one of the numbers is.
inline float peak_of(const float* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    float peak;
    std::memcpy(&peak, &most, 4);
    return peak;
}

// The least bf16 that is not below x, finite and at least 0.
inline uint16_t bf16_up(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint16_t((bits + 0xffffu) >> 16);
}

// What one vector is divided by: max|x| / top rounded up, as bf16, at most `largest`; NaN if a number
// is infinite or NaN.
inline uint16_t scale_of(const float* x, int64_t n, float top, uint16_t largest) {
    float peak = peak_of(x, n);
    if (!(peak < INFINITY)) return 0x7fc0;
    uint16_t scale = bf16_up(peak / top);
    return scale < largest ? scale : largest;
}

// Int8 with 128 added, of up to 16 numbers.
inline void to_int8(const float* x, int n, float scale, uint8_t* to) {
    F16 q = round_even(load_some(x, n) / F16::set(scale));
    q = max(F16::set(-127.0f), min(F16::set(127.0f), q));
    store_bytes(q + F16::set(128.0f), to);
}

inline void append_scaled(const Pool& pool, bool key, int64_t head, int64_t token, const float* x) {
    const Store& store = key ? pool.key : pool.value;
    const bool int8 = store.dtype == Dtype::i8;
    uint16_t scale = int8 ? scale_of(x, store.dim, 127.0f, 0x7c01)   // 0x1.02p121
                          : scale_of(x, store.dim, 448.0f, 0x7b12);  // 0x1.24p119
    store.scale[head * pool.page_size + token] = scale;
    uint8_t bytes[MAX_HEAD + 16];
    if (scale == 0 || scale == 0x7fc0) {
        std::memset(bytes, int8 ? 128 : 0, size_t(store.dim));
    } else if (!int8) {
        float divisor = bf16_to_float(scale);
        for (int64_t d = 0; d < store.dim; ++d) bytes[d] = float_to_fp8(x[d] / divisor);
    } else {
        for (int64_t d = 0; d < store.dim; d += 16)
            to_int8(x + d, int(store.dim - d < 16 ? store.dim - d : 16), bf16_to_float(scale),
                    bytes + d);
    }
    uint8_t* to = static_cast<uint8_t*>(store.data) + head * store.dim * pool.page_size;
    if (key && store.beside == 4) {
        for (int64_t d = 0; d < store.dim; d += 4)
            std::memcpy(to + pool.key_at(d, token), bytes + d, 4);
    } else {
        for (int64_t d = 0; d < store.dim; ++d)
            to[key ? pool.key_at(d, token) : pool.value_at(d, token)] = bytes[d];
    }
}

inline void append_one(const Pool& pool, bool key, int64_t slot, const float* x) {
    const Store& store = key ? pool.key : pool.value;
    int64_t page = slot / pool.page_size - pool.first, token = slot % pool.page_size;
    for (int64_t h = 0; h < pool.heads; ++h, x += store.dim) {
        int64_t head = page * pool.heads + h;
        switch (store.dtype) {
            case Dtype::f32:
                append_plain<float>(pool, key, head, token, x, [](float f) { return f; });
                break;
            case Dtype::bf16:
                append_plain<uint16_t>(pool, key, head, token, x, float_to_bf16);
                break;
            case Dtype::f16:
                append_plain<uint16_t>(pool, key, head, token, x, float_to_fp16);
                break;
            default: append_scaled(pool, key, head, token, x);
        }
    }
}

void append(const Pool& pool, int64_t slot, const float* key, const float* value) {
    append_one(pool, true, slot, key);
    append_one(pool, false, slot, value);
}

}  // namespace
}  // namespace quire
