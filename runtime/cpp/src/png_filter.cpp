#include "png_filter.hpp"

#include <array>
#include <cstdlib>

#include "x86.hpp"

#if EDGEDISTILL_X86
#include <immintrin.h>
#endif

namespace edgedistill::detail {
namespace {

enum Filter : std::uint8_t { none, sub, up, average, paeth };

int paeth_of(int left, int above, int corner) {
    const int to_left = std::abs(above - corner);
    const int to_above = std::abs(left - corner);
    const int to_corner = std::abs(left + above - 2 * corner);
    if (to_left <= to_above && to_left <= to_corner) return left;
    return to_above <= to_corner ? above : corner;
}

int foretold(std::uint8_t filter, int left, int above, int corner) {
    switch (filter) {
        case sub:
            return left;
        case up:
            return above;
        case average:
            return (left + above) / 2;
        case paeth:
            return paeth_of(left, above, corner);
        default:
            return 0;
    }
}

#if EDGEDISTILL_X86

using Vector = __m128i;
// Plain arrays: a vector type's attributes are lost on template arguments.
struct Square {
    Vector rows[16];
};

EDGEDISTILL_AVX2 EDGEDISTILL_INLINE Vector load(const std::uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const Vector*>(at));
}

// Row r, column c becomes row c, column r.
EDGEDISTILL_AVX2 EDGEDISTILL_INLINE void transpose(Square& square) {
    for (int stage = 0; stage < 4; ++stage) {
        Square next;
        for (int i = 0; i < 8; ++i) {
            next.rows[2 * i] = _mm_unpacklo_epi8(square.rows[i], square.rows[i + 8]);
            next.rows[2 * i + 1] = _mm_unpackhi_epi8(square.rows[i], square.rows[i + 8]);
        }
        square = next;
    }
}

// Which rows have which filter: all bits of a lane.
struct Masks {
    Vector sub;
    Vector up;
    Vector average;
    Vector paeth;
};

EDGEDISTILL_AVX2 EDGEDISTILL_INLINE Vector distance(Vector a, Vector b) {
    return _mm_or_si128(_mm_subs_epu8(a, b), _mm_subs_epu8(b, a));
}

EDGEDISTILL_AVX2 EDGEDISTILL_INLINE Vector paeth_of(Vector left, Vector above, Vector corner) {
    const Vector to_left = distance(above, corner);
    const Vector to_above = distance(left, corner);
    // |left + above - 2 corner|: the sum of both distances where both lie on one side of the corner, else their
    // difference. A sum above 255 is no smaller than either, and that is all that counts.
    const Vector sides = _mm_xor_si128(_mm_cmpeq_epi8(_mm_max_epu8(left, corner), left),
                                       _mm_cmpeq_epi8(_mm_max_epu8(above, corner), above));
    const Vector to_corner = _mm_blendv_epi8(_mm_adds_epu8(to_left, to_above), distance(to_left, to_above), sides);
    const Vector nearer = _mm_min_epu8(to_above, to_corner);
    const Vector other = _mm_blendv_epi8(corner, above, _mm_cmpeq_epi8(nearer, to_above));
    return _mm_blendv_epi8(other, left, _mm_cmpeq_epi8(_mm_min_epu8(nearer, to_left), to_left));
}

EDGEDISTILL_AVX2 EDGEDISTILL_INLINE Vector foretold(const Masks& masks, Vector left, Vector above, Vector corner) {
    const Vector odd = _mm_and_si128(_mm_xor_si128(left, above), _mm_set1_epi8(1));
    const Vector mean = _mm_sub_epi8(_mm_avg_epu8(left, above), odd);  // PNG rounds down
    const Vector first = _mm_or_si128(_mm_and_si128(masks.sub, left), _mm_and_si128(masks.up, above));
    const Vector second =
        _mm_or_si128(_mm_and_si128(masks.average, mean), _mm_and_si128(masks.paeth, paeth_of(left, above, corner)));
    return _mm_or_si128(first, second);
}

// The four steps before this square: what lies up to a pixel to the left.
struct Past {
    Vector made[4];
    Vector above[4];
};

// Sixteen steps: vector `step` of the square holds, of row r, the byte `step` - r further on. `above`: the bytes of the
// row above the first.
template <int pixel_size>
EDGEDISTILL_AVX2 EDGEDISTILL_INLINE void walk(const Masks& masks, const std::uint8_t* above, Square& square,
                                              Past& past) {
    constexpr int before = 4;
    Vector made[before + 16];
    Vector over[before + 16];
    for (int i = 0; i < before; ++i) {
        made[i] = past.made[i];
        over[i] = past.above[i];
    }
    for (int step = 0; step < 16; ++step) {
        const int now = before + step;
        over[now] = _mm_insert_epi8(_mm_slli_si128(made[now - 1], 1), above[step], 0);
        const Vector guess = foretold(masks, made[now - pixel_size], over[now], over[now - pixel_size]);
        made[now] = _mm_add_epi8(square.rows[step], guess);
        square.rows[step] = made[now];
    }
    for (int i = 0; i < before; ++i) {
        past.made[i] = made[16 + i];
        past.above[i] = over[16 + i];
    }
}

EDGEDISTILL_AVX2 EDGEDISTILL_INLINE Vector rows_with(Filter filter, Vector filters) {
    return _mm_cmpeq_epi8(filters, _mm_set1_epi8(static_cast<char>(filter)));
}

EDGEDISTILL_AVX2 EDGEDISTILL_INLINE Masks masks_of(const FilteredRows& rows) {
    alignas(16) std::array<std::uint8_t, 16> filters{};
    for (int row = 0; row < rows.count; ++row) {
        filters[static_cast<std::size_t>(row)] = rows.data[static_cast<std::size_t>(row) * (rows.bytes + 1)];
    }
    const Vector all = load(filters.data());
    return {rows_with(sub, all), rows_with(up, all), rows_with(average, all), rows_with(paeth, all)};
}

template <int pixel_size>
EDGEDISTILL_AVX2 void unfilter_pixels(const FilteredRows& rows, std::uint8_t* band, std::ptrdiff_t stride) noexcept {
    const Masks masks = masks_of(rows);
    const auto row_step = static_cast<std::ptrdiff_t>(rows.bytes) + 1;
    const std::uint8_t* above = band + (FilteredRows::most - 1) * stride;
    const auto end = static_cast<std::ptrdiff_t>(rows.bytes) + rows.count - 1;  // the last row is so far behind
    const Vector lanes = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    Past past{};
    for (std::ptrdiff_t at = 0; at < end; at += 16) {
        Square square{};
        for (int row = 0; row < rows.count; ++row) {
            square.rows[row] = load(rows.data + row * row_step + 1 + at - row);
        }
        transpose(square);
        if (at == 0) {
            // Left of a row's first byte there is nothing.
            for (int step = 0; step < 16; ++step) {
                Vector& bytes = square.rows[step];
                bytes = _mm_andnot_si128(_mm_cmpgt_epi8(lanes, _mm_set1_epi8(static_cast<char>(step))), bytes);
            }
        }
        walk<pixel_size>(masks, above + at, square, past);
        transpose(square);
        for (int row = 0; row < rows.count; ++row) {
            _mm_storeu_si128(reinterpret_cast<Vector*>(band + row * stride + at - row), square.rows[row]);
        }
    }
}

#endif

}  // namespace

void unfilter_portable(const FilteredRows& rows, std::uint8_t* band, std::ptrdiff_t stride) noexcept {
    const auto pixel_size = static_cast<std::size_t>(rows.pixel_size);
    for (int row = 0; row < rows.count; ++row) {
        const std::uint8_t* in = rows.data + static_cast<std::size_t>(row) * (rows.bytes + 1);
        const std::uint8_t* above = band + (row == 0 ? FilteredRows::most - 1 : row - 1) * stride;
        std::uint8_t* out = band + row * stride;
        for (std::size_t x = 0; x < rows.bytes; ++x) {
            const bool first = x < pixel_size;
            const int left = first ? 0 : out[x - pixel_size];
            const int corner = first ? 0 : above[x - pixel_size];
            out[x] = static_cast<std::uint8_t>(in[1 + x] + foretold(in[0], left, above[x], corner));
        }
    }
}

#if EDGEDISTILL_X86
void unfilter_avx2(const FilteredRows& rows, std::uint8_t* band, std::ptrdiff_t stride) noexcept {
    if (rows.pixel_size == 1) return unfilter_pixels<1>(rows, band, stride);
    if (rows.pixel_size == 3) return unfilter_pixels<3>(rows, band, stride);
    return unfilter_pixels<4>(rows, band, stride);
}
#endif

}  // namespace edgedistill::detail
