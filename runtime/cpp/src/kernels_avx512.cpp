#include "kernels_avx512.hpp"

#include "x86.hpp"

#if EDGEDISTILL_X86

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says it of its own intrinsics (bug 105593)
#endif
#include <immintrin.h>

namespace edgedistill::detail {
namespace {

// Ones for the first `count`, of 64 at most.
inline __mmask64 first_bits(std::int64_t count) {
    return count <= 0 ? 0 : count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}

// 4 pixels after the horizontal step, as 32-bit numbers. `bytes`: the window.
EDGEDISTILL_AVX512 inline __m512i four_across(const std::uint8_t* bytes, const AcrossPlan::Window& window) {
    constexpr int ahead = 768;  // bytes
    _mm_prefetch(reinterpret_cast<const char*>(bytes + ahead), _MM_HINT_T0);
    const __m512i words = _mm512_permutexvar_epi32(_mm512_load_si512(window.words.data()), _mm512_loadu_si512(bytes));
    const __m512i pairs = _mm512_shuffle_epi8(words, _mm512_load_si512(window.bytes.data()));
    return _mm512_srai_epi32(_mm512_madd_epi16(pairs, _mm512_load_si512(window.weights.data())), 4);
}

// 8 pixels after the vertical step, 4 16-bit numbers each.
EDGEDISTILL_AVX512 inline __m512i eight_down(__m512i upper, __m512i lower, __m512i upper_weight, __m512i lower_weight) {
    const __m512i sum =
        _mm512_add_epi16(_mm512_mulhi_epi16(upper, upper_weight), _mm512_mulhi_epi16(lower, lower_weight));
    return _mm512_srai_epi16(_mm512_add_epi16(sum, _mm512_set1_epi16(2)), 2);
}

// 16 pixels of 4 16-bit numbers, 8 in each half -> 48 bytes BGR.
EDGEDISTILL_AVX512 inline __m512i packed_bgr(__m512i first, __m512i second) {
    const __m512i in_order = _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m512i drop_fourth =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    const __m512i close_up = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 15, 15, 15, 15);
    const __m512i pixels = _mm512_permutexvar_epi32(in_order, _mm512_packus_epi16(first, second));
    return _mm512_permutexvar_epi32(close_up, _mm512_shuffle_epi8(pixels, drop_fourth));
}

// 16 pixels in 4 lanes. Masked bytes are not read.
template <int C, bool Masked>
EDGEDISTILL_AVX512 inline __m512i sixteen_pixels(const std::uint8_t* at, __mmask64 mask) {
    const __m512i bytes = Masked ? _mm512_maskz_loadu_epi8(mask, at) : _mm512_loadu_si512(at);
    if (C == 4) return bytes;
    const __m512i spread = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    return _mm512_permutexvar_epi32(spread, bytes);
}

template <int K, int C>
EDGEDISTILL_AVX512 inline __m512i neighbours() {
    static constexpr Lane order = neighbour_order(K, C);
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(order.data())));
}

// Sums of k rows over 16 pixels, as 16-bit pairs.
template <int K, int C, bool Masked>
EDGEDISTILL_AVX512 inline __m512i square_sums(const std::uint8_t* at, std::ptrdiff_t stride, __mmask64 mask) {
    constexpr int ahead = 512;  // bytes; as in kernels.cpp
    __m512i sum = _mm512_setzero_si512();
    for (int y = 0; y < K; ++y, at += stride) {
        if (!Masked) _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
        const __m512i ordered = _mm512_shuffle_epi8(sixteen_pixels<C, Masked>(at, mask), neighbours<K, C>());
        sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(ordered, _mm512_set1_epi8(1)));
    }
    return sum;
}

template <int K>
EDGEDISTILL_AVX512 inline __m512i round_blocks(__m512i sums) {
    constexpr int shift = K == 4 ? 4 : 6;
    constexpr int half = 1 << (shift - 1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(sums, shift), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(sums, _mm512_add_epi32(odd, _mm512_set1_epi32(half - 1))), shift);
}

// Blocks that one call of reduced_blocks makes.
constexpr int blocks_at_once(int k) {
    return k == 2 ? 8 : 4;
}

// `bytes`: of the row from `at` on.
template <int K, int C, bool Masked>
EDGEDISTILL_AVX512 inline void reduced_blocks(const std::uint8_t* at, std::ptrdiff_t stride, std::int64_t bytes,
                                              std::uint8_t* out) {
    const __m512i first = square_sums<K, C, Masked>(at, stride, first_bits(bytes));
    if (K == 2) {
        const __m512i rounded = _mm512_srli_epi16(_mm512_add_epi16(first, _mm512_set1_epi16(2)), 2);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(rounded));
        return;
    }
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i sums = _mm512_madd_epi16(first, ones);
    if (K == 8) {
        // Each block fills two lanes.
        const __m512i second = square_sums<K, C, Masked>(at + 16 * C, stride, first_bits(bytes - 16 * C));
        const __m512i others = _mm512_madd_epi16(second, ones);
        sums = _mm512_add_epi32(_mm512_shuffle_i32x4(sums, others, 0x88), _mm512_shuffle_i32x4(sums, others, 0xDD));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(round_blocks<K>(sums)));
}

template <int K, int C>
EDGEDISTILL_AVX512 void reduce_of(const std::uint8_t* row, std::ptrdiff_t stride, std::int64_t columns,
                                  std::uint8_t* out) {
    constexpr int step = blocks_at_once(K);
    constexpr int read = (K == 8 ? 16 * C : 0) + 64;  // bytes of a row, where nothing is masked
    const std::int64_t bytes = columns * K * C;
    std::int64_t x = 0;
    for (; x * K * C + read <= bytes; x += step) {
        reduced_blocks<K, C, false>(row + x * K * C, stride, 2 * read, out + 4 * x);
    }
    for (; x < columns; x += step) {
        reduced_blocks<K, C, true>(row + x * K * C, stride, bytes - x * K * C, out + 4 * x);
    }
}

template <int C>
void reduce_channels(const std::uint8_t* row, std::ptrdiff_t stride, int k, std::int64_t columns, std::uint8_t* out) {
    if (k == 2) return reduce_of<2, C>(row, stride, columns, out);
    if (k == 4) return reduce_of<4, C>(row, stride, columns, out);
    return reduce_of<8, C>(row, stride, columns, out);
}

}  // namespace

EDGEDISTILL_AVX512 void across_avx512(const AcrossJob& job) {
    const __m512i in_order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const std::uint8_t* row = job.row;
    std::int16_t* out = job.out;
    const std::int32_t* start = job.plan->starts.data();
    const AcrossPlan::Window* window = job.plan->windows.data();
    const AcrossPlan::Window* const end = window + job.plan->windows.size();
    for (; window != end; window += 2, start += 2, out += 32) {
        const __m512i both =
            _mm512_packs_epi32(four_across(row + start[0], window[0]), four_across(row + start[1], window[1]));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi64(in_order, both));
    }
}

EDGEDISTILL_AVX512 void down_avx512(const DownJob& job) {
    const __m512i upper_weight = _mm512_set1_epi16(job.upper_weight);
    const __m512i lower_weight = _mm512_set1_epi16(job.lower_weight);
    const std::int16_t* upper = job.upper;
    const std::int16_t* lower = job.lower;
    std::uint8_t* out = job.out;
    int left = job.count;
    for (; left >= 16; left -= 16, upper += 64, lower += 64, out += 48) {
        const __m512i first =
            eight_down(_mm512_loadu_si512(upper), _mm512_loadu_si512(lower), upper_weight, lower_weight);
        const __m512i second =
            eight_down(_mm512_loadu_si512(upper + 32), _mm512_loadu_si512(lower + 32), upper_weight, lower_weight);
        _mm512_mask_storeu_epi32(out, 0x0FFF, packed_bgr(first, second));
    }
    if (left == 0) return;
    const auto pixels = static_cast<std::uint32_t>(first_bits(left));
    const auto low = static_cast<__mmask8>(pixels);
    const auto high = static_cast<__mmask8>(pixels >> 8);
    const __m512i first = eight_down(_mm512_maskz_loadu_epi64(low, upper), _mm512_maskz_loadu_epi64(low, lower),
                                     upper_weight, lower_weight);
    const __m512i second = eight_down(_mm512_maskz_loadu_epi64(high, upper + 32),
                                      _mm512_maskz_loadu_epi64(high, lower + 32), upper_weight, lower_weight);
    _mm512_mask_storeu_epi8(out, first_bits(std::int64_t{3} * left), packed_bgr(first, second));
}

void reduce_avx512(const std::uint8_t* row, std::ptrdiff_t stride, int channels, int k, std::int64_t columns,
                   std::uint8_t* out) {
    channels == 3 ? reduce_channels<3>(row, stride, k, columns, out) : reduce_channels<4>(row, stride, k, columns, out);
}

}  // namespace edgedistill::detail

#endif
