#include "kernels.hpp"

#include <algorithm>
#include <array>
#include <type_traits>

#include "kernels_avx512.hpp"
#include "png_filter.hpp"
#include "x86.hpp"

#if EDGEDISTILL_X86
#include <immintrin.h>
#endif

namespace edgedistill::detail {
namespace {

void across_from(const AcrossJob& job, int begin) {
    const AcrossPlan& plan = *job.plan;
    const std::array<int, 3> place = places(plan.layout);
    for (int x = begin; x < plan.count; ++x) {
        const auto at_x = static_cast<std::size_t>(x);
        const int left_weight = static_cast<int>(plan.weights[at_x] & 0xFFFF);
        const int right_weight = static_cast<int>(plan.weights[at_x] >> 16);
        const std::uint8_t* left = job.row + plan.offsets[at_x];
        // There is nothing to the right of the last pixel, and then its weight is 0.
        const std::uint8_t* right = right_weight != 0 ? left + channels(plan.layout) : left;
        std::int16_t* out = job.out + 4 * static_cast<std::ptrdiff_t>(x);
        for (int c = 0; c < 3; ++c) {
            const int at = place[static_cast<std::size_t>(c)];
            out[c] = static_cast<std::int16_t>((left[at] * left_weight + right[at] * right_weight) >> 4);
        }
        out[3] = 0;
    }
}

void across_portable(const AcrossJob& job) {
    across_from(job, 0);
}

void down_from(const DownJob& job, int begin) {
    for (int x = begin; x < job.count; ++x) {
        const std::int16_t* upper = job.upper + 4 * static_cast<std::ptrdiff_t>(x);
        const std::int16_t* lower = job.lower + 4 * static_cast<std::ptrdiff_t>(x);
        std::uint8_t* out = job.out + 3 * static_cast<std::ptrdiff_t>(x);
        for (int c = 0; c < 3; ++c) {
            const int sum = ((upper[c] * job.upper_weight) >> 16) + ((lower[c] * job.lower_weight) >> 16);
            out[c] = static_cast<std::uint8_t>((sum + 2) >> 2);
        }
    }
}

void down_portable(const DownJob& job) {
    down_from(job, 0);
}

template <int Count>
EDGEDISTILL_INLINE void sum_bytes(const std::uint8_t* row, std::ptrdiff_t stride, std::size_t bytes, bool add,
                                  std::uint16_t* sums) {
    std::array<const std::uint8_t*, Count> rows;
    for (int n = 0; n < Count; ++n) rows[static_cast<std::size_t>(n)] = row + n * stride;
    const auto column = [&rows](std::size_t at) {
        unsigned sum = 0;
        for (const std::uint8_t* one : rows) sum += one[at];
        return static_cast<std::uint16_t>(sum);
    };
    if (add) {
        for (std::size_t at = 0; at < bytes; ++at) sums[at] = static_cast<std::uint16_t>(sums[at] + column(at));
    } else {
        for (std::size_t at = 0; at < bytes; ++at) sums[at] = column(at);
    }
}

EDGEDISTILL_INLINE void sum_any(const std::uint8_t* row, std::ptrdiff_t stride, int count, std::size_t bytes, bool add,
                                std::uint16_t* sums) {
    switch (count) {
        case 2:
            return sum_bytes<2>(row, stride, bytes, add, sums);
        case 4:
            return sum_bytes<4>(row, stride, bytes, add, sums);
        case 8:
            return sum_bytes<8>(row, stride, bytes, add, sums);
        default:
            for (int n = 0; n < count; ++n) sum_bytes<1>(row + n * stride, stride, bytes, add || n > 0, sums);
    }
}

void sum_portable(const std::uint8_t* row, std::ptrdiff_t stride, int count, std::size_t bytes, bool add,
                  std::uint16_t* sums) {
    sum_any(row, stride, count, bytes, add, sums);
}

// OpenCV rounds halves up for 2 x 2 blocks, which it adds in integers, and to even for larger ones, in floats.
template <int K>
EDGEDISTILL_INLINE std::uint8_t round_block(unsigned sum) {
    constexpr int shift = K == 2 ? 2 : K == 4 ? 4 : 6;
    constexpr unsigned half = 1U << (shift - 1);
    const unsigned bias = K == 2 ? half : half - 1 + (sum >> shift & 1);
    return static_cast<std::uint8_t>((sum + bias) >> shift);
}

template <int K, int C>
EDGEDISTILL_INLINE void average_from(const std::uint16_t* sums, std::int64_t begin, std::int64_t columns,
                                     std::uint8_t* out) {
    for (std::int64_t x = begin; x < columns; ++x) {
        const std::uint16_t* block = sums + x * K * C;
        for (int c = 0; c < (C == 1 ? 1 : 3); ++c) {
            unsigned sum = 0;
            for (int n = 0; n < K; ++n) sum += block[n * C + c];
            out[x * (C == 1 ? 1 : 4) + c] = round_block<K>(sum);
        }
    }
}

template <int K>
void average_of(const std::uint16_t* sums, int channel_count, std::int64_t columns, std::uint8_t* out) {
    if (channel_count == 1) return average_from<K, 1>(sums, 0, columns, out);
    if (channel_count == 3) return average_from<K, 3>(sums, 0, columns, out);
    return average_from<K, 4>(sums, 0, columns, out);
}

void average_portable(const std::uint16_t* sums, int channel_count, int k, std::int64_t columns, std::uint8_t* out) {
    if (k == 2) return average_of<2>(sums, channel_count, columns, out);
    if (k == 4) return average_of<4>(sums, channel_count, columns, out);
    return average_of<8>(sums, channel_count, columns, out);
}

template <int K, int C>
EDGEDISTILL_INLINE void reduce_from(const std::uint8_t* row, std::ptrdiff_t stride, std::int64_t begin,
                                    std::int64_t columns, std::uint8_t* out) {
    for (std::int64_t x = begin; x < columns; ++x) {
        for (int c = 0; c < 3; ++c) {
            unsigned sum = 0;
            for (int n = 0; n < K * K; ++n) sum += row[n / K * stride + (x * K + n % K) * C + c];
            out[4 * x + c] = round_block<K>(sum);
        }
    }
}

// Calls the body with k and the number of channels as constants.
template <typename Body>
EDGEDISTILL_INLINE void with_constants(int k, int channel_count, const Body& body) {
    using std::integral_constant;
    const auto with_k = [&](auto channels_of_it) {
        if (k == 2) return body(integral_constant<int, 2>(), channels_of_it);
        if (k == 4) return body(integral_constant<int, 4>(), channels_of_it);
        return body(integral_constant<int, 8>(), channels_of_it);
    };
    if (channel_count == 3) return with_k(integral_constant<int, 3>());
    return with_k(integral_constant<int, 4>());
}

void reduce_portable(const std::uint8_t* row, std::ptrdiff_t stride, int channel_count, int k, std::int64_t columns,
                     std::uint8_t* out) {
    with_constants(k, channel_count, [&](auto block, auto pixel) {
        reduce_from<decltype(block)::value, decltype(pixel)::value>(row, stride, 0, columns, out);
    });
}

// BT.601, limited range, in 20-bit fixed point: the numbers of OpenCV's COLOR_YUV2BGR_NV12.
constexpr int yuv_shift = 20;
constexpr int yuv_y = 1220542;
constexpr int yuv_ub = 2116026;
constexpr int yuv_ug = -409993;
constexpr int yuv_vg = -852492;
constexpr int yuv_vr = 1673527;
constexpr int yuv_half = 1 << (yuv_shift - 1);

std::uint8_t saturate(int value) {
    return static_cast<std::uint8_t>(std::clamp(value, 0, 255));
}

void yuv_from(const std::uint8_t* y, const std::uint8_t* u, const std::uint8_t* v, int u_step, int begin, int width,
              std::uint8_t* out) {
    for (int x = begin; x < width; ++x) {
        const std::ptrdiff_t chroma = static_cast<std::ptrdiff_t>(x / 2) * u_step;
        const int blue = u[chroma] - 128;
        const int red = v[chroma] - 128;
        const int luma = std::max(0, y[x] - 16) * yuv_y + yuv_half;
        std::uint8_t* pixel = out + 4 * static_cast<std::ptrdiff_t>(x);
        pixel[0] = saturate((luma + yuv_ub * blue) >> yuv_shift);
        pixel[1] = saturate((luma + yuv_ug * blue + yuv_vg * red) >> yuv_shift);
        pixel[2] = saturate((luma + yuv_vr * red) >> yuv_shift);
        pixel[3] = 0;
    }
}

void yuv_portable(const std::uint8_t* y, const std::uint8_t* u, const std::uint8_t* v, int u_step, int width,
                  std::uint8_t* out) {
    yuv_from(y, u, v, u_step, 0, width, out);
}

constexpr Kernels portable{across_portable, down_portable, sum_portable,     average_portable,
                           reduce_portable, yuv_portable,  unfilter_portable};

#if EDGEDISTILL_X86

// Two pixels, 8 bytes, to 16-bit pairs (left, right) of blue, green and red.
EDGEDISTILL_AVX2 __m256i pair_shuffle(Layout layout) {
    const std::array<int, 3> place = places(layout);
    const int next = channels(layout);
    std::array<std::int8_t, 16> index{};
    index.fill(-1);
    for (std::size_t c = 0; c < 3; ++c) {
        index[4 * c] = static_cast<std::int8_t>(place[c]);
        index[4 * c + 2] = static_cast<std::int8_t>(place[c] + next);
    }
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index.data())));
}

EDGEDISTILL_AVX2 inline __m256i two_pairs(const std::uint8_t* row, std::int32_t first, std::int32_t second) {
    const auto* a = reinterpret_cast<const __m128i*>(row + first);
    const auto* b = reinterpret_cast<const __m128i*>(row + second);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadl_epi64(a)), _mm_loadl_epi64(b), 1);
}

EDGEDISTILL_AVX2 void across_avx2(const AcrossJob& job) {
    const AcrossPlan& plan = *job.plan;
    const __m256i shuffle = pair_shuffle(plan.layout);
    const __m256i even_index = _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2);
    const __m256i odd_index = _mm256_setr_epi32(1, 1, 1, 1, 3, 3, 3, 3);
    int x = 0;
    for (; x + 4 <= plan.fast; x += 4) {
        const std::int32_t* at = plan.offsets.data() + x;
        const __m256i weights =
            _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plan.weights.data() + x)));
        const __m256i even = _mm256_madd_epi16(_mm256_shuffle_epi8(two_pairs(job.row, at[0], at[2]), shuffle),
                                               _mm256_permutevar8x32_epi32(weights, even_index));
        const __m256i odd = _mm256_madd_epi16(_mm256_shuffle_epi8(two_pairs(job.row, at[1], at[3]), shuffle),
                                              _mm256_permutevar8x32_epi32(weights, odd_index));
        const __m256i four = _mm256_packs_epi32(_mm256_srai_epi32(even, 4), _mm256_srai_epi32(odd, 4));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(job.out + 4 * static_cast<std::ptrdiff_t>(x)), four);
    }
    across_from(job, x);
}

EDGEDISTILL_AVX2 inline __m256i down_four(const DownJob& job, int x, __m256i upper_weight, __m256i lower_weight) {
    const std::ptrdiff_t at = 4 * static_cast<std::ptrdiff_t>(x);
    const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(job.upper + at));
    const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(job.lower + at));
    const __m256i sum =
        _mm256_add_epi16(_mm256_mulhi_epi16(upper, upper_weight), _mm256_mulhi_epi16(lower, lower_weight));
    return _mm256_srai_epi16(_mm256_add_epi16(sum, _mm256_set1_epi16(2)), 2);
}

EDGEDISTILL_AVX2 void down_avx2(const DownJob& job) {
    const __m256i upper_weight = _mm256_set1_epi16(job.upper_weight);
    const __m256i lower_weight = _mm256_set1_epi16(job.lower_weight);
    const __m256i drop_fourth =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
    int x = 0;
    // Each store writes 4 bytes more than its pixels.
    for (; x + 10 <= job.count; x += 8) {
        const __m256i packed = _mm256_packus_epi16(down_four(job, x, upper_weight, lower_weight),
                                                   down_four(job, x + 4, upper_weight, lower_weight));
        const __m256i pixels = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(packed, 0xD8), drop_fourth);
        std::uint8_t* out = job.out + 3 * static_cast<std::ptrdiff_t>(x);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(pixels));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 12), _mm256_extracti128_si256(pixels, 1));
    }
    down_from(job, x);
}

EDGEDISTILL_AVX2 void sum_avx2(const std::uint8_t* row, std::ptrdiff_t stride, int count, std::size_t bytes, bool add,
                               std::uint16_t* sums) {
    sum_any(row, stride, count, bytes, add, sums);
}

// The sums of two blocks: blue, green and red (and the fourth) as 32-bit numbers, one block in each half.
template <int K, int C>
EDGEDISTILL_AVX2 inline __m256i block_sums(const std::uint16_t* first, const std::uint16_t* second, __m256i pairs) {
    __m256i sum = _mm256_setzero_si256();
    for (int n = 0; n < K; n += 2) {
        const auto* a = reinterpret_cast<const __m128i*>(first + n * C);
        const auto* b = reinterpret_cast<const __m128i*>(second + n * C);
        const __m256i two = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(a)), _mm_loadu_si128(b), 1);
        sum = _mm256_add_epi16(sum, _mm256_shuffle_epi8(two, pairs));
    }
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}

template <int K>
EDGEDISTILL_AVX2 inline __m256i round_blocks(__m256i sums) {
    constexpr int shift = K == 2 ? 2 : K == 4 ? 4 : 6;
    constexpr short half = 1 << (shift - 1);
    if (K == 2) return _mm256_srli_epi16(_mm256_add_epi16(sums, _mm256_set1_epi16(half)), shift);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(sums, shift), _mm256_set1_epi16(1));
    const __m256i bias = _mm256_add_epi16(odd, _mm256_set1_epi16(static_cast<short>(half - 1)));
    return _mm256_srli_epi16(_mm256_add_epi16(sums, bias), shift);
}

template <int K, int C>
EDGEDISTILL_AVX2 void average_avx2_of(const std::uint16_t* sums, std::int64_t columns, std::uint8_t* out) {
    const __m256i pairs =
        _mm256_broadcastsi128_si256(C == 3 ? _mm_setr_epi8(0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, -1, -1, -1, -1)
                                           : _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    std::int64_t x = 0;
    for (; x + 4 <= columns; x += 4) {
        const std::uint16_t* block = sums + x * K * C;
        const __m256i even = block_sums<K, C>(block, block + 2 * K * C, pairs);
        const __m256i odd = block_sums<K, C>(block + K * C, block + 3 * K * C, pairs);
        const __m256i rounded = round_blocks<K>(_mm256_packs_epi32(even, odd));
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(rounded, rounded), 0xD8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * x), _mm256_castsi256_si128(bytes));
    }
    average_from<K, C>(sums, x, columns, out);
}

template <int K>
EDGEDISTILL_AVX2 void average_avx2_k(const std::uint16_t* sums, int channel_count, std::int64_t columns,
                                     std::uint8_t* out) {
    if (channel_count == 1) return average_from<K, 1>(sums, 0, columns, out);
    if (channel_count == 3) return average_avx2_of<K, 3>(sums, columns, out);
    return average_avx2_of<K, 4>(sums, columns, out);
}

EDGEDISTILL_AVX2 void average_avx2(const std::uint16_t* sums, int channel_count, int k, std::int64_t columns,
                                   std::uint8_t* out) {
    if (k == 2) return average_avx2_k<2>(sums, channel_count, columns, out);
    if (k == 4) return average_avx2_k<4>(sums, channel_count, columns, out);
    return average_avx2_k<8>(sums, channel_count, columns, out);
}

template <int K, int C>
EDGEDISTILL_AVX2 inline __m256i neighbours() {
    static constexpr Lane order = neighbour_order(K, C);
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(order.data())));
}

// Sums of k rows over the 4 (k = 8: 8) pixels at `first` and at `second`, as 16-bit pairs. Fetch: asks for what comes
// next, which the CPU does not foresee where the rows lie in different pages.
template <int K, int C, bool Fetch>
EDGEDISTILL_AVX2 inline __m256i square_sums(const std::uint8_t* first, const std::uint8_t* second,
                                            std::ptrdiff_t stride, __m256i order) {
    constexpr int ahead = 512;  // bytes; measured: the best of 256 to 4096 for frames in the cache and in memory
    __m256i sum = _mm256_setzero_si256();
    for (int y = 0; y < K; ++y, first += stride, second += stride) {
        if (Fetch) _mm_prefetch(reinterpret_cast<const char*>(first + ahead), _MM_HINT_T0);
        for (int pixel = 0; pixel < K; pixel += 4) {
            const auto* a = reinterpret_cast<const __m128i*>(first + pixel * C);
            const auto* b = reinterpret_cast<const __m128i*>(second + pixel * C);
            const __m256i both =
                _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(a)), _mm_loadu_si128(b), 1);
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_shuffle_epi8(both, order), _mm256_set1_epi8(1));
            sum = _mm256_add_epi16(sum, pairs);
        }
    }
    return sum;
}

template <int K, int C>
EDGEDISTILL_AVX2 void reduce_avx2_of(const std::uint8_t* row, std::ptrdiff_t stride, std::int64_t columns,
                                     std::uint8_t* out) {
    constexpr int block = K * C;
    const __m256i order = neighbours<K, C>();
    const __m256i ones = _mm256_set1_epi16(1);
    std::int64_t x = 0;
    // Loads of 3 channels read 4 bytes more than their pixels, which the next block has.
    for (; x + 4 < columns; x += 4) {
        const std::uint8_t* at = row + x * block;
        __m256i sums;
        if (K == 2) {
            sums = square_sums<K, C, true>(at, at + 2 * block, stride, order);
        } else {
            const __m256i even = square_sums<K, C, true>(at, at + 2 * block, stride, order);
            const __m256i odd = square_sums<K, C, false>(at + block, at + 3 * block, stride, order);
            sums = _mm256_packs_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones));
        }
        const __m256i rounded = round_blocks<K>(sums);
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(rounded, rounded), 0xD8);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * x), _mm256_castsi256_si128(bytes));
    }
    reduce_from<K, C>(row, stride, x, columns, out);
}

EDGEDISTILL_AVX2 void reduce_avx2(const std::uint8_t* row, std::ptrdiff_t stride, int channel_count, int k,
                                  std::int64_t columns, std::uint8_t* out) {
    with_constants(k, channel_count, [&](auto block, auto pixel) {
        reduce_avx2_of<decltype(block)::value, decltype(pixel)::value>(row, stride, columns, out);
    });
}

EDGEDISTILL_AVX2 inline __m256i times(__m256i value, int factor) {
    return _mm256_mullo_epi32(value, _mm256_set1_epi32(factor));
}

// What 8 pairs of U and V add to each channel.
struct Chroma {
    __m256i blue, green, red;
};

EDGEDISTILL_AVX2 inline Chroma chroma_of(__m128i u_bytes, __m128i v_bytes) {
    const __m256i u = _mm256_sub_epi32(_mm256_cvtepu8_epi32(u_bytes), _mm256_set1_epi32(128));
    const __m256i v = _mm256_sub_epi32(_mm256_cvtepu8_epi32(v_bytes), _mm256_set1_epi32(128));
    const __m256i half = _mm256_set1_epi32(yuv_half);
    return {_mm256_add_epi32(half, times(u, yuv_ub)),
            _mm256_add_epi32(half, _mm256_add_epi32(times(u, yuv_ug), times(v, yuv_vg))),
            _mm256_add_epi32(half, times(v, yuv_vr))};
}

// One channel of 16 pixels, as 16-bit numbers: `even` and `odd` are luma of pixels 0-3, 8-11 and 4-7, 12-15.
EDGEDISTILL_AVX2 inline __m256i yuv_channel(__m256i even, __m256i odd, __m256i chroma) {
    const __m256i a = _mm256_add_epi32(even, _mm256_unpacklo_epi32(chroma, chroma));
    const __m256i b = _mm256_add_epi32(odd, _mm256_unpackhi_epi32(chroma, chroma));
    return _mm256_packs_epi32(_mm256_srai_epi32(a, yuv_shift), _mm256_srai_epi32(b, yuv_shift));
}

EDGEDISTILL_AVX2 inline __m256i luma_of(__m128i bytes) {
    const __m256i y = _mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(16));
    return _mm256_mullo_epi32(_mm256_max_epi32(y, _mm256_setzero_si256()), _mm256_set1_epi32(yuv_y));
}

EDGEDISTILL_AVX2 inline void yuv_sixteen(__m128i y, const Chroma& chroma, std::uint8_t* out) {
    const __m128i ordered = _mm_shuffle_epi32(y, 0xD8);
    const __m256i even = luma_of(ordered);
    const __m256i odd = luma_of(_mm_unpackhi_epi64(ordered, ordered));
    const __m256i blue_red =
        _mm256_packus_epi16(yuv_channel(even, odd, chroma.blue), yuv_channel(even, odd, chroma.red));
    const __m256i green_nothing = _mm256_packus_epi16(yuv_channel(even, odd, chroma.green), _mm256_setzero_si256());
    const __m256i blue_green = _mm256_unpacklo_epi8(blue_red, green_nothing);
    const __m256i red_nothing = _mm256_unpackhi_epi8(blue_red, green_nothing);
    const __m256i low = _mm256_unpacklo_epi16(blue_green, red_nothing);
    const __m256i high = _mm256_unpackhi_epi16(blue_green, red_nothing);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32), _mm256_permute2x128_si256(low, high, 0x31));
}

EDGEDISTILL_AVX2 void yuv_avx2(const std::uint8_t* y, const std::uint8_t* u, const std::uint8_t* v, int u_step,
                               int width, std::uint8_t* out) {
    const __m128i evens = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i odds = _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    int x = 0;
    for (; x + 16 <= width; x += 16) {
        __m128i blue;
        __m128i red;
        if (u_step == 2) {
            // u and v are one interleaved row.
            const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(u + x));
            blue = _mm_shuffle_epi8(both, evens);
            red = _mm_shuffle_epi8(both, odds);
        } else {
            blue = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(u + x / 2));
            red = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(v + x / 2));
        }
        const __m128i luma = _mm_loadu_si128(reinterpret_cast<const __m128i*>(y + x));
        yuv_sixteen(luma, chroma_of(blue, red), out + 4 * static_cast<std::ptrdiff_t>(x));
    }
    yuv_from(y, u, v, u_step, x, width, out);
}

constexpr Kernels avx2{across_avx2, down_avx2, sum_avx2, average_avx2, reduce_avx2, yuv_avx2, unfilter_avx2};

void across_wide(const AcrossJob& job) {
    job.plan->windows.empty() ? across_avx2(job) : across_avx512(job);
}

constexpr Kernels avx512{across_wide, down_avx512, sum_avx2, average_avx2, reduce_avx512, yuv_avx2, unfilter_avx2};

#endif

}  // namespace

std::vector<const Kernels*> runnable_kernels() {
    std::vector<const Kernels*> found;
#if EDGEDISTILL_X86
    if (__builtin_cpu_supports("avx512bw") != 0) found.push_back(&avx512);
    if (__builtin_cpu_supports("avx2") != 0) found.push_back(&avx2);
#endif
    found.push_back(&portable);
    return found;
}

const Kernels& kernels() {
    static const Kernels& widest = *runnable_kernels().front();
    return widest;
}

}  // namespace edgedistill::detail
