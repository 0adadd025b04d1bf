// Rows of an upright image in, network pixels out, row by row: area reduction, crop and 8-bit bilinear resize.
//
// The arithmetic is OpenCV's to the bit: INTER_AREA by a whole k, INTER_LINEAR with 11-bit weights, and OpenCV's rule
// that shrinking by exactly 2 in both directions is averaging. Nothing of the image's size is stored.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <edgedistill/options.hpp>
#include <vector>

namespace edgedistill::detail {

// How the bytes of a pixel lie. x: a byte that is not looked at.
enum class Layout : std::uint8_t { gray, bgr, rgb, bgrx, rgbx };

constexpr int channels(Layout layout) {
    return layout == Layout::gray ? 1 : layout == Layout::bgr || layout == Layout::rgb ? 3 : 4;
}

// Where blue, green and red lie in a pixel.
constexpr std::array<int, 3> places(Layout layout) {
    switch (layout) {
        case Layout::gray:
            return {0, 0, 0};
        case Layout::rgb:
        case Layout::rgbx:
            return {2, 1, 0};
        default:
            return {0, 1, 2};
    }
}

struct Size {
    std::int64_t height = 0;
    std::int64_t width = 0;
};

// The centred crop of an image of that size.
Size crop_size(Size image, const InputSpec& spec);

// The largest k in {1, 2, 4, 8} with ceil(crop / k) no smaller than the network's input in both directions.
int reduction(Size image, const InputSpec& spec);

// Where rows go, from the top down. It must not throw: rows come out of C libraries.
class RowSink {
public:
    // Forgets the rows that came: the image comes once more from its first row.
    virtual void restart() noexcept = 0;
    // `count` rows, `stride` bytes apart.
    virtual void rows(const std::uint8_t* first, std::ptrdiff_t stride, int count) noexcept = 0;

protected:
    ~RowSink() = default;
};

// Averages k x k blocks; the last row and column are repeated where the size is no multiple of k.
class AreaReducer {
public:
    // Only the blocks in columns `left` to `left + columns - 1` are made. Allocates only for a larger image than
    // before.
    void begin(Layout layout, std::int64_t width, int k, std::int64_t left, std::int64_t columns);
    void restart() noexcept { filled_ = 0; }

    // Takes up to `count` rows and returns how many; after each call `done()` says whether it completed a row of
    // blocks.
    int add(const std::uint8_t* row, std::ptrdiff_t stride, int count) noexcept;
    // The averages of k rows that lie whole in memory, as add() and average() would make them. Not after a part of a
    // row of blocks, nor where wholes() is false.
    const std::uint8_t* block(const std::uint8_t* rows, std::ptrdiff_t stride) noexcept;
    bool wholes() const noexcept;
    // After the last row: repeats it until the row of blocks is whole.
    void repeat_last() noexcept;
    // Skips up to `count` rows without looking at them.
    int skip(int count) noexcept;

    bool done() const noexcept { return filled_ == k_; }
    Layout layout() const noexcept { return out_layout_; }
    // The averages: `columns` pixels of layout().
    const std::uint8_t* average() noexcept;

private:
    void close_columns() noexcept;

    Layout out_layout_ = Layout::bgrx;
    int channels_ = 3;
    int k_ = 2;
    int filled_ = 0;
    std::size_t first_byte_ = 0;              // of a source row
    std::size_t whole_bytes_ = 0;             // that the source has of the columns asked for
    const std::uint8_t* last_row_ = nullptr;  // of the last call of add
    std::int64_t columns_ = 0;
    std::vector<std::uint16_t> sums_;
    std::vector<std::uint8_t> averages_;
};

// Which two source positions and weights make each position of the result.
struct LinearTable {
    std::int64_t source = 0;
    int result = 0;
    std::vector<std::int32_t> first;     // may be -1 or source - 1 downwards; across always a pixel that is there
    std::vector<std::uint32_t> weights;  // of first in the low half, of first + 1 in the high half; sum 2048

    // Makes the table unless it is there already. `across`: OpenCV treats the edges of a row unlike those of a column.
    void make(std::int64_t source_size, int result_size, bool across);
};

// Where in a row of pixels the horizontal step finds its sources.
struct AcrossPlan {
    // How 4 neighbouring pixels of the result come out of `window_bytes` of the row.
    struct alignas(64) Window {
        std::array<std::uint32_t, 16> words;    // 4-byte words of the window, 4 for each pixel: its sources lie in them
        std::array<std::uint8_t, 64> bytes;     // of those 16 bytes: left and right of each channel; 128: nothing
        std::array<std::uint32_t, 16> weights;  // LinearTable::weights, 4 times each
    };
    static constexpr std::int64_t window_bytes = 64;

    Layout layout = Layout::bgr;
    int count = 0;                       // pixels of the result
    int fast = 0;                        // the first so many may read 8 bytes at their offset
    std::vector<std::int32_t> offsets;   // bytes to the left pixel
    std::vector<std::uint32_t> weights;  // LinearTable::weights
    std::vector<Window> windows;         // an even number; none where 4 pixels lie too far apart
    std::vector<std::int32_t> starts;    // of the windows: bytes from the row's first

    // Makes the plan unless it is there already. `row_bytes`: that may be read. Throws std::bad_alloc.
    void make(const LinearTable& table, Layout pixels, std::int64_t row_bytes);

private:
    bool make_windows();
    bool make_window(std::size_t number);

    std::int64_t source_ = 0;
    std::int64_t row_bytes_ = 0;
};

struct Kernels;

// The last step: crop (already cut by the caller across) and resize rows to the network's size.
class Resizer final : public RowSink {
public:
    Resizer();

    // Starts an image of that size whose rows have that layout; `k`: of the area reduction. `out`: uint8
    // [spec.height, spec.width, 3] BGR. Throws std::bad_alloc.
    void begin(Size image, Layout layout, int k, const InputSpec& spec, std::uint8_t* out);
    void restart() noexcept override;
    void rows(const std::uint8_t* first, std::ptrdiff_t stride, int count) noexcept override;

private:
    enum class Step { copy, halve, bilinear };

    void reduce(const std::uint8_t* first, std::ptrdiff_t stride, int count) noexcept;
    void reduced_row(const std::uint8_t* row) noexcept;
    void halve_row(const std::uint8_t* row) noexcept;
    void bilinear_row(std::int64_t y, const std::uint8_t* row) noexcept;
    void plan_across(Layout layout, std::int64_t row_pixels);

    const Kernels& kernels_;
    Size image_{};
    Size reduced_{};
    Size crop_{};
    std::int64_t top_ = 0;
    std::size_t left_bytes_ = 0;  // of a reduced row, where the reducer has not cut it already
    std::int64_t seen_ = 0;       // rows of the image
    std::int64_t seen_reduced_ = 0;
    int k_ = 1;
    Step step_ = Step::bilinear;
    Layout layout_ = Layout::bgr;  // of reduced rows
    AreaReducer reducer_;
    AreaReducer halver_;

    LinearTable across_;
    LinearTable down_;
    AcrossPlan plan_;
    std::array<std::vector<std::int16_t>, 2> lines_;  // rows after the horizontal step, 4 values a pixel, >> 4
    int next_ = 0;                                    // row of the result

    int out_height_ = 0;
    int out_width_ = 0;
    std::uint8_t* out_ = nullptr;
};

}  // namespace edgedistill::detail
