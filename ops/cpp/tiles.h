// Products of bf16 in tiles, on a CPU with AVX512-BF16: what the kernels beside this file are made of.
//
// A tile is 12 x 32 and stays in registers. What it multiplies is packed first: into panels of 12 rows and of 32
// columns, two values of the inner dimension side by side, as vdpbf16ps takes them. Nothing is compiled for a shape,
// and rows are read from where they lie while they are packed.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace switchyard {
namespace {

using Pair = uint32_t;  // two neighbours of the inner dimension

constexpr int ROWS = 12, COLUMNS = 32;  // of a tile: 24 accumulators, 2 of b, 1 of a of the 32 registers
constexpr Index AHEAD = 16;  // lines of the inner dimension that are fetched before they are packed

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

enum class Put { ROUND, WRITE, ADD };  // rounded to bf16, written as fp32, or added to fp32

// Where a product goes.
struct Target {
    void *data;
    Index width;
    Put put;

    Target at(Index row, Index column) const {
        const Index size = put == Put::ROUND ? sizeof(Bf16) : sizeof(float);
        return {static_cast<char *>(data) + (row * width + column) * size, width, put};
    }
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
        if (y.put == Put::ROUND) {
            const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(sum[i][1], sum[i][0]);
            _mm512_mask_storeu_epi16(static_cast<Bf16 *>(y.data) + at, there, rounded);
            continue;
        }
        float *to = static_cast<float *>(y.data) + at;
        const __mmask16 low = there, high = there >> 16;
        if (y.put == Put::ADD) {
            sum[i][0] = _mm512_add_ps(_mm512_maskz_loadu_ps(low, to), sum[i][0]);
            sum[i][1] = _mm512_add_ps(_mm512_maskz_loadu_ps(high, to + 16), sum[i][1]);
        }
        _mm512_mask_storeu_ps(to, low, sum[i][0]);
        _mm512_mask_storeu_ps(to + 16, high, sum[i][1]);
    }
}

using Tile = void (*)(Index, const Pair *, const Pair *, const Target &, Index, Index, Index);
constexpr Tile TILES[ROWS + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>,  tile<5>, tile<6>,
                                  tile<7>, tile<8>, tile<9>, tile<10>, tile<11>, tile<12>};

// An operand packed in panels of so many pairs.
struct Panels {
    const Pair *data;
    Index pairs;
};

// Which pairs of the inner dimension a tile adds up. None of them (from == to): it adds up to 0. to < from: the tile is
// not touched.
struct Span {
    Index from, to;
};
constexpr Span LEFT_OUT{1, 0};

// y [rows, columns] = a @ b, for the tile at (r, c) over span(r, c).
template <class Spans>
void multiply(const Panels &a, Index rows, const Panels &b, Index columns, const Target &y, Spans span) {
    for (Index c = 0; c < columns; c += COLUMNS)
        for (Index r = 0; r < rows; r += ROWS) {
            const Span s = span(r, c);
            if (s.from <= s.to)
                TILES[std::min<Index>(ROWS, rows - r)](
                    s.to - s.from, a.data + r * a.pairs + s.from * ROWS, b.data + c * b.pairs + s.from * COLUMNS, y, r,
                    c, std::min<Index>(COLUMNS, columns - c));
        }
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

}  // namespace
}  // namespace switchyard
