/* avx512.h - the AVX-512 intrinsics that mpt.h uses, on any CPU with AVX2: SIMDe's, and by two halves or one more step
   those that SIMDe 0.7 lacks. portable.sh puts it before the implementation. */
#ifndef AVX512_H
#define AVX512_H

#include <immintrin.h>
#include <simde/x86/avx512.h>
#undef I /* of complex.h */

#define __m512 simde__m512
#define __m512i simde__m512i
#define __m512d simde__m512d
#define __mmask16 simde__mmask16
#define __m512bh simde__m512
#define _mm512_setzero_ps simde_mm512_setzero_ps
#define _mm512_set1_ps simde_mm512_set1_ps
#define _mm512_add_ps simde_mm512_add_ps
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#define _mm512_dpbf16_ps avx512_dpbf16_ps
#define _mm512_loadu_ps simde_mm512_loadu_ps
#define _mm512_storeu_ps simde_mm512_storeu_ps
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_add_epi32 simde_mm512_add_epi32
#define _mm512_and_si512 simde_mm512_and_si512
#define _mm512_cmpgt_epi32_mask simde_mm512_cmpgt_epi32_mask
#define _mm512_mask_or_epi32 simde_mm512_mask_or_epi32
#define _mm512_maskz_srli_epi32(k, a, n) simde_mm512_maskz_mov_epi32(k, simde_mm512_srli_epi32(a, n))
#define _mm512_maskz_cvtps_ph(k, a, rounding) avx512_maskz_cvtps_ph(k, a)
#define _mm512_maskz_cvtph_ps avx512_maskz_cvtph_ps
#define _mm512_maskz_slli_epi32(k, a, n) simde_mm512_maskz_mov_epi32(k, simde_mm512_slli_epi32(a, n))
#define _mm512_maskz_cvtepu16_epi32 avx512_maskz_cvtepu16_epi32
#define _mm512_permutex2var_epi16 avx512_permutex2var_epi16
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#define _mm512_loadu_pd simde_mm512_loadu_pd
#define _mm512_storeu_pd simde_mm512_storeu_pd
#define _mm512_fmadd_pd simde_mm512_fmadd_pd
#define _mm512_maskz_cvtps_pd(k, a) avx512_cvtps_pd(a) /* all of it */
#define _mm512_sub_epi32 simde_mm512_sub_epi32
#define _mm512_min_epu32 simde_mm512_min_epu32
#define _mm512_cmple_epu32_mask avx512_cmple_epu32_mask
#define _mm512_cvtne2ps_pbh avx512_cvtne2ps_pbh

static inline __m512 avx512_maskz_cvtph_ps(__mmask16 k, __m256i a) {
    float out[16];
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm256_castsi256_si128(a)));
    _mm256_storeu_ps(out + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
    return simde_mm512_maskz_mov_ps(k, simde_mm512_loadu_ps(out));
}

/* rounds to nearest even */
static inline __m256i avx512_maskz_cvtps_ph(__mmask16 k, __m512 a) {
    float in[16];
    simde_mm512_storeu_ps(in, simde_mm512_maskz_mov_ps(k, a));
    return _mm256_set_m128i(_mm256_cvtps_ph(_mm256_loadu_ps(in + 8), _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT));
}

static inline __m512d avx512_cvtps_pd(__m256 a) {
    double out[8];
    _mm256_storeu_pd(out, _mm256_cvtps_pd(_mm256_castps256_ps128(a)));
    _mm256_storeu_pd(out + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
    return simde_mm512_loadu_pd(out);
}

static inline __m512i avx512_maskz_cvtepu16_epi32(__mmask16 k, __m256i a) {
    uint16_t in[16];
    uint32_t out[16];
    int i;
    _mm256_storeu_si256((__m256i *)(void *)in, a);
    for (i = 0; i < 16; i++) out[i] = in[i];
    return simde_mm512_maskz_mov_epi32(k, simde_mm512_loadu_si512(out));
}

static inline __m512i avx512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
    uint16_t from[64], at[32], out[32];
    int i;
    simde_mm512_storeu_si512(from, a), simde_mm512_storeu_si512(from + 32, b);
    simde_mm512_storeu_si512(at, index);
    for (i = 0; i < 32; i++) out[i] = from[at[i] % 64];
    return simde_mm512_loadu_si512(out);
}

static inline __mmask16 avx512_cmple_epu32_mask(__m512i a, __m512i b) {
    uint32_t x[16], y[16];
    int i, mask = 0;
    simde_mm512_storeu_si512(x, a), simde_mm512_storeu_si512(y, b);
    for (i = 0; i < 16; i++) mask |= (x[i] <= y[i]) << i;
    return (__mmask16)mask;
}

/* Rounded to nearest even, b in the lower half; the chip takes subnormals for zeros, and so does this. */
static inline __m512bh avx512_cvtne2ps_pbh(__m512 a, __m512 b) {
    uint32_t in[32];
    uint16_t out[32];
    int i;
    simde_mm512_storeu_ps(in, b), simde_mm512_storeu_ps(in + 16, a);
    for (i = 0; i < 32; i++) {
        const uint32_t u = in[i] & 0x7f800000u ? in[i] : in[i] & 0x80000000u;
        const int nan = (u & 0x7fffffffu) > 0x7f800000u;
        out[i] = (uint16_t)(nan ? u >> 16 | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
    return simde_mm512_castsi512_ps(simde_mm512_loadu_si512(out));
}

/* sum[i] += x[2 i] y[2 i] + x[2 i + 1] y[2 i + 1]; the chip takes subnormals for zeros, this does not */
static inline __m512 avx512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) {
    const __m512i a = simde_mm512_castps_si512(x), b = simde_mm512_castps_si512(y);
    const __m512i high = simde_mm512_set1_epi32((int)0xffff0000u);
    sum = simde_mm512_fmadd_ps(simde_mm512_castsi512_ps(simde_mm512_slli_epi32(a, 16)),
                               simde_mm512_castsi512_ps(simde_mm512_slli_epi32(b, 16)), sum);
    return simde_mm512_fmadd_ps(simde_mm512_castsi512_ps(simde_mm512_and_si512(a, high)),
                                simde_mm512_castsi512_ps(simde_mm512_and_si512(b, high)), sum);
}

#endif
