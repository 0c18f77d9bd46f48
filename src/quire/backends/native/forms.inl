// The forms of blocks of 16 tokens, and how their lines become what registers multiply.
//
// A line is sixteen lanes of n = BESIDE numbers (tokens of one word of keys, dimensions of values). It
// is loaded in PARTS, each of which is multiplied with one word of a row: a float, a pair of bf16 or a
// pair of integers of 16 bits. Lines of wide forms are such parts: numbers 0 and 2 of four that lay side
// by side, then numbers 1 and 3.

namespace quire {
namespace {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// work(std::integral_constant of the form): code for each stored form, chosen when it runs.
template <class Work>
inline auto by_form(Form form, Work work) {
    switch (form) {
        case Form::pairs: return work(std::integral_constant<Form, Form::pairs>());
        case Form::halves: return work(std::integral_constant<Form, Form::halves>());
        case Form::int8: return work(std::integral_constant<Form, Form::int8>());
        case Form::fp8: return work(std::integral_constant<Form, Form::fp8>());
        case Form::int4: return work(std::integral_constant<Form, Form::int4>());
        case Form::int2: return work(std::integral_constant<Form, Form::int2>());
        default: return work(std::integral_constant<Form, Form::floats>());
    }
}
// The same for forms that are only in memory while they are read (widened.inl), too.
template <class Work>
inline auto by_read_form(Form form, Work work) {
    switch (form) {
        case Form::wide_int8: return work(std::integral_constant<Form, Form::wide_int8>());
        case Form::wide_fp8: return work(std::integral_constant<Form, Form::wide_fp8>());
        default: return by_form(form, work);
    }
}

template <Form F>
constexpr bool BYTES = F == Form::int8 || F == Form::fp8;
template <Form F>
constexpr bool SCALED = BYTES<F> || F == Form::wide_int8 || F == Form::wide_fp8;
template <Form F>
constexpr bool PACKED = F == Form::int4 || F == Form::int2;
template <Form F>
constexpr int BITS = F == Form::int4 ? 4 : 2;  // of a packed number
template <Form F>
constexpr bool INTEGER = F == Form::int8 || F == Form::wide_int8;
template <Form F>
using Number =
    std::conditional_t<F == Form::floats, float,
                       std::conditional_t<BYTES<F>, uint8_t, uint16_t>>;
// Numbers that are multiplied by one word, or by one word for each part.
template <Form F>
constexpr int BESIDE = PACKED<F> ? 32 / BITS<F> : BYTES<F> ? 4 : F == Form::pairs || SCALED<F> ? 2 : 1;
template <Form F>
constexpr int PARTS = BYTES<F> ? 2 : 1;
template <Form F>
constexpr int64_t LANE = BESIDE<F> * int64_t(sizeof(Number<F>));  // bytes
template <Form F>
constexpr int64_t LINE = LANES * LANE<F>;

// Keys and values of 16 tokens in the form that the inner loops read, n = BESIDE numbers in a lane:
// key [dim / n][16 tokens][n], value [16 / n][dim][n]; of bytes dim is padded to whole words (keys) or
// vectors (values). Scales are bf16 [16]; of packed numbers minimum and step in turns: of keys [2][dim],
// of values [ceil(dim / 32)][2][16], `stride` from one row of 16 to the next.
struct Keys {
    const char* data;
    int64_t stride;  // bytes from one line to the next
    const uint16_t* scale;
};
struct Values {
    const char* data;
    const uint16_t* scale;
    int64_t stride = 0;
};

// Lines of a block's keys, and lanes of one token's values.
template <Form F>
constexpr int64_t key_words(int64_t dim) {
    return SCALED<F> ? ceil_div(dim, 4) * (4 / BESIDE<F>) : ceil_div(dim, BESIDE<F>);
}
template <Form F>
constexpr int64_t value_words(int64_t dim) {
    return SCALED<F> || PACKED<F> ? ceil_div(dim, 16) * 16 : dim;
}

// One part of a line, as registers hold it: F16, Pairs or Half.
template <Form F>
inline auto load_part(const char* line, [[maybe_unused]] int part) {
    const auto* from = reinterpret_cast<const Number<F>*>(line);
    if constexpr (F == Form::floats) return F16::load(from);
    else if constexpr (F == Form::halves) return F16::load_fp16(from);
    else if constexpr (F == Form::int8) return Half::load(from, part);
    else if constexpr (F == Form::fp8) return load_fp8(from, part);
    else if constexpr (F == Form::wide_int8) return Half::load_wide(from);
    else return Pairs::load(from);
}

// Its first n lanes, of the forms whose lines of values may end within a vector.
template <Form F>
inline auto load_lanes(const char* line, [[maybe_unused]] int part, [[maybe_unused]] int n) {
    const auto* from = reinterpret_cast<const Number<F>*>(line);
    if constexpr (F == Form::floats) return load_some(from, n);
    else if constexpr (F == Form::halves) return load_some_fp16(from, n);
    else return load_part<F>(line, part);
}

// Sums that parts times words are added to.
template <Form F>
using Sum = std::conditional_t<INTEGER<F>, Sums, F16>;

inline void add_product(F16& sum, F16 part, uint32_t word) {
    float number;
    std::memcpy(&number, &word, 4);
    sum = fma(F16::set(number), part, sum);
}
inline void add_product(F16& sum, Pairs part, uint32_t word) {
    sum = dot_pairs(sum, Pairs::set(word), part);
}
inline void add_product(Sums& sum, Half part, uint32_t word) { sum.add(part, word); }

}  // namespace
}  // namespace quire
