// Kernels in 512-bit instructions, as kernels.hpp says of each; for CPUs with AVX-512BW.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "kernels.hpp"
#include "x86.hpp"

#if EDGEDISTILL_X86

namespace edgedistill::detail {

using Lane = std::array<std::int8_t, 16>;

// Shuffles the bytes of the 4 pixels of a lane, in 512-bit and in 256-bit instructions, into pairs of one channel; for
// k = 2 the pairs of the first block come first. -1: nothing.
constexpr Lane neighbour_order(int k, int channels) {
    if (k == 2 && channels == 3) return {0, 3, 1, 4, 2, 5, -1, -1, 6, 9, 7, 10, 8, 11, -1, -1};
    if (k == 2) return {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    if (channels == 3) return {0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1};
    return {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
}

// The plan must have windows.
void across_avx512(const AcrossJob& job);
void down_avx512(const DownJob& job);
void reduce_avx512(const std::uint8_t* row, std::ptrdiff_t stride, int channels, int k, std::int64_t columns,
                   std::uint8_t* out);

}  // namespace edgedistill::detail

#endif
