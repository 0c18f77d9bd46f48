// An open page of bf16 numbers becomes a packed one: the definition of formats.py, operation by
// operation, so that the stored bits are the same.

namespace quire {
namespace {

// Sixteen groups of up to STRETCH numbers side by side, and what becomes of them.
struct Groups {
    alignas(64) float x[STRETCH][16];
    uint16_t most[16];  // the greatest |x| of a group, as bits of bf16
    uint16_t minimum[16], step[16];
    uint8_t number[STRETCH][16];

    Groups() { std::memset(x, 0, sizeof x), std::memset(most, 0, sizeof most); }
    void put(int64_t i, int64_t group, uint16_t bits) {
        uint16_t size = bits & 0x7fff;
        x[i][group] = bf16_to_float(bits);
        most[group] = most[group] > size ? most[group] : size;
    }
    void encode(int64_t count, int levels);
};

// The greatest finite bf16 that is not above x, float32 and finite; -0 becomes 0.
inline uint16_t bf16_down(float x) {
    uint32_t bits;
    x += 0.0f;
    std::memcpy(&bits, &x, 4);
    uint32_t upper = (bits >> 31 ? bits + 0xffffu : bits) >> 16;
    return uint16_t(upper == 0xff80 ? 0xff7f : upper);
}

// The step of numbers from `least`, a bf16, to `high`; halves cannot overflow.
inline uint16_t step_of(float least, float high, float levels) {
    float span = 0.5f * high - 0.5f * least;
    uint16_t step = bf16_up((span > 0.0f ? span : 0.0f) / (0.5f * levels));
    float end = 2.0f * (0.5f * least + 0.5f * bf16_to_float(step) * levels);
    return uint16_t(step - !(end < INFINITY));
}

// The first `count` numbers of each group.
inline void Groups::encode(int64_t count, int levels) {
    alignas(64) float low[16], high[16], base[16], scale[16];
    std::memcpy(low, x[0], sizeof low), std::memcpy(high, x[0], sizeof high);
    for (int64_t i = 1; i < count; ++i)
        for (int g = 0; g < 16; ++g) {
            low[g] = x[i][g] < low[g] ? x[i][g] : low[g];
            high[g] = x[i][g] > high[g] ? x[i][g] : high[g];
        }
    for (int g = 0; g < 16; ++g) {
        bool finite = most[g] < 0x7f80;
        minimum[g] = finite ? bf16_down(low[g]) : 0;
        step[g] = finite ? step_of(bf16_to_float(minimum[g]), high[g], float(levels)) : 0x7fc0;
        bool any = finite && step[g] > 0;
        base[g] = any ? 0.5f * bf16_to_float(minimum[g]) : 0.0f;
        scale[g] = any ? 0.5f * bf16_to_float(step[g]) : 1.0f;
        if (!any)
            for (int64_t i = 0; i < count; ++i) x[i][g] = 0.0f;
    }
    F16 half = F16::set(0.5f), top = F16::set(float(levels));
    for (int64_t i = 0; i < count; ++i) {
        F16 n = round_even((F16::load(x[i]) * half - F16::load(base)) / F16::load(scale));
        store_bytes(max(F16::zero(), min(top, n)), number[i]);
    }
}

// Numbers [page_size][dim] or [dim][page_size] of a page and head, packed.
struct Packing {
    const Store& store;
    bool key;
    int64_t page_size;
    uint8_t* to;

    Packing(const Store& store, bool key, int64_t page_size, int64_t head)
        : store(store), key(key), page_size(page_size),
          to(static_cast<uint8_t*>(store.data) + head * store.head_bytes) {
        std::memset(to, 0, size_t(store.payload));
    }
    // Sixteen numbers: of one token, dimensions from d on; or of one dimension, tokens from `token` on.
    void put(int64_t d, int64_t token, const uint8_t* number, int64_t count) const {
        if (store.beside > 1) return put_words(d, token, number, count);
        for (int64_t i = 0; i < count; ++i) {
            Spot spot = spot_of(store, key, page_size, key ? d + i : d, key ? token : token + i);
            to[spot.byte] |= uint8_t(number[i] << spot.shift);
        }
    }
    void put_words(int64_t d, int64_t token, const uint8_t* number, int64_t count) const {
        const int64_t n = store.beside;
        const int bits = packed_bits(store.dtype);
        for (int64_t i = 0; i < count; i += n) {
            uint32_t word = 0;
            for (int64_t j = 0; j < n; ++j) word |= uint32_t(number[i + j]) << (bits * field_of(j, int(n)));
            int64_t at = key ? (d + i) / n * page_size + token : (token + i) / n * store.dim + d;
            std::memcpy(to + 4 * at, &word, 4);
        }
    }
    uint8_t* scales() const { return to + store.payload; }
};

inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// Groups are dimensions, over the tokens of a stretch.
inline void seal_keys(const uint16_t* from, const Pool& open, const Packing& to) {
    const int64_t dim = open.key.dim;
    const int levels = (1 << packed_bits(to.store.dtype)) - 1;
    for (int64_t first = 0; first < open.page_size; first += STRETCH)
        for (int64_t d = 0; d < dim; d += 16) {
            int64_t count = at_most(dim - d, 16);
            Groups groups;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t t = 0; t < STRETCH; ++t)
                    groups.put(t, i, from[open.key_at(d + i, first + t)]);
            groups.encode(STRETCH, levels);
            for (int64_t t = 0; t < STRETCH; ++t) to.put(d, first + t, groups.number[t], count);
            uint8_t* scales = to.scales() + 2 * (first / STRETCH * 2 * dim + d);
            std::memcpy(scales, groups.minimum, size_t(count) * 2);
            std::memcpy(scales + 2 * dim, groups.step, size_t(count) * 2);
        }
}

// Groups are tokens, over the dimensions of a stretch.
inline void seal_values(const uint16_t* from, const Pool& open, const Packing& to) {
    const int64_t dim = open.value.dim, size = open.page_size;
    const int levels = (1 << packed_bits(to.store.dtype)) - 1;
    for (int64_t t = 0; t < size; t += BLOCK)
        for (int64_t d = 0; d < dim; d += STRETCH) {
            int64_t count = at_most(dim - d, STRETCH), tokens = at_most(size - t, BLOCK);
            Groups groups;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t j = 0; j < tokens; ++j)
                    groups.put(i, j, from[open.value_at(d + i, t + j)]);
            groups.encode(count, levels);
            for (int64_t i = 0; i < count; ++i) to.put(d + i, t, groups.number[i], tokens);
            uint8_t* scales = to.scales() + 2 * (d / STRETCH * 2 * size + t);
            std::memcpy(scales, groups.minimum, size_t(tokens) * 2);
            std::memcpy(scales + 2 * size, groups.step, size_t(tokens) * 2);
        }
}

// Numbers that are stored alike in both kinds of pages.
inline void copy_head(const Store& from, int64_t source, const Store& to, int64_t target,
                      int64_t page_size) {
    size_t bytes = size_t(from.dim * page_size * width(from));
    std::memcpy(static_cast<char*>(to.data) + target * int64_t(bytes),
                static_cast<const char*>(from.data) + source * int64_t(bytes), bytes);
    if (from.scale)
        std::memcpy(to.scale + target * page_size, from.scale + source * page_size,
                    size_t(page_size) * 2);
}

void seal(const Pool& open, int64_t from, const Pool& packed, int64_t to, int64_t head) {
    const int64_t source = (from - open.first) * open.heads + head, size = open.page_size;
    const int64_t target = (to - packed.first) * open.heads + head;
    auto numbers = [&](const Store& store) {
        return static_cast<const uint16_t*>(store.data) + source * store.dim * size;
    };
    if (!packed.key.packed()) copy_head(open.key, source, packed.key, target, size);
    else seal_keys(numbers(open.key), open, Packing(packed.key, true, size, target));
    if (!packed.value.packed()) copy_head(open.value, source, packed.value, target, size);
    else seal_values(numbers(open.value), open, Packing(packed.value, false, size, target));
}

}  // namespace
}  // namespace quire
