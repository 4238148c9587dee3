// AVX512-BF16 for tests on a processor without it: SIMDe computes its instructions by others. What SIMDe 0.7.4 (Debian 12)
// lacks, computes one by one or rounds otherwise than the processor does is here.
#pragma once

#define SIMDE_X86_AVX512F_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512BW_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512DQ_ENABLE_NATIVE_ALIASES
#define SIMDE_X86_AVX512VL_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512/abs.h>
#include <simde/x86/avx512/add.h>
#include <simde/x86/avx512/cast.h>
#include <simde/x86/avx512/cmp.h>
#include <simde/x86/avx512/div.h>
#include <simde/x86/avx512/fmadd.h>
#include <simde/x86/avx512/fmsub.h>
#include <simde/x86/avx512/fnmadd.h>
#include <simde/x86/avx512/load.h>
#include <simde/x86/avx512/loadu.h>
#include <simde/x86/avx512/max.h>
#include <simde/x86/avx512/min.h>
#include <simde/x86/avx512/mov.h>
#include <simde/x86/avx512/mul.h>
#include <simde/x86/avx512/permutex2var.h>
#include <simde/x86/avx512/roundscale.h>
#include <simde/x86/avx512/set.h>
#include <simde/x86/avx512/set1.h>
#include <simde/x86/avx512/setzero.h>
#include <simde/x86/avx512/shuffle.h>
#include <simde/x86/avx512/slli.h>
#include <simde/x86/avx512/storeu.h>
#include <simde/x86/avx512/sub.h>
#include <simde/x86/avx512/unpackhi.h>
#include <simde/x86/avx512/unpacklo.h>

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

template <class To, class From>
To bits(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V, class T>
V load(uint64_t mask, const void *memory) {
    constexpr int lanes = sizeof(V) / sizeof(T);
    const T *from = static_cast<const T *>(memory);
    V v{};
    if (mask == (~0ull >> (64 - lanes))) {
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    T values[lanes] = {};
    for (int i = 0; i < lanes; ++i)
        if (mask >> i & 1) values[i] = from[i];
    std::memcpy(&v, values, sizeof v);
    return v;
}

template <class T, class V>
void store(void *memory, uint64_t mask, const V &v) {
    constexpr int lanes = sizeof(V) / sizeof(T);
    T *to = static_cast<T *>(memory), values[lanes];
    std::memcpy(values, &v, sizeof v);
    for (int i = 0; i < lanes; ++i)
        if (mask >> i & 1) to[i] = values[i];
}

inline __m512i widened(const __m256i &v) {
    uint16_t values[16];
    uint32_t words[16];
    std::memcpy(values, &v, sizeof v);
    for (int i = 0; i < 16; ++i) words[i] = values[i];
    return bits<__m512i>(words);
}

// To the nearest, ties to even; subnormal numbers become zeros, as the instruction has it.
inline uint16_t rounded(float x) {
    const uint32_t u = bits<uint32_t>(x);
    if (x != x) return u >> 16 | 0x40;
    if (!(u & 0x7f800000)) return u >> 16 & 0x8000;
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

inline __m256bh rounded(const __m512 &x) {
    float values[16];
    uint16_t half[16];
    std::memcpy(values, &x, sizeof x);
    for (int i = 0; i < 16; ++i) half[i] = rounded(values[i]);
    return bits<__m256bh>(half);
}

inline __m512bh rounded(const __m512 &high, const __m512 &low) {
    const __m256bh both[] = {rounded(low), rounded(high)};
    return bits<__m512bh>(both);
}

inline __m512 dot(const __m512 &sum, const __m512bh &a, const __m512bh &b) {
    const Words left = bits<Words>(a), right = bits<Words>(b), odd = Words{} + 0xffff0000u;
    Floats total = bits<Floats>(sum);
    total += bits<Floats>(left & odd) * bits<Floats>(right & odd);
    total += bits<Floats>(left << 16) * bits<Floats>(right << 16);
    return bits<__m512>(total);
}

// x 2^n for whole n, in two steps: 2^n alone may be beyond fp32.
inline __m512 scaled(const __m512 &x, const __m512 &n) {
    float values[16], powers[16];
    std::memcpy(values, &x, sizeof x);
    std::memcpy(powers, &n, sizeof n);
    for (int i = 0; i < 16; ++i) {
        const int power = powers[i] == powers[i] ? static_cast<int>(powers[i]) : 0, half = power / 2;
        values[i] *= bits<float>(static_cast<uint32_t>(half + 127) << 23);
        values[i] *= bits<float>(static_cast<uint32_t>(power - half + 127) << 23);
    }
    return bits<__m512>(values);
}

template <class Join>
float reduced(const __m512 &x, Join join) {
    float values[16];
    std::memcpy(values, &x, sizeof x);
    for (int size = 8; size; size /= 2)
        for (int i = 0; i < size; ++i) values[i] = join(values[i], values[i + size]);
    return values[0];
}

}  // namespace emulated

#undef _mm256_mask_storeu_epi16
#undef _mm256_maskz_loadu_epi16
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtss_f32
#undef _mm512_dpbf16_ps
#undef _mm512_mask_storeu_epi16
#undef _mm512_mask_storeu_epi32
#undef _mm512_mask_storeu_ps
#undef _mm512_maskz_loadu_epi16
#undef _mm512_maskz_loadu_ps
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_max_ps
#undef _mm512_scalef_ps
#define _mm256_mask_storeu_epi16(to, mask, v) emulated::store<uint16_t, __m256i>(to, mask, v)
#define _mm256_maskz_loadu_epi16(mask, from) emulated::load<__m256i, uint16_t>(mask, from)
#define _mm512_cvtepu16_epi32(v) emulated::widened(v)
#define _mm512_cvtne2ps_pbh(high, low) emulated::rounded(high, low)
#define _mm512_cvtneps_pbh(v) emulated::rounded(v)
#define _mm512_cvtss_f32(v) ((v)[0])
#define _mm512_dpbf16_ps(sum, a, b) emulated::dot(sum, a, b)
#define _mm512_mask_storeu_epi16(to, mask, v) emulated::store<uint16_t, __m512i>(to, mask, v)
#define _mm512_mask_storeu_epi32(to, mask, v) emulated::store<uint32_t, __m512i>(to, mask, v)
#define _mm512_mask_storeu_ps(to, mask, v) emulated::store<float, __m512>(to, mask, v)
#define _mm512_maskz_loadu_epi16(mask, from) emulated::load<__m512i, uint16_t>(mask, from)
#define _mm512_maskz_loadu_ps(mask, from) emulated::load<__m512, float>(mask, from)
#define _mm512_reduce_add_ps(v) emulated::reduced(v, [](float a, float b) { return a + b; })
#define _mm512_reduce_max_ps(v) emulated::reduced(v, [](float a, float b) { return a > b ? a : b; })
#define _mm512_scalef_ps(x, n) emulated::scaled(x, n)
