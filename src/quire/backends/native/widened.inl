// Widened blocks: what registers would hold, kept for those that read it next.
//
// A tile of prefill is TILE rows, and values go to half as many at a time: an item of ROW_BLOCK rows
// would take the same bytes apart up to sixteen times. So the blocks of one split and head are taken
// apart once an item, into scratch memory of this thread that the next split overwrites: at most
// SPLIT tokens of one head, which its caches hold, like the panel that a matrix product packs. The cache
// as a whole is never written out decoded. Tiles load from it the very words that they would have made,
// so that bits are those of decode, which has few rows and reads what is stored.

namespace quire {
namespace {

// The form that many rows read; the form itself where nothing has to be taken apart.
template <Form F>
constexpr Form WIDE = F == Form::int8     ? Form::wide_int8
                      : F == Form::fp8    ? Form::wide_fp8
                      : F == Form::halves ? Form::floats
                                          : F;
inline Form wide_of(Form form) {
    return by_form(form, [](auto f) { return WIDE<f()>; });
}

// A line as lines of its wide form, `apart` bytes from one to the next.
template <Form F>
inline void widen_line(const char* line, char* to, int64_t apart) {
#pragma GCC unroll 2
    for (int part = 0; part < PARTS<F>; ++part)
        load_part<F>(line, part).store(reinterpret_cast<Number<WIDE<F>>*>(to + part * apart));
}

template <Form F>
inline Keys widen(const Keys& block, int64_t dim, char* to) {
    constexpr int64_t line = LINE<WIDE<F>>;
    for (int64_t i = 0; i < key_words<F>(dim); ++i)
        widen_line<F>(block.data + i * block.stride, to + i * PARTS<F> * line, line);
    return {to, line, block.scale};
}

template <Form F>
inline Values widen(const Values& block, int64_t dim, char* to) {
    // Lanes of all tokens lie in one piece, of which 16 tokens fill whole lines.
    const int64_t row = PARTS<F> == 1 ? BLOCK * dim : value_words<F>(dim);
    const char* from = block.data;
    Values wide{to, block.scale};
    for (int64_t end = BLOCK / BESIDE<F> * value_words<F>(dim); end > 0; end -= row) {
        for (int64_t lane = 0; lane < row; lane += LANES)
            widen_line<F>(from + lane * LANE<F>, to + lane * LANE<WIDE<F>>, row * LANE<WIDE<F>>);
        from += row * LANE<F>, to += row * PARTS<F> * LANE<WIDE<F>>;
    }
    return wide;
}

// Bytes that a block takes once it is widened; 0 where it is read as it is stored.
inline int64_t widened_keys(const Store& store) {
    return by_form(store.form, [&](auto f) {
        return WIDE<f()> == f() ? int64_t(0) : key_words<WIDE<f()>>(store.dim) * LINE<WIDE<f()>>;
    });
}
inline int64_t widened_values(const Store& store) {
    return by_form(store.form, [&](auto f) {
        constexpr Form wide = WIDE<f()>;
        return wide == f() ? int64_t(0)
                           : BLOCK / BESIDE<wide> * value_words<wide>(store.dim) * LANE<wide>;
    });
}

// Scratch memory on whole lines of the cache, kept by its thread.
class Scratch {
public:
    char* of(int64_t bytes) {
        if (int64_t(room_.size()) < bytes + 64) room_.resize(size_t(bytes) + 64);
        return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(room_.data()) + 63) &
                                       ~uintptr_t(63));
    }

private:
    std::vector<char> room_;
};

}  // namespace
}  // namespace quire
