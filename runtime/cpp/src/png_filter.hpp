// PNG's filters undone on 8-bit samples, sixteen rows at once.
//
// A filtered byte is the difference to what its neighbours to the left and above foretell, so byte follows byte: the
// Paeth filter of a grey picture costs a reader that goes along the row twice the time of its decompression. Here lane
// r of a vector works on row r, one byte behind row r - 1: what it needs from above was made one step before.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgedistill::detail {

struct FilteredRows {
    static constexpr int most = 16;
    // Bytes that may be read behind the last row. Those before and behind each row of the band may be read and written.
    static constexpr int padding = 48;

    const std::uint8_t* data;  // `count` rows of a filter type (0 to 4) and `bytes` filtered bytes
    std::size_t bytes;
    int count;       // 1 to `most`
    int pixel_size;  // bytes of a pixel: 1, 3 or 4
};

// Kernels::unfilter. Writes the rows to `band`, `stride` bytes apart. At first its row `most` - 1 holds the row above
// them (zeros: none).
void unfilter_portable(const FilteredRows& rows, std::uint8_t* band, std::ptrdiff_t stride) noexcept;  // row by row
void unfilter_avx2(const FilteredRows& rows, std::uint8_t* band, std::ptrdiff_t stride) noexcept;

}  // namespace edgedistill::detail
