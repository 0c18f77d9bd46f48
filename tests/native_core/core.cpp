// The conformance core: every kernel of every variant against float64 arithmetic, without Python.
//
//   native_core [variant ...]     prints "N passed, N failed"; exits 1 if any failed
//
// It is what runs where the suite in tests/conformance cannot: on another architecture under an
// emulator, and quickly under sanitizers. The rules are that suite's. A result may be at most twice
// as far from float64 as plain low-precision arithmetic is (and two units in the last place of the
// largest number); a row has the same bits alone and in company. All memory is on the heap in its
// exact size, so that the address sanitizer sees a step outside it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "adapter.hpp"

using namespace core;

namespace {

using Doubles = std::vector<double>;

int passed = 0, failed = 0;

void check(bool ok, const std::string& what) {
    ++(ok ? passed : failed);
    if (!ok) std::printf("FAILED %s\n", what.c_str());
}

std::string text(std::initializer_list<int64_t> numbers) {
    std::string out;
    for (int64_t n : numbers) out += " " + std::to_string(n);
    return out;
}

const char* name_of(Format format) {
    return format == Format::fp32 ? "fp32" : format == Format::bf16 ? "bf16" : "fp16";
}

bool same_bits(const float* a, const float* b, int64_t n) {
    return std::memcmp(a, b, size_t(n) * 4) == 0;
}

void check_same(const Floats& a, const Floats& b, const std::string& what) {
    check(a.size() == b.size() && same_bits(a.data(), b.data(), int64_t(a.size())), what);
}

// The error rule; `plain` is the naive formula in float32, `exact` the same in float64.
void check_as_good_as_plain(const Floats& got, const Floats& plain, const Doubles& exact,
                            const std::string& what) {
    double error = 0, of_plain = 0, largest = 0;
    bool finite = got.size() == exact.size() && plain.size() == exact.size();
    for (size_t i = 0; finite && i < exact.size(); ++i) {
        finite = std::isfinite(got[i]) && std::isfinite(exact[i]);
        error = std::max(error, std::fabs(got[i] - exact[i]));
        of_plain = std::max(of_plain, std::fabs(plain[i] - exact[i]));
        largest = std::max(largest, std::fabs(exact[i]));
    }
    double ulp = double(std::nextafter(float(largest), INFINITY)) - double(float(largest));
    bool ok = finite && error <= 2 * of_plain + 2 * ulp;
    check(ok, what);
    if (!ok) std::printf("  error %g, of plain arithmetic %g, ulp %g\n", error, of_plain, ulp);
}

// Nearly normal numbers: sums of four uniform ones, the same on every machine.
Floats normal(int64_t n, uint64_t seed, float scale = 1) {
    std::mt19937_64 random(seed);
    Floats out(static_cast<size_t>(n));
    for (float& x : out) {
        uint64_t bits = random(), sum = 0;
        for (; bits; bits >>= 16) sum += bits & 0xffff;
        x = scale * (float(sum) / 32768 - 4) * 0.866f;
    }
    return out;
}

// To the nearest number of a format, ties to even, by the definition of rounding.
float rounded(float x, Format format) {
    if (format == Format::fp32 || x == 0 || !std::isfinite(x)) return x;
    int digits = format == Format::bf16 ? 8 : 11, smallest = format == Format::bf16 ? -126 : -14;
    double unit = std::ldexp(1.0, std::max(std::ilogb(x), smallest) - digits + 1);
    double y = std::nearbyint(x / unit) * unit;
    if (format == Format::fp16 && std::fabs(y) > 65504) return std::copysign(INFINITY, x);
    return float(y);
}

Floats rounded(Floats values, Format format) {
    for (float& x : values) x = rounded(x, format);
    return values;
}

Floats part(const Floats& from, int64_t at, int64_t n) {
    return Floats(from.begin() + at, from.begin() + at + n);
}

Format operand_of(Format format) { return format == Format::bf16 ? Format::bf16 : Format::fp32; }

// -- linear ---------------------------------------------------------------------------------------

template <class Number>
std::vector<Number> naive_linear(const Floats& x, const Floats& weight, const Floats& bias,
                                 int64_t n, int64_t k) {
    int64_t m = int64_t(x.size()) / k;
    std::vector<Number> y;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            Number sum = 0;
            for (int64_t l = 0; l < k; ++l) sum += Number(x[size_t(i * k + l)]) * Number(weight[size_t(j * k + l)]);
            y.push_back(bias.empty() ? sum : sum + Number(bias[size_t(j)]));
        }
    return y;
}

void linear(const Variant& variant) {
    const int64_t shapes[][2] = {{1, 1}, {33, 7}, {65, 271}, {64, 512}, {31, 33}, {18, 2083}};
    for (Format format : {Format::fp32, Format::bf16, Format::fp16})
        for (auto& [n, k] : shapes) {
            Floats weight = rounded(normal(n * k, 1), format), bias;
            Stored bits = stored(weight, format);
            Floats all = normal(17 * k, 2), of_all;
            for (int64_t m : {17, 12, 3, 1}) {
                std::string what = variant.name() + " linear " + name_of(format) + text({m, n, k});
                bias = m % 2 ? normal(n, 3) : Floats{};
                Floats x = part(all, 0, m * k);
                Floats y = variant.linear(bits, format, n, k, x, bias, m > 3);
                check_same(variant.linear(bits, format, n, k, x, bias, m <= 3), y,
                           what + ": bits of the other kernel");
                check_as_good_as_plain(
                    y, naive_linear<float>(rounded(x, operand_of(format)), weight, bias, n, k),
                    naive_linear<double>(x, weight, bias, n, k), what);
                if (bias.empty()) bias = normal(n, 3), y = variant.linear(bits, format, n, k, x, bias, true);
                if (m == 17) of_all = y;
                else check_same(y, part(of_all, 0, m * n), what + ": bits in company");
            }
            Floats last = variant.linear(bits, format, n, k, part(all, 16 * k, k), bias, false);
            check_same(last, part(of_all, 16 * n, n),
                       variant.name() + " linear " + name_of(format) + text({n, k}) + ": last row alone");
        }
}

// -- pages and attention --------------------------------------------------------------------------

// Tokens stored before and new tokens of each sequence, over scattered pages.
struct Case {
    Format format;
    int64_t page_size, heads, kv_heads, dim, window;
    std::vector<std::pair<int64_t, int64_t>> sequences;

    std::string name() const {
        return std::string("attention ") + name_of(format) + " page" + text({page_size}) + " heads" +
               text({heads, kv_heads, dim}) + " window" + text({window}) + " stored, new" +
               text({sequences[0].first, sequences[0].second}) + (sequences.size() > 1 ? " ..." : "");
    }
    int64_t most() const {
        int64_t n = 0;
        for (auto& [before, fresh] : sequences) n = std::max(n, before + fresh);
        return n;
    }
    // A token's numbers are a function of the sequence and its position alone.
    Floats query(int64_t s) const { return normal(most() * heads * dim, uint64_t(100 + s)); }
    Floats key(int64_t s) const { return rounded(normal(most() * kv_heads * dim, uint64_t(200 + s)), format); }
    Floats value(int64_t s) const { return rounded(normal(most() * kv_heads * dim, uint64_t(300 + s)), format); }
};

Floats run(const Variant& variant, const Case& c, bool apart) {
    Batch batch;
    int64_t slots = 0;
    std::vector<int64_t> pages_of;
    for (auto& [before, fresh] : c.sequences) {
        // Pages that lie wholly behind the window of the first new token were given back.
        int64_t first = c.window ? std::max<int64_t>(0, before - c.window + 1) / c.page_size : 0;
        int64_t held = (before + fresh + c.page_size - 1) / c.page_size - first;
        batch.first_page.push_back(first);
        pages_of.push_back(held);
        slots += held;
        batch.last_page_len.push_back(before + fresh - (first + held - 1) * c.page_size);
    }
    Pages pages(c.format, slots + 2, c.page_size, c.kv_heads, c.dim, c.dim);
    std::vector<int64_t> ids(size_t(slots + 2));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int64_t(i);
    std::shuffle(ids.begin(), ids.end(), std::mt19937_64(5));
    Floats query;
    for (size_t s = 0; s < c.sequences.size(); ++s) {
        auto [before, fresh] = c.sequences[s];
        int64_t base = batch.indptr.back(), row = c.kv_heads * c.dim;
        batch.indices.insert(batch.indices.end(), ids.begin() + base, ids.begin() + base + pages_of[s]);
        batch.indptr.push_back(base + pages_of[s]);
        Floats q = c.query(int64_t(s)), k = c.key(int64_t(s)), v = c.value(int64_t(s));
        for (int64_t p = batch.first_page[s] * c.page_size; p < before + fresh; ++p) {
            int64_t page = batch.indices[size_t(base + p / c.page_size - batch.first_page[s])];
            variant.append(pages, page * c.page_size + p % c.page_size, part(k, p * row, row),
                           part(v, p * row, row));
        }
        for (int64_t p = before; p < before + fresh; ++p) batch.positions.push_back(p);
        batch.query_indptr.push_back(int64_t(batch.positions.size()));
        Floats mine = part(q, before * c.heads * c.dim, fresh * c.heads * c.dim);
        query.insert(query.end(), mine.begin(), mine.end());
    }
    return variant.attend(pages, batch, query, c.heads, c.window, apart);
}

template <class Number>
std::vector<Number> naive_attention(const Case& c, Format operand) {
    std::vector<Number> out;
    for (size_t s = 0; s < c.sequences.size(); ++s) {
        Floats q = rounded(c.query(int64_t(s)), operand), k = c.key(int64_t(s)), v = c.value(int64_t(s));
        auto [before, fresh] = c.sequences[s];
        for (int64_t p = before; p < before + fresh; ++p)
            for (int64_t h = 0; h < c.heads; ++h) {
                int64_t low = c.window ? std::max<int64_t>(0, p - c.window + 1) : 0;
                int64_t shared = h / (c.heads / c.kv_heads);
                auto at = [&](int64_t t) { return size_t((t * c.kv_heads + shared) * c.dim); };
                std::vector<Number> weights;
                Number best = -INFINITY, total = 0;
                for (int64_t t = low; t <= p; ++t) {
                    Number score = 0;
                    for (int64_t d = 0; d < c.dim; ++d)
                        score += Number(q[size_t((p * c.heads + h) * c.dim + d)]) * Number(k[at(t) + size_t(d)]);
                    weights.push_back(score / std::sqrt(Number(c.dim)));
                    best = std::max(best, weights.back());
                }
                for (Number& w : weights) total += w = std::exp(w - best);
                for (Number& w : weights) {
                    w /= total;
                    if (operand != Format::fp32) w = rounded(float(w), operand);
                }
                for (int64_t d = 0; d < c.dim; ++d) {
                    Number sum = 0;
                    for (int64_t t = low; t <= p; ++t)
                        sum += weights[size_t(t - low)] * Number(v[at(t) + size_t(d)]);
                    out.push_back(sum);
                }
            }
    }
    return out;
}

void attention(const Variant& variant) {
    const std::vector<std::vector<std::pair<int64_t, int64_t>>> batches = {
        {{300, 1}, {15, 1}, {16, 1}},  // decode
        {{0, 37}},                     // prefill
        {{250, 21}, {0, 3}, {31, 1}},  // a chunk, a prompt and a decode
    };
    const int64_t heads[][3] = {{2, 2, 32}, {4, 2, 64}, {6, 1, 80}, {3, 1, 128}, {2, 1, 256}, {2, 1, 20}};
    for (Format format : {Format::fp32, Format::bf16, Format::fp16})
        for (auto& [query_heads, kv_heads, dim] : heads) {
            if (format == Format::fp16 && dim > 64) continue;  // as fp32 once they are in registers
            for (auto& sequences : batches)
                for (int64_t window : {0, 40}) {
                    Case c{format, 16, query_heads, kv_heads, dim, window, sequences};
                    Floats plain = naive_attention<float>(c, operand_of(format)), sixteen;
                    Doubles exact = naive_attention<double>(c, Format::fp32);
                    for (int64_t page_size : {16, 3, 32}) {
                        c.page_size = page_size;
                        std::string what = variant.name() + " " + c.name();
                        Floats got = run(variant, c, false);
                        check_as_good_as_plain(got, plain, exact, what);
                        check_same(run(variant, c, true), got, what + ": bits in splits");
                        if (page_size == 16) sixteen = got;
                        else check_same(got, sixteen, what + ": bits with other pages");
                    }
                }
        }
}

// A prompt in one go, its tokens one by one, and beside another sequence.
void exactness(const Variant& variant) {
    for (Format format : {Format::fp32, Format::bf16, Format::fp16})
        for (int64_t window : {0, 40}) {
            int64_t length = 290, heads = 4, dim = 32;
            Case c{format, 16, heads, 2, dim, window, {{0, length}}};
            std::string what = variant.name() + " " + c.name();
            Floats whole = run(variant, c, false);
            for (int64_t p : {0, 1, 15, 16, 41, 100, 255, 256, 257, 289}) {
                // Numbers depend on the case's length, so the company is as long.
                Case one = c;
                one.sequences = {{p, 1}, {length - 1, 1}};
                Floats got = run(variant, one, p % 2 == 0);
                check(same_bits(got.data(), whole.data() + p * heads * dim, heads * dim),
                      what + ": decode of" + text({p}));
            }
        }
}

void append(const Variant& variant) {
    for (Format format : {Format::fp32, Format::bf16, Format::fp16})
        for (int64_t page_size : {16, 3, 32})
            for (int64_t dim : {32, 20}) {
                std::string what = variant.name() + " append " + name_of(format) + text({page_size, dim});
                Pages pages(format, 3, page_size, 2, dim, dim);
                Floats numbers = normal(4 * dim, 7);
                // Ties, denormals of fp16, and what exceeds it.
                const float odd[] = {0.0f, -0.0f, 1.00390625f, 1.01171875f, 6e-8f, -3e-6f, 65519.0f, 65520.0f, -1e9f};
                std::copy(std::begin(odd), std::end(odd), numbers.begin());
                int64_t slot = 2 * page_size - 1, others = 0;
                variant.append(pages, slot, part(numbers, 0, 2 * dim), part(numbers, 2 * dim, 2 * dim));
                check_same(pages.at(slot), rounded(numbers, format), what);
                for (int64_t s = 0; s < 3 * page_size; ++s)
                    for (float x : pages.at(s)) others += s != slot && !std::isnan(x);
                check(others == 0, what + ": other slots");
            }
}

// -- what works row by row ------------------------------------------------------------------------

template <class Number>
std::vector<Number> naive_norm(const Floats& x, const Floats& weight, const Floats& bias,
                               float eps, bool centre) {
    Number mean = 0, square = 0, n = Number(x.size());
    if (centre) {
        for (float a : x) mean += Number(a);
        mean /= n;
    }
    for (float a : x) square += (Number(a) - mean) * (Number(a) - mean);
    std::vector<Number> y;
    for (size_t i = 0; i < x.size(); ++i)
        y.push_back((Number(x[i]) - mean) / std::sqrt(square / n + Number(eps)) * Number(weight[i]) +
                    (centre ? Number(bias[i]) : Number(0)));
    return y;
}

template <class Number>
std::vector<Number> naive_rope(const Floats& x, const Doubles& angle) {
    size_t half = angle.size();
    std::vector<Number> y(2 * half);
    for (size_t i = 0; i < half; ++i) {
        Number cos = Number(std::cos(angle[i])), sin = Number(std::sin(angle[i]));
        y[i] = Number(x[i]) * cos - Number(x[i + half]) * sin;
        y[i + half] = Number(x[i + half]) * cos + Number(x[i]) * sin;
    }
    return y;
}

template <class Number>
std::vector<Number> naive_activation(const Floats& x, int kind) {
    std::vector<Number> y;
    for (float a : x) {
        Number v = Number(a), u = Number(std::sqrt(2 / 3.14159265358979324)) * (v + Number(0.044715) * v * v * v);
        y.push_back(kind == 0   ? v / (1 + std::exp(-v))
                    : kind == 1 ? Number(0.5) * v * (1 + std::tanh(u))
                    : kind == 2 ? Number(0.5) * v * (1 + std::erf(v / std::sqrt(Number(2))))
                                : std::max(v, Number(0)));
    }
    return y;
}

void rows(const Variant& variant) {
    const std::string name = variant.name();
    for (int64_t n : {1, 7, 16, 33, 64, 1000}) {
        Floats x = normal(n, 11), z = normal(n, 12), weight = normal(n, 13), bias = normal(n, 14);
        float eps = 1e-5f;
        check_as_good_as_plain(variant.rms_norm(x, weight, eps), naive_norm<float>(x, weight, bias, eps, false),
                               naive_norm<double>(x, weight, bias, eps, false), name + " rms_norm" + text({n}));
        check_as_good_as_plain(variant.layer_norm(x, weight, bias, eps),
                               naive_norm<float>(x, weight, bias, eps, true),
                               naive_norm<double>(x, weight, bias, eps, true), name + " layer_norm" + text({n}));
        Floats product, sum;
        for (size_t i = 0; i < x.size(); ++i) product.push_back(x[i] * z[i]), sum.push_back(x[i] + z[i]);
        check_same(variant.multiply(x, z), product, name + " multiply" + text({n}));
        check_same(variant.add(x, z), sum, name + " add" + text({n}));
        for (int kind = 0; kind < 4; ++kind)
            check_as_good_as_plain(variant.activate(x, kind), naive_activation<float>(x, kind),
                                   naive_activation<double>(x, kind), name + " activate" + text({kind, n}));
        for (Format format : {Format::fp32, Format::bf16, Format::fp16})
            check_same(variant.widen(stored(rounded(x, format), format), format, n), rounded(x, format),
                       name + " widen " + name_of(format) + text({n}));
    }
    for (int kind = 0; kind < 4; ++kind) {  // far from zero: limits, not NaN
        Floats y = variant.activate({-1e4f, -200, 200, 1e4f}, kind);
        check(std::fabs(y[0]) == 0 && std::fabs(y[1]) == 0 && y[2] == 200 && y[3] == 1e4f,
              name + " activate far from zero" + text({kind}));
    }
    for (int64_t half : {1, 3, 16, 40, 64, 128}) {
        Floats x = normal(2 * half, 15), cos, sin;
        Doubles angle;
        for (float a : normal(half, 16, 100)) {
            angle.push_back(a);
            cos.push_back(float(std::cos(double(a)))), sin.push_back(float(std::sin(double(a))));
        }
        check_as_good_as_plain(variant.rope(x, cos, sin), naive_rope<float>(x, angle),
                               naive_rope<double>(x, angle), name + " rope" + text({half}));
    }
}

}  // namespace

int main(int argc, char** argv) {
    int ran = 0;
    for (const Variant& variant : Variant::all()) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; ++i) wanted |= variant.name() == argv[i];
        if (!wanted) continue;
        ++ran;
        int before = passed;
        linear(variant), append(variant), attention(variant), exactness(variant), rows(variant);
        std::printf("%s: %d passed\n", variant.name().c_str(), passed - before);
        std::fflush(stdout);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed || !ran || (argc > 1 && ran != argc - 1);
}
