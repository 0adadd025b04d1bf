// Kernels in 512-bit instructions, as kernels.hpp says of each; for CPUs with AVX-512BW.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

namespace edgedistill::detail {

// The plan must have windows.
void across_avx512(const AcrossJob& job);
void down_avx512(const DownJob& job);
void reduce_avx512(const std::uint8_t* row, std::ptrdiff_t stride, int channels, int k, std::int64_t columns,
                   std::uint8_t* out);

}  // namespace edgedistill::detail

#endif
