// Grouped products in bf16, and activations, on a CPU with AVX512-BF16; moe/kernels/native.py calls them.
//
// Legend: R rows grouped by expert, K inner and N outer dimension of a product, L experts, F expert hidden, G 2 for
// gated activations, else 1.
//
// A product runs on tiles of 12 x 32 that stay in registers. What it multiplies is packed first: into panels of 12 rows
// and of 32 columns, two values of the inner dimension side by side, as vdpbf16ps takes them. Nothing is compiled for a
// shape, and rows are read from where they lie while they are packed.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

using Bf16 = uint16_t;
using Pair = uint32_t;  // two neighbours of the inner dimension
using Index = int64_t;

constexpr int ROWS = 12, COLUMNS = 32;  // of a tile: 24 accumulators, 2 of b, 1 of a of the 32 registers
constexpr Index AHEAD = 16;  // lines of the inner dimension that are fetched before they are packed
constexpr Index BLOCK_BYTES = 384 << 10;  // of packed rows that stay in the second-level cache (1 MiB on Zen 4)
constexpr Index CHUNK_BYTES = 8 << 20;    // of packed columns, each thread's

__mmask16 first(Index lanes) { return lanes >= 16 ? 0xffff : lanes <= 0 ? 0 : (1u << lanes) - 1; }
__mmask32 first32(Index lanes) { return lanes >= 32 ? ~0u : lanes <= 0 ? 0 : (1u << lanes) - 1; }

// 16 vectors of 16 pairs, transposed in place.
void transpose(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// An operand of a product seen as lines along its outer dimension, inner values contiguous or outer ones.
struct Operand {
    const Bf16 *data;
    Index width;            // from one line to the next
    bool inner_contiguous;  // line i is one index of the outer dimension; else one of the inner dimension
    const Index *line;      // which line of data is line i; null: i

    const Bf16 *at(Index i) const { return data + (line ? line[i] : i) * width; }
};

// A panel of SIZE outer indices, `count` of which there are; inner indices begin .. begin + inner; zeros beyond.
template <int SIZE>
void pack_panel(const Operand &x, Index from, Index count, Index begin, Index inner, Pair *to) {
    const Index pairs = (inner + 1) / 2;
    for (Index k = 0; k < pairs; k += 16) {
        const __mmask32 there = first32(inner - 2 * k);
        const Index stop = std::min<Index>(16, pairs - k);
        for (int part = 0; part < SIZE; part += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; ++i)
                v[i] = part + i < std::min<Index>(count, SIZE)
                           ? _mm512_maskz_loadu_epi16(there, x.at(from + part + i) + begin + 2 * k)
                           : _mm512_setzero_si512();
            transpose(v);
            for (Index i = 0; i < stop; ++i)
                _mm512_mask_storeu_epi32(to + (k + i) * SIZE + part, first(SIZE - part), v[i]);
        }
    }
}

// Outer indices from .. from + count of the operand, inner indices begin .. begin + inner, in panels of SIZE: each is
// [inner / 2][SIZE] pairs, with zeros beyond.
template <int SIZE>
void pack(const Operand &x, Index from, Index count, Index begin, Index inner, Pair *to) {
    const Index pairs = (inner + 1) / 2;
    if (x.inner_contiguous) {
        for (Index at = 0; at < count; at += SIZE)
            pack_panel<SIZE>(x, from + at, count - at, begin, inner, to + at * pairs);
        return;
    }
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const auto line = [&](Index i) { return x.at(begin + std::min(i, inner - 1)) + from; };
    for (Index k = 0; k < pairs; ++k) {  // a line is read once, for all panels
        const Bf16 *even = line(2 * k), *odd = line(2 * k + 1);
        const Bf16 *later[] = {line(2 * k + AHEAD), line(2 * k + 1 + AHEAD)};
        const bool whole = 2 * k + 1 < inner;
        for (Index at = 0; at < count; at += SIZE) {
            for (const Bf16 *fetched : later) _mm_prefetch(fetched + at, _MM_HINT_T0);
            const __mmask32 there = first32(std::min<Index>(count - at, SIZE));
            const __m512i e = _mm512_maskz_loadu_epi16(there, even + at);
            const __m512i o = _mm512_maskz_loadu_epi16(whole ? there : 0, odd + at);
            Pair *panel = to + at * pairs + k * SIZE;
            _mm512_mask_storeu_epi32(panel, first(SIZE), _mm512_permutex2var_epi16(e, low, o));
            if (SIZE > 16) _mm512_storeu_si512(panel + 16, _mm512_permutex2var_epi16(e, high, o));
        }
    }
}

// Where a tile goes: rounded to bf16, or added to fp32.
struct Target {
    void *data;
    Index width;
    bool add;
};

template <int COUNT>
void tile(Index pairs, const Pair *a, const Pair *b, const Target &y, Index row, Index column, Index columns) {
    __m512 sum[COUNT][2];
#pragma GCC unroll 12
    for (int i = 0; i < COUNT; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (Index k = 0; k < pairs; ++k, a += ROWS, b += COLUMNS) {
        const __m512bh b0 = (__m512bh)_mm512_load_si512(b), b1 = (__m512bh)_mm512_load_si512(b + 16);
#pragma GCC unroll 12
        for (int i = 0; i < COUNT; ++i) {
            const __m512bh ai = (__m512bh)_mm512_set1_epi32(a[i]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], ai, b0);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], ai, b1);
        }
    }
    const __mmask32 there = first32(columns);
#pragma GCC unroll 12
    for (int i = 0; i < COUNT; ++i) {
        const Index at = (row + i) * y.width + column;
        if (y.add) {
            float *to = static_cast<float *>(y.data) + at;
            const __mmask16 low = there, high = there >> 16;
            _mm512_mask_storeu_ps(to, low, _mm512_add_ps(_mm512_maskz_loadu_ps(low, to), sum[i][0]));
            _mm512_mask_storeu_ps(to + 16, high, _mm512_add_ps(_mm512_maskz_loadu_ps(high, to + 16), sum[i][1]));
        } else {
            const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(sum[i][1], sum[i][0]);
            _mm512_mask_storeu_epi16(static_cast<Bf16 *>(y.data) + at, there, rounded);
        }
    }
}

using Tile = void (*)(Index, const Pair *, const Pair *, const Target &, Index, Index, Index);
constexpr Tile TILES[ROWS + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>, tile<6>,
                                  tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

// A product y [rows, columns] = a @ b, or a part of it.
struct Product {
    Operand a, b;
    Index inner, a_begin, b_begin;  // inner indices, and where they begin in each operand
    Index a_row, y_row, rows;       // outer indices of a and rows of y
    Index column, columns;
    Target y;

    Index work() const { return rows * columns * (inner + 64); }

    // Cut along its longer side, which packs the least twice, into `count` parts of whole tiles, or fewer.
    void cut(Index count, std::vector<Product> &parts) const {
        const bool by_rows = rows > columns;
        const Index size = by_rows ? rows : columns, side = by_rows ? ROWS : COLUMNS;
        const Index step = (size + side * count - 1) / (side * count) * side;
        for (Index from = 0; from < size; from += step) {
            Product part = *this;
            const Index length = std::min(step, size - from);
            if (by_rows) {
                part.a_row += from, part.y_row += from, part.rows = length;
            } else {
                part.column += from, part.columns = length;
            }
            parts.push_back(part);
        }
    }

    Index pairs() const { return std::max<Index>(1, (inner + 1) / 2); }
    // Rows and columns that are packed at a time.
    Index block() const {
        return std::clamp<Index>(BLOCK_BYTES / (pairs() * ROWS * Index(sizeof(Pair))), 1, 16) * ROWS;
    }
    Index chunk() const {
        const Index fit = CHUNK_BYTES / (pairs() * COLUMNS * Index(sizeof(Pair)));
        return std::min(std::max<Index>(1, fit), (columns + COLUMNS - 1) / COLUMNS) * COLUMNS;
    }
    Index room() const { return pairs() * (chunk() + block()); }

    void run(Pair *b_room) const {
        Pair *a_room = b_room + pairs() * chunk();
        for (Index left = 0; left < columns; left += chunk()) {
            const Index right = std::min(columns, left + chunk());
            pack<COLUMNS>(b, column + left, right - left, b_begin, inner, b_room);
            for (Index top = 0; top < rows; top += block()) {
                const Index bottom = std::min(rows, top + block());
                pack<ROWS>(a, a_row + top, bottom - top, a_begin, inner, a_room);
                for (Index c = left; c < right; c += COLUMNS)
                    for (Index r = top; r < bottom; r += ROWS)
                        TILES[std::min<Index>(ROWS, rows - r)](
                            (inner + 1) / 2, a_room + (r - top) * pairs(), b_room + (c - left) * pairs(), y, y_row + r,
                            column + c, std::min<Index>(COLUMNS, columns - c));
            }
        }
    }
};

// Runs the products in parts of about equal work, several for each thread. False: no memory to pack them.
bool run(const std::vector<Product> &products, int threads) {
    Index total = 0, room = 0;
    for (const Product &product : products) total += product.work();
    std::vector<Product> parts;
    for (const Product &product : products)
        product.cut(std::max<Index>(1, (product.work() * 8 * threads + total / 2) / std::max<Index>(1, total)), parts);
    for (const Product &part : parts) room = std::max(room, (part.room() + 15) / 16 * 16);
    const Index bytes = (threads * room + 16) * sizeof(Pair);
    const std::unique_ptr<void, decltype(&std::free)> rooms(std::aligned_alloc(64, bytes), std::free);
    if (!rooms) return false;
    std::atomic<size_t> next{0};
#pragma omp parallel num_threads(threads)
    for (size_t i = next++; i < parts.size(); i = next++)
        parts[i].run(static_cast<Pair *>(rooms.get()) + omp_get_thread_num() * room);
    return true;
}

__m512 wide(const Bf16 *from, __mmask16 there) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
}

void store(Bf16 *to, __mmask16 there, __m512 x) {
    _mm256_mask_storeu_epi16(to, there, (__m256i)_mm512_cvtneps_pbh(x));
}

__m512 all(float x) { return _mm512_set1_ps(x); }

// sum of c_i x^i, the highest first.
template <int N>
__m512 polynomial(const float (&c)[N], __m512 x) {
    __m512 sum = all(c[0]);
    for (int i = 1; i < N; ++i) sum = _mm512_fmadd_ps(sum, x, all(c[i]));
    return sum;
}

// e^x = 2^n e^r with |r| <= ln 2 / 2, by the Taylor series: to 1e-7 of it. Beyond 104 it is 0 or infinite in fp32.
__m512 exponential(__m512 x) {
    x = _mm512_min_ps(all(104), _mm512_max_ps(all(-104), x));  // of a number and not-a-number these give the second
    constexpr float taylor[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1, 1};
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    const __m512 high = _mm512_fnmadd_ps(n, all(0.693359375f), x);  // ln 2 in two parts: n times the first is exact
    const __m512 r = _mm512_fnmadd_ps(n, all(-2.12194440e-4f), high);
    return _mm512_scalef_ps(polynomial(taylor, r), n);
}

// f(x) and f'(x).
struct Bent {
    __m512 value, slope;
};

Bent silu(__m512 x) {
    const __m512 share = _mm512_div_ps(all(1), _mm512_add_ps(all(1), exponential(_mm512_sub_ps(all(0), x))));
    const __m512 value = _mm512_mul_ps(x, share);
    return {value, _mm512_fmadd_ps(value, _mm512_sub_ps(all(1), share), share)};
}

// x P(x) with the normal distribution's P; P(-|x|) is half the erfc of Press et al., Numerical Recipes, 6.2: to 1.2e-7
// of it, however small.
Bent gelu(__m512 x) {
    constexpr float series[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                                -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    const __m512 half_square = _mm512_mul_ps(_mm512_mul_ps(x, x), all(0.5f));
    const __m512 t = _mm512_div_ps(all(1), _mm512_fmadd_ps(_mm512_abs_ps(x), all(0.5f * 0.70710678f), all(1)));
    const __m512 erfc = _mm512_mul_ps(t, exponential(_mm512_sub_ps(polynomial(series, t), half_square)));
    const __m512 beyond = _mm512_mul_ps(erfc, all(0.5f));
    const __m512 share = _mm512_mask_sub_ps(beyond, _mm512_cmp_ps_mask(x, all(0), _CMP_GT_OQ), all(1), beyond);
    const __m512 bell = _mm512_mul_ps(exponential(_mm512_sub_ps(all(0), half_square)), all(0.39894228f));
    return {_mm512_mul_ps(x, share), _mm512_fmadd_ps(x, bell, share)};
}

Bent relu(__m512 x) {  // which leaves not-a-number as it is, with slope 1, as torch does
    const __mmask16 above = _mm512_cmp_ps_mask(x, all(0), _CMP_NLE_UQ);
    return {_mm512_maskz_mov_ps(above, x), _mm512_maskz_mov_ps(above, all(1))};
}

Bent relu2(__m512 x) {
    const __m512 value = relu(x).value;
    return {_mm512_mul_ps(value, value), _mm512_add_ps(value, value)};
}

// One row of a = f(gate) * up, or f(h), times keep where that is not null.
template <Bent (*f)(__m512), bool gated>
void activate(Index F, const Bf16 *h, const Bf16 *keep, Bf16 *a) {
    for (Index i = 0; i < F; i += 16) {
        const __mmask16 there = first(F - i);
        __m512 value = f(wide(h + i, there)).value;
        if (gated) value = _mm512_mul_ps(value, wide(h + F + i, there));
        if (keep) value = _mm512_mul_ps(value, wide(keep + i, there));
        store(a + i, there, value);
    }
}

// The same again, and dh for da.
template <Bent (*f)(__m512), bool gated>
void activate_back(Index F, const Bf16 *h, const Bf16 *da, const Bf16 *keep, Bf16 *a, Bf16 *dh) {
    for (Index i = 0; i < F; i += 16) {
        const __mmask16 there = first(F - i);
        const Bent bent = f(wide(h + i, there));
        __m512 value = bent.value, d = wide(da + i, there);
        if (keep) d = _mm512_mul_ps(d, wide(keep + i, there));
        __m512 dgate = _mm512_mul_ps(d, bent.slope);
        if (gated) {
            const __m512 up = wide(h + F + i, there);
            store(dh + F + i, there, _mm512_mul_ps(d, value));
            value = _mm512_mul_ps(value, up);
            dgate = _mm512_mul_ps(dgate, up);
        }
        if (keep) value = _mm512_mul_ps(value, wide(keep + i, there));
        store(dh + i, there, dgate);
        store(a + i, there, value);
    }
}

struct Activation {
    int gates;
    void (*forward)(Index, const Bf16 *, const Bf16 *, Bf16 *);
    void (*back)(Index, const Bf16 *, const Bf16 *, const Bf16 *, Bf16 *, Bf16 *);
};

template <Bent (*f)(__m512), bool gated>
constexpr Activation activation{gated ? 2 : 1, activate<f, gated>, activate_back<f, gated>};

// In the order of moe/kernels/native.py.
constexpr Activation ACTIVATIONS[] = {activation<silu, true>, activation<gelu, true>, activation<gelu, false>,
                                      activation<relu, false>, activation<relu2, false>};

}  // namespace

extern "C" {

// y [R, N] = each row times its expert's weight: w [L, K, N], or [L, N, K] where `transposed`. Expert e has the rows
// start[e] .. start[e + 1], which are lines `line` of x where that is not null. False: no memory to pack the operands.
bool switchyard_product(Index experts, const Index *start, const Bf16 *x, const Index *line, const Bf16 *w,
                        bool transposed, Index K, Index N, Bf16 *y, int threads) {
    std::vector<Product> products;
    for (Index e = 0; e < experts; ++e) {
        if (start[e] == start[e + 1]) continue;
        const Operand rows{x, K, true, line}, weight{w + e * K * N, transposed ? K : N, transposed, nullptr};
        products.push_back({rows, weight, K, 0, 0, start[e], start[e], start[e + 1] - start[e], 0, N, {y, N, false}});
    }
    return run(products, threads);
}

// dw [L, K, N] = x.T @ dy of each expert's rows: added to fp32 where `add`, else written in bf16. False as above.
bool switchyard_weight_gradient(Index experts, const Index *start, const Bf16 *x, const Index *line, const Bf16 *dy,
                                Index K, Index N, void *dw, bool add, int threads) {
    std::vector<Product> products;
    for (Index e = 0; e < experts; ++e) {
        void *to = add ? static_cast<void *>(static_cast<float *>(dw) + e * K * N)
                       : static_cast<void *>(static_cast<Bf16 *>(dw) + e * K * N);
        const Operand a{x, K, false, line}, b{dy, N, false, nullptr};
        products.push_back({a, b, start[e + 1] - start[e], start[e], start[e], 0, 0, K, 0, N, {to, N, add}});
    }
    return run(products, threads);
}

// a [R, F] = act(h [R, G, F]), times keep [R, F] where that is not null.
void switchyard_activate(int kind, Index R, Index F, const Bf16 *h, const Bf16 *keep, Bf16 *a, int threads) {
    const Activation &act = ACTIVATIONS[kind];
#pragma omp parallel for num_threads(threads)
    for (Index r = 0; r < R; ++r) act.forward(F, h + r * act.gates * F, keep ? keep + r * F : nullptr, a + r * F);
}

// a again, and dh [R, G, F] for da [R, F].
void switchyard_activate_back(int kind, Index R, Index F, const Bf16 *h, const Bf16 *da, const Bf16 *keep, Bf16 *a,
                              Bf16 *dh, int threads) {
    const Activation &act = ACTIVATIONS[kind];
#pragma omp parallel for num_threads(threads)
    for (Index r = 0; r < R; ++r) {
        const Index row = r * act.gates * F;
        act.back(F, h + row, da + r * F, keep ? keep + r * F : nullptr, a + r * F, dh + row);
    }
}
}
