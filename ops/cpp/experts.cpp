// Grouped products in bf16, and activations, on a CPU with AVX512-BF16.
//
// Legend: R rows grouped by expert, K inner and N outer dimension of a product, L experts, F expert hidden, G 2 for
// gated activations, else 1.

#include "tiles.h"

#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <vector>

namespace switchyard {
namespace {

constexpr Index BLOCK_BYTES = 384 << 10;  // of packed rows that stay in the second-level cache (1 MiB on Zen 4)
constexpr Index CHUNK_BYTES = 8 << 20;    // of packed columns, each thread's

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
                multiply({a_room, pairs()}, bottom - top, {b_room, pairs()}, right - left,
                         y.at(y_row + top, column + left), [&](Index, Index) -> Span { return {0, (inner + 1) / 2}; });
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
void activate_row(Index F, const Bf16 *h, const Bf16 *keep, Bf16 *a) {
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
void activate_row_back(Index F, const Bf16 *h, const Bf16 *da, const Bf16 *keep, Bf16 *a, Bf16 *dh) {
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
constexpr Activation activation{gated ? 2 : 1, activate_row<f, gated>, activate_row_back<f, gated>};

// In the order of ops/cpp/experts.py.
constexpr Activation ACTIVATIONS[] = {activation<silu, true>, activation<gelu, true>, activation<gelu, false>,
                                      activation<relu, false>, activation<relu2, false>};

}  // namespace

bool grouped_product(Index experts, const Index *start, const Bf16 *x, const Index *line, const Bf16 *w,
                     bool transposed, Index K, Index N, Bf16 *y, int threads) {
    std::vector<Product> products;
    for (Index e = 0; e < experts; ++e) {
        if (start[e] == start[e + 1]) continue;
        const Operand rows{x, K, true, line}, weight{w + e * K * N, transposed ? K : N, transposed, nullptr};
        const Target to{y, N, Put::ROUND};
        products.push_back({rows, weight, K, 0, 0, start[e], start[e], start[e + 1] - start[e], 0, N, to});
    }
    return run(products, threads);
}

bool grouped_weight_gradient(Index experts, const Index *start, const Bf16 *x, const Index *line, const Bf16 *dy,
                             Index K, Index N, void *dw, bool add, int threads) {
    std::vector<Product> products;
    for (Index e = 0; e < experts; ++e) {
        const Target to = Target{dw, N, add ? Put::ADD : Put::ROUND}.at(e * K, 0);
        const Operand a{x, K, false, line}, b{dy, N, false, nullptr};
        products.push_back({a, b, start[e + 1] - start[e], start[e], start[e], 0, 0, K, 0, N, to});
    }
    return run(products, threads);
}

int activation_gates(Index kind) {
    return kind >= 0 && kind < Index(std::size(ACTIVATIONS)) ? ACTIVATIONS[kind].gates : 0;
}

void activate(Index kind, Index R, Index F, const Bf16 *h, const Bf16 *keep, Bf16 *a, int threads) {
    const Activation &act = ACTIVATIONS[kind];
#pragma omp parallel for num_threads(threads)
    for (Index r = 0; r < R; ++r) act.forward(F, h + r * act.gates * F, keep ? keep + r * F : nullptr, a + r * F);
}

void activate_backward(Index kind, Index R, Index F, const Bf16 *h, const Bf16 *da, const Bf16 *keep, Bf16 *a, Bf16 *dh,
                       int threads) {
    const Activation &act = ACTIVATIONS[kind];
#pragma omp parallel for num_threads(threads)
    for (Index r = 0; r < R; ++r) {
        const Index row = r * act.gates * F;
        act.back(F, h + row, da + r * F, keep ? keep + r * F : nullptr, a + r * F, dh + row);
    }
}

}  // namespace switchyard
