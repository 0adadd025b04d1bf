// The vector loops, the resize and the frames give the pixels that their definitions say. That those are Python's:
// tests/cpp/test_pixels_are_pythons.py.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <edgedistill/error.hpp>
#include <limits>
#include <random>
#include <vector>

#include "kernels.hpp"
#include "preparer.hpp"
#include "resize.hpp"

namespace {

using namespace edgedistill;
using namespace edgedistill::detail;

std::vector<std::uint8_t> noise(std::size_t size, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<std::uint8_t> bytes(size);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
    return bytes;
}

constexpr std::array<Layout, 5> layouts{Layout::gray, Layout::bgr, Layout::rgb, Layout::bgrx, Layout::rgbx};

InputSpec spec_of(int height, int width) {
    InputSpec spec;
    spec.height = height;
    spec.width = width;
    return spec;
}

std::vector<std::uint8_t> resized(const std::vector<std::uint8_t>& pixels, Size size, Layout layout, int k,
                                  const InputSpec& spec, int batch) {
    std::vector<std::uint8_t> out(static_cast<std::size_t>(spec.height * spec.width * 3));
    Resizer resizer;
    resizer.begin(size, layout, k, spec, out.data());
    const std::ptrdiff_t stride = size.width * channels(layout);
    for (std::int64_t y = 0; y < size.height; y += batch) {
        resizer.rows(pixels.data() + y * stride, stride,
                     static_cast<int>(std::min<std::int64_t>(batch, size.height - y)));
    }
    return out;
}

}  // namespace

TEST_CASE("the vector loops across are equal to the portable one") {
    const std::vector<const Kernels*> all = runnable_kernels();
    int windowed = 0;
    for (const Layout layout : layouts) {
        // To 31: narrower than a window; 640 to 7: pixels too far apart for one.
        for (const int width : {1, 2, 3, 5, 8, 9, 16, 22, 31, 64, 97, 333, 480, 640}) {
            for (const int result : {1, 4, 7, 8, 32, 224, 225}) {
                // Exactly as large as the row: nothing may be read beyond it.
                const std::vector<std::uint8_t> row = noise(static_cast<std::size_t>(width * channels(layout)), 1);
                LinearTable table;
                table.make(width, result, true);
                AcrossPlan plan;
                plan.make(table, layout, static_cast<std::int64_t>(row.size()));
                windowed += plan.windows.empty() ? 0 : 1;
                std::vector<std::int16_t> expected(line_values(result), 1);
                all.back()->across({row.data(), &plan, expected.data()});
                for (const Kernels* one : all) {
                    std::vector<std::int16_t> ours(line_values(result), 1);
                    one->across({row.data(), &plan, ours.data()});
                    for (std::size_t at = 0; at < static_cast<std::size_t>(4 * result); ++at) {
                        if (at % 4 != 3) REQUIRE(ours[at] == expected[at]);
                    }
                }
            }
        }
    }
    CHECK(windowed > 100);
}

TEST_CASE("a plan across is made anew where the row, its layout or the result is another") {
    AcrossPlan plan;
    LinearTable table;
    const auto offset = [&](int width, int result, Layout layout) {
        table.make(width, result, true);
        plan.make(table, layout, std::int64_t{width} * channels(layout));
        return plan.offsets.back();
    };
    CHECK(offset(100, 50, Layout::bgr) == 3 * 98);
    CHECK(offset(100, 50, Layout::bgrx) == 4 * 98);
    CHECK(offset(100, 50, Layout::bgr) == 3 * 98);
    CHECK(offset(60, 50, Layout::bgr) == 3 * 58);
    CHECK(offset(60, 25, Layout::bgr) == 3 * 58);
    CHECK(plan.count == 25);
    CHECK(plan.offsets.size() == 25);
}

TEST_CASE("the vector loops down are equal to the portable one") {
    std::mt19937 random(2);
    for (const int count : {1, 7, 8, 9, 10, 15, 16, 17, 18, 31, 224, 1001}) {
        // Exactly as large as what is read and written.
        std::vector<std::int16_t> upper(static_cast<std::size_t>(4 * count));
        std::vector<std::int16_t> lower = upper;
        for (std::int16_t& value : upper) value = static_cast<std::int16_t>(random() % 32641);
        for (std::int16_t& value : lower) value = static_cast<std::int16_t>(random() % 32641);
        for (const int weight : {0, 1, 1023, 1024, 2047, 2048}) {
            std::vector<std::uint8_t> expected(static_cast<std::size_t>(3 * count));
            DownJob job{upper.data(),
                        lower.data(),
                        static_cast<std::int16_t>(weight),
                        static_cast<std::int16_t>(2048 - weight),
                        expected.data(),
                        count};
            runnable_kernels().back()->down(job);
            for (const Kernels* one : runnable_kernels()) {
                std::vector<std::uint8_t> ours(expected.size());
                job.out = ours.data();
                one->down(job);
                REQUIRE(ours == expected);
            }
        }
    }
}

namespace {

// Blocks of k rows in memory that ends with the last of them.
struct Blocks {
    int channel_count;
    int k;
    int columns;
    std::ptrdiff_t stride;
    std::vector<std::uint8_t> rows;

    Blocks(int channel_count_, int k_, int columns_, int gap)
        : channel_count(channel_count_),
          k(k_),
          columns(columns_),
          stride(columns_ * k_ * channel_count_ + gap),
          rows(noise(static_cast<std::size_t>(stride * (k_ - 1) + columns_ * k_ * channel_count_), 3)) {}

    std::size_t bytes() const { return static_cast<std::size_t>(columns * k * channel_count); }

    // What sum_rows and average say.
    std::vector<std::uint8_t> summed(const Kernels& one) const {
        std::vector<std::uint16_t> sums(bytes() + 32);
        one.sum_rows(rows.data(), stride, k, bytes(), false, sums.data());
        std::vector<std::uint8_t> averages(static_cast<std::size_t>(4 * columns) + 32);
        one.average(sums.data(), channel_count, k, columns, averages.data());
        return colours(averages);
    }

    std::vector<std::uint8_t> reduced(const Kernels& one) const {
        std::vector<std::uint8_t> averages(static_cast<std::size_t>(4 * columns) + 32);
        one.reduce(rows.data(), stride, channel_count, k, columns, averages.data());
        return colours(averages);
    }

private:
    // Without what is nothing.
    std::vector<std::uint8_t> colours(std::vector<std::uint8_t> averages) const {
        const std::size_t step = channel_count == 1 ? 1 : 4;
        averages.resize(static_cast<std::size_t>(columns) * step);
        for (std::size_t at = 3; step == 4 && at < averages.size(); at += 4) averages[at] = 0;
        return averages;
    }
};

}  // namespace

TEST_CASE("the vector loops that average are equal to the portable ones") {
    const std::vector<const Kernels*> all = runnable_kernels();
    for (const int k : {2, 4, 8}) {
        for (const int channel_count : {1, 3, 4}) {
            for (const int columns : {1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 101}) {
                for (const int gap : {0, 5}) {
                    const Blocks blocks(channel_count, k, columns, gap);
                    const std::vector<std::uint8_t> expected = blocks.summed(*all.back());
                    for (const Kernels* one : all) {
                        REQUIRE(blocks.summed(*one) == expected);
                        if (channel_count > 1) REQUIRE(blocks.reduced(*one) == expected);
                    }
                }
            }
        }
    }
}

TEST_CASE("the vector loops that sum are equal to the portable ones") {
    const std::vector<const Kernels*> all = runnable_kernels();
    for (const std::size_t bytes : {1U, 31U, 96U, 333U}) {
        const std::vector<std::uint8_t> rows = noise(bytes * 8, 3);
        for (const int count : {1, 2, 3, 4, 8}) {
            for (const bool add : {false, true}) {
                std::vector<std::uint16_t> expected(bytes, 7);
                all.back()->sum_rows(rows.data(), static_cast<std::ptrdiff_t>(bytes), count, bytes, add,
                                     expected.data());
                for (const Kernels* one : all) {
                    std::vector<std::uint16_t> ours(bytes, 7);
                    one->sum_rows(rows.data(), static_cast<std::ptrdiff_t>(bytes), count, bytes, add, ours.data());
                    REQUIRE(ours == expected);
                }
            }
        }
    }
}

TEST_CASE("the vector loops for camera frames are equal to the portable one") {
    for (const int width : {2, 14, 16, 18, 640}) {
        const auto count = static_cast<std::size_t>(width);
        for (unsigned seed = 0; seed < 50; ++seed) {
            const std::vector<std::uint8_t> y = noise(count, seed);
            const std::vector<std::uint8_t> uv = noise(count, seed + 1000);
            for (const int step : {1, 2}) {
                const std::uint8_t* v = uv.data() + (step == 2 ? 1 : width / 2);
                std::vector<std::uint8_t> ours(4 * count);
                std::vector<std::uint8_t> expected(4 * count);
                kernels().yuv(y.data(), uv.data(), v, step, width, ours.data());
                runnable_kernels().back()->yuv(y.data(), uv.data(), v, step, width, expected.data());
                REQUIRE(ours == expected);
            }
        }
    }
}

TEST_CASE("rows give the same pixels however many come at once") {
    const Size size{101, 77};
    for (const Layout layout : layouts) {
        const std::vector<std::uint8_t> pixels =
            noise(static_cast<std::size_t>(size.height * size.width * channels(layout)), 4);
        for (const int k : {1, 2, 4, 8}) {
            const InputSpec spec = spec_of(12, 9);
            const std::vector<std::uint8_t> expected = resized(pixels, size, layout, k, spec, 101);
            for (const int batch : {1, 3, 7, 8, 16}) REQUIRE(resized(pixels, size, layout, k, spec, batch) == expected);
        }
    }
}

TEST_CASE("a picture of one colour stays that colour at every size") {
    for (const int side : {1, 2, 7, 16, 61, 128}) {
        const std::vector<std::uint8_t> pixels(static_cast<std::size_t>(side * side * 3), 201);
        for (const int result : {8, 16, 31, 64}) {
            const InputSpec spec = spec_of(result, result + 1);
            const int k = reduction({side, side}, spec);
            const std::vector<std::uint8_t> out = resized(pixels, {side, side}, Layout::bgr, k, spec, 4);
            // 201 / 2048 weights are exact but for the two roundings down.
            CHECK(*std::min_element(out.begin(), out.end()) >= 200);
            CHECK(*std::max_element(out.begin(), out.end()) <= 201);
        }
    }
}

TEST_CASE("crops and reductions are Python's integers") {
    InputSpec spec = spec_of(224, 224);
    CHECK(reduction({427, 640}, spec) == 1);
    CHECK(reduction({1281, 1920}, spec) == 4);
    CHECK(reduction({447, 447}, spec) == 2);
    CHECK(reduction({446, 447}, spec) == 1);
    spec.center_crop = true;
    CHECK(crop_size({427, 640}, spec).width == 427);
    CHECK(crop_size({640, 427}, spec).height == 427);
    spec.crop_fraction = 0.875;
    CHECK(crop_size({427, 640}, spec).height == 374);
    CHECK(crop_size({1, 1}, spec).height == 1);
    // As large as a header can say: nothing overflows.
    const std::int64_t huge = std::int64_t{1} << 31;
    CHECK(crop_size({huge, 1}, spec).height == 1);
    CHECK(reduction({huge, huge}, spec) == 8);
}

TEST_CASE("views that make no sense are refused before they are read") {
    Preparer preparer(1'000'000);
    const InputSpec spec = spec_of(8, 8);
    std::vector<std::uint8_t> pixels(64 * 64 * 4);
    std::vector<std::uint8_t> out(8 * 8 * 3);
    const auto refused = [&](ImageView view) {
        try {
            preparer.prepare(view, "camera 3", spec, out.data());
        } catch (const Error& error) {
            return error.kind() == ErrorKind::image && std::string(error.what()).find("camera 3: ") == 0;
        }
        return false;
    };
    ImageView good;
    good.data = pixels.data();
    good.height = 4;
    good.width = 6;
    REQUIRE_FALSE(refused(good));
    for (const int size : {0, -1, std::numeric_limits<int>::min()}) {
        ImageView view = good;
        view.height = size;
        CHECK(refused(view));
        view = good;
        view.width = size;
        CHECK(refused(view));
    }
    ImageView view = good;
    view.data = nullptr;
    CHECK(refused(view));
    view = good;
    view.row_bytes = 17;
    CHECK(refused(view));
    view.row_bytes = std::numeric_limits<std::size_t>::max() / 2;
    CHECK(refused(view));
    view = good;
    view.width = std::numeric_limits<int>::max();
    CHECK(refused(view));
    view = good;
    view.format = static_cast<PixelFormat>(99);
    CHECK(refused(view));
    for (const PixelFormat format : {PixelFormat::nv12, PixelFormat::i420}) {
        view = good;
        view.format = format;
        CHECK_FALSE(refused(view));
        view.height = 5;
        CHECK(refused(view));
        view.height = 4;
        view.width = 5;
        CHECK(refused(view));
    }
}
