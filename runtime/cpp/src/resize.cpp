#include "resize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.hpp"

namespace edgedistill::detail {
namespace {

constexpr int weight_one = 2048;

// Rounded twice, as OpenCV and Python do, where the compiler would fuse multiplication and addition (aarch64).
double times(double a, double b) {
    volatile double product = a * b;
    return product;
}

std::int64_t kept(std::int64_t size, double fraction) {
    return std::max<std::int64_t>(
        1, static_cast<std::int64_t>(std::floor(times(static_cast<double>(size), fraction) + 0.5)));
}

std::int64_t blocks(std::int64_t size, int k) {
    return (size + k - 1) / k;
}

std::uint32_t weight(float share) {
    volatile float scaled = share * static_cast<float>(weight_one);
    return static_cast<std::uint32_t>(std::lrintf(scaled));
}

template <typename T>
void at_least(std::vector<T>& memory, std::size_t size) {
    if (memory.size() < size) memory.resize(size);
}

// Blue, green and red of a row, densely.
void copy_pixels(const std::uint8_t* row, Layout layout, int count, std::uint8_t* out) {
    const int step = channels(layout);
    if (layout == Layout::bgr) {
        std::memcpy(out, row, static_cast<std::size_t>(count) * 3);
        return;
    }
    const auto [blue, green, red] = places(layout);
    for (int x = 0; x < count; ++x, row += step, out += 3) {
        out[0] = row[blue];
        out[1] = row[green];
        out[2] = row[red];
    }
}

}  // namespace

Size crop_size(Size image, const InputSpec& spec) {
    Size crop = image;
    if (spec.center_crop) {
        if (image.width * spec.height >= image.height * spec.width) {
            crop.width = std::max<std::int64_t>(1, (2 * image.height * spec.width + spec.height) / (2 * spec.height));
        } else {
            crop.height = std::max<std::int64_t>(1, (2 * image.width * spec.height + spec.width) / (2 * spec.width));
        }
    }
    if (spec.crop_fraction < 1.0) crop = {kept(crop.height, spec.crop_fraction), kept(crop.width, spec.crop_fraction)};
    return {std::min(crop.height, image.height), std::min(crop.width, image.width)};
}

int reduction(Size image, const InputSpec& spec) {
    const Size crop = crop_size(image, spec);
    for (const int k : {8, 4, 2}) {
        if (blocks(crop.height, k) >= spec.height && blocks(crop.width, k) >= spec.width) return k;
    }
    return 1;
}

void AreaReducer::begin(Layout layout, std::int64_t width, int k, std::int64_t left, std::int64_t columns) {
    channels_ = channels(layout);
    out_layout_ = layout == Layout::gray                            ? Layout::gray
                  : layout == Layout::rgb || layout == Layout::rgbx ? Layout::rgbx
                                                                    : Layout::bgrx;
    k_ = k;
    filled_ = 0;
    columns_ = columns;
    first_byte_ = static_cast<std::size_t>(left * k * channels_);
    whole_bytes_ = static_cast<std::size_t>(std::min(width - left * k, columns * k) * channels_);
    // The kernels read and write a little more than they need.
    at_least(sums_, static_cast<std::size_t>(columns * k * channels_) + 32);
    at_least(averages_, static_cast<std::size_t>(columns * channels(out_layout_)) + 32);
}

int AreaReducer::add(const std::uint8_t* row, std::ptrdiff_t stride, int count) noexcept {
    if (filled_ == k_) filled_ = 0;
    const int taken = std::min(count, k_ - filled_);
    kernels().sum_rows(row + first_byte_, stride, taken, whole_bytes_, filled_ > 0, sums_.data());
    filled_ += taken;
    last_row_ = row + (taken - 1) * stride + first_byte_;
    return taken;
}

bool AreaReducer::wholes() const noexcept {
    const std::int64_t asked = columns_ * k_ * channels_;
    return channels_ > 1 && (filled_ == 0 || filled_ == k_) && static_cast<std::int64_t>(whole_bytes_) == asked;
}

const std::uint8_t* AreaReducer::block(const std::uint8_t* rows, std::ptrdiff_t stride) noexcept {
    kernels().reduce(rows + first_byte_, stride, channels_, k_, columns_, averages_.data());
    return averages_.data();
}

void AreaReducer::repeat_last() noexcept {
    for (; filled_ < k_; ++filled_) kernels().sum_rows(last_row_, 0, 1, whole_bytes_, true, sums_.data());
}

int AreaReducer::skip(int count) noexcept {
    if (filled_ == k_) filled_ = 0;
    const int taken = std::min(count, k_ - filled_);
    filled_ += taken;
    return taken;
}

const std::uint8_t* AreaReducer::average() noexcept {
    close_columns();
    kernels().average(sums_.data(), channels_, k_, columns_, averages_.data());
    return averages_.data();
}

// Repeats the last pixel until the last block is whole.
void AreaReducer::close_columns() noexcept {
    const auto pixel = static_cast<std::size_t>(channels_);
    const std::size_t all = static_cast<std::size_t>(columns_) * static_cast<std::size_t>(k_) * pixel;
    for (std::size_t at = whole_bytes_; at < all; ++at) sums_[at] = sums_[at - pixel];
}

void LinearTable::make(std::int64_t source_size, int result_size, bool across) {
    if (source == source_size && result == result_size) return;
    source = 0;
    first.resize(static_cast<std::size_t>(result_size));
    weights.resize(static_cast<std::size_t>(result_size));
    const double scale = 1.0 / (static_cast<double>(result_size) / static_cast<double>(source_size));
    for (int at = 0; at < result_size; ++at) {
        const auto place = static_cast<float>(times(at + 0.5, scale) - 0.5);
        auto left = static_cast<std::int64_t>(std::floor(place));
        float share = place - static_cast<float>(left);
        if (across && (left < 0 || left >= source_size - 1)) {
            left = left < 0 ? 0 : source_size - 1;
            share = 0.0F;
        }
        first[static_cast<std::size_t>(at)] = static_cast<std::int32_t>(left);
        weights[static_cast<std::size_t>(at)] = weight(1.0F - share) | weight(share) << 16;
    }
    source = source_size;
    result = result_size;
}

void AcrossPlan::make(const LinearTable& table, Layout pixels, std::int64_t row_bytes) {
    if (source_ == table.source && count == table.result && layout == pixels && row_bytes_ == row_bytes) return;
    source_ = 0;
    layout = pixels;
    count = table.result;
    row_bytes_ = row_bytes;
    weights.assign(table.weights.begin(), table.weights.end());
    offsets.resize(weights.size());
    fast = 0;
    for (std::size_t x = 0; x < offsets.size(); ++x) {
        offsets[x] = table.first[x] * channels(layout);
        if (offsets[x] + std::int64_t{8} <= row_bytes) fast = static_cast<int>(x) + 1;
    }
    windows.resize((offsets.size() + 7) / 8 * 2);
    starts.resize(windows.size());
    if (!make_windows()) windows.clear();
    source_ = table.source;
}

bool AcrossPlan::make_windows() {
    if (row_bytes_ < window_bytes) return false;
    for (std::size_t number = 0; number < windows.size(); ++number) {
        if (!make_window(number)) return false;
    }
    return true;
}

bool AcrossPlan::make_window(std::size_t number) {
    Window& window = windows[number];
    window.words.fill(0);
    window.bytes.fill(128);
    window.weights.fill(0);
    const std::size_t first = 4 * number;
    const std::size_t end = std::min(first + 4, offsets.size());
    const std::int64_t last_start = row_bytes_ - window_bytes;
    starts[number] = first < end ? static_cast<std::int32_t>(std::min<std::int64_t>(offsets[first], last_start)) : 0;
    const std::array<int, 3> place = places(layout);
    for (std::size_t x = first; x < end; ++x) {
        const int at = offsets[x] - starts[number];
        // There is nothing to the right of the last pixel, and then its weight is 0.
        const int next = weights[x] >> 16 != 0 ? channels(layout) : 0;
        if (at + next + channels(layout) > window_bytes) return false;
        for (std::size_t n = 0; n < 4; ++n) {
            window.words[4 * (x - first) + n] =
                std::min(static_cast<std::uint32_t>(at) / 4 + static_cast<std::uint32_t>(n), 15U);
            window.weights[4 * (x - first) + n] = weights[x];
        }
        for (std::size_t c = 0; c < 3; ++c) {
            std::uint8_t* pair = window.bytes.data() + 16 * (x - first) + 4 * c;
            pair[0] = static_cast<std::uint8_t>(at % 4 + place[c]);
            pair[2] = static_cast<std::uint8_t>(at % 4 + place[c] + next);
        }
    }
    return true;
}

Resizer::Resizer() : kernels_(kernels()) {}

void Resizer::begin(Size image, Layout layout, int k, const InputSpec& spec, std::uint8_t* out) {
    image_ = image;
    k_ = k;
    reduced_ = {blocks(image.height, k), blocks(image.width, k)};
    crop_ = crop_size(reduced_, spec);
    top_ = (reduced_.height - crop_.height) / 2;
    const std::int64_t left = (reduced_.width - crop_.width) / 2;
    out_ = out;
    out_height_ = spec.height;
    out_width_ = spec.width;
    layout_ = layout;
    if (k > 1) {
        reducer_.begin(layout, image.width, k, left, crop_.width);
        layout_ = reducer_.layout();
    }
    left_bytes_ = k > 1 ? 0 : static_cast<std::size_t>(left * channels(layout_));
    step_ = Step::bilinear;
    if (crop_.height == spec.height && crop_.width == spec.width) {
        step_ = Step::copy;
    } else if (crop_.height == 2 * spec.height && crop_.width == 2 * spec.width) {
        step_ = Step::halve;
        halver_.begin(layout_, crop_.width, 2, 0, spec.width);
    } else {
        down_.make(crop_.height, spec.height, false);
        plan_across(layout_, k > 1 ? crop_.width : reduced_.width - left);
    }
    restart();
}

void Resizer::restart() noexcept {
    seen_ = seen_reduced_ = 0;
    next_ = 0;
    reducer_.restart();
    halver_.restart();
}

// `row_pixels`: from the crop's left edge to the end of the row.
void Resizer::plan_across(Layout layout, std::int64_t row_pixels) {
    across_.make(crop_.width, out_width_, true);
    plan_.make(across_, layout, row_pixels * channels(layout));
    for (std::vector<std::int16_t>& line : lines_) at_least(line, line_values(out_width_));
}

void Resizer::rows(const std::uint8_t* first, std::ptrdiff_t stride, int count) noexcept {
    count = static_cast<int>(std::min<std::int64_t>(count, image_.height - seen_));
    seen_ += count;
    if (k_ > 1) return reduce(first, stride, count);
    for (; count > 0; --count, first += stride) reduced_row(first + left_bytes_);
}

void Resizer::reduce(const std::uint8_t* first, std::ptrdiff_t stride, int count) noexcept {
    while (count > 0) {
        const bool wanted = seen_reduced_ >= top_ && seen_reduced_ < top_ + crop_.height;
        if (wanted && count >= k_ && reducer_.wholes()) {
            reduced_row(reducer_.block(first, stride));
            first += k_ * stride;
            count -= k_;
            continue;
        }
        const int taken = wanted ? reducer_.add(first, stride, count) : reducer_.skip(count);
        first += taken * stride;
        count -= taken;
        if (count == 0 && seen_ == image_.height && !reducer_.done()) {
            if (!wanted) return;
            reducer_.repeat_last();
        }
        if (!reducer_.done()) return;
        if (wanted) {
            reduced_row(reducer_.average());
        } else {
            ++seen_reduced_;
        }
    }
}

// `row`: from the crop's left edge.
void Resizer::reduced_row(const std::uint8_t* row) noexcept {
    const std::int64_t y = seen_reduced_++ - top_;
    if (y < 0 || y >= crop_.height) return;
    switch (step_) {
        case Step::copy:
            copy_pixels(row, layout_, out_width_, out_ + y * out_width_ * 3);
            break;
        case Step::halve:
            halve_row(row);
            break;
        case Step::bilinear:
            bilinear_row(y, row);
            break;
    }
}

void Resizer::halve_row(const std::uint8_t* row) noexcept {
    halver_.add(row, 0, 1);
    if (!halver_.done()) return;
    const std::ptrdiff_t at = std::ptrdiff_t{next_++} * out_width_ * 3;
    copy_pixels(halver_.average(), halver_.layout(), out_width_, out_ + at);
}

void Resizer::bilinear_row(std::int64_t y, const std::uint8_t* row) noexcept {
    const auto upper = [this] { return std::max<std::int64_t>(down_.first[static_cast<std::size_t>(next_)], 0); };
    const auto lower = [this] {
        return std::min<std::int64_t>(down_.first[static_cast<std::size_t>(next_)] + std::int64_t{1}, crop_.height - 1);
    };
    // Rows are asked for in ascending order: one that the next row of the result does not need, none needs.
    if (next_ == out_height_ || (y != std::min(upper(), crop_.height - 1) && y != lower())) return;
    const auto line = [this](std::int64_t number) { return lines_[static_cast<std::size_t>(number & 1)].data(); };
    kernels_.across({row, &plan_, line(y)});
    for (; next_ < out_height_ && lower() == y; ++next_) {
        const std::uint32_t weights = down_.weights[static_cast<std::size_t>(next_)];
        std::uint8_t* out = out_ + std::ptrdiff_t{next_} * out_width_ * 3;
        kernels_.down({line(std::min(upper(), crop_.height - 1)), line(lower()),
                       static_cast<std::int16_t>(weights & 0xFFFF), static_cast<std::int16_t>(weights >> 16), out,
                       out_width_});
    }
}

}  // namespace edgedistill::detail
