// The inner loops over pixels, in the widest instructions of this CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "resize.hpp"

namespace edgedistill::detail {

struct AcrossJob {
    const std::uint8_t* row;
    const std::int32_t* offsets;   // bytes to the left pixel
    const std::uint32_t* weights;  // LinearTable::weights
    std::int16_t* out;             // 4 values a pixel, (left * w0 + right * w1) >> 4; the fourth is nothing
    int count;                     // pixels of the result
    int fast;                      // the first so many may read 8 bytes at their offset
    Layout layout;
};

struct DownJob {
    const std::int16_t* upper;  // as AcrossJob::out
    const std::int16_t* lower;
    std::int16_t upper_weight;
    std::int16_t lower_weight;
    std::uint8_t* out;  // BGR
    int count;
};

// All bit-equal to each other, whichever CPU they are for.
struct Kernels {
    void (*across)(const AcrossJob&);
    void (*down)(const DownJob&);
    // sums[i] = (or +=) the sum of `count` (1 to 8) bytes at row[i], row[i + stride], ...
    void (*sum_rows)(const std::uint8_t* row, std::ptrdiff_t stride, int count, std::size_t bytes, bool add,
                     std::uint16_t* sums);
    // Sums of k rows -> averages of `columns` whole blocks, rounded as OpenCV does; 1 byte a pixel for 1 channel,
    // else 4. May read 16 bytes past the sums and write 16 past the averages.
    void (*average)(const std::uint16_t* sums, int channels, int k, std::int64_t columns, std::uint8_t* out);
    // k rows of `columns` whole blocks -> their averages, as sum_rows and average would make them, for 3 or 4 channels.
    // May write 16 bytes past the averages.
    void (*reduce)(const std::uint8_t* row, std::ptrdiff_t stride, int channels, int k, std::int64_t columns,
                   std::uint8_t* out);
    // A row of NV12 or I420 to BGRX. `u_step`: bytes from one U (or V) to the next.
    void (*yuv)(const std::uint8_t* y, const std::uint8_t* u, const std::uint8_t* v, int u_step, int width,
                std::uint8_t* out);
};

// For this CPU.
const Kernels& kernels();
// For any CPU: what the others are compared with.
const Kernels& portable_kernels();

}  // namespace edgedistill::detail
