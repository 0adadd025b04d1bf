// The inner loops over pixels, in the widest instructions of this CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "resize.hpp"

namespace edgedistill::detail {

// Values of a row after the horizontal step: 4 a pixel, and room for what the kernels write beyond the last.
constexpr std::size_t line_values(int pixels) {
    return (static_cast<std::size_t>(pixels) + 7) / 8 * 32;
}

struct AcrossJob {
    const std::uint8_t* row;
    const AcrossPlan* plan;
    std::int16_t* out;  // line_values(): (left * w0 + right * w1) >> 4; the fourth of each pixel is nothing
};

struct FilteredRows;  // png_filter.hpp

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
    // May write 32 bytes past the averages.
    void (*reduce)(const std::uint8_t* row, std::ptrdiff_t stride, int channels, int k, std::int64_t columns,
                   std::uint8_t* out);
    // A row of NV12 or I420 to BGRX. `u_step`: bytes from one U (or V) to the next.
    void (*yuv)(const std::uint8_t* y, const std::uint8_t* u, const std::uint8_t* v, int u_step, int width,
                std::uint8_t* out);
    // The rows of a PNG, as png_filter.hpp says.
    void (*unfilter)(const FilteredRows& rows, std::uint8_t* band, std::ptrdiff_t stride);
};

// For this CPU.
const Kernels& kernels();
// All that this CPU can run, the widest first; the last is the portable one, with which the others are compared.
std::vector<const Kernels*> runnable_kernels();

}  // namespace edgedistill::detail
