#include "preparer.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <edgedistill/error.hpp>
#include <limits>
#include <new>
#include <string>

#include "bmp.hpp"
#include "buffer.hpp"
#include "color.hpp"
#include "image_header.hpp"
#include "jpeg.hpp"
#include "kernels.hpp"
#include "png.hpp"
#include "resize.hpp"
#include "webp.hpp"

namespace edgedistill::detail {
namespace {

// OpenCV, which decodes everything but JPEG in Python, goes no further.
constexpr std::int64_t max_side = std::int64_t{1} << 20;
constexpr std::int64_t max_area = std::int64_t{1} << 30;
// Rows of a camera frame that are turned into BGR at once.
constexpr int yuv_rows = 8;

[[noreturn]] void throw_image(std::string_view name, const std::string& what) {
    throw Error(ErrorKind::image, std::string(name) + ": " + what);
}

class File {
public:
    // A pipe without a writer would be waited for.
    explicit File(const std::filesystem::path& path)
        : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)) {}
    ~File() {
        if (descriptor_ >= 0) ::close(descriptor_);
    }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    int descriptor() const noexcept { return descriptor_; }

private:
    int descriptor_;
};

// No file of an image of `max_pixels` is as large: more than 16 bits in 4 channels, and 64 MiB besides.
bool too_large(std::uint64_t size, long long max_pixels) {
    return size / 16 > static_cast<std::uint64_t>(std::max(max_pixels, 0LL)) + (std::uint64_t{4} << 20);
}

Bytes read_all(int descriptor, std::size_t size, std::string_view name, Buffer& memory) {
    std::size_t got = 0;
    // One byte more than the file has, so that its end is seen without a second buffer.
    std::uint8_t* to = memory.take(size + 1);
    for (;;) {
        const ssize_t count = ::read(descriptor, to + got, memory.size() - got);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw_image(name, std::string("cannot be read (") + std::strerror(errno) + ")");
        if (count == 0) return {to, got};
        got += static_cast<std::size_t>(count);
        if (got == memory.size()) to = memory.grow(2 * got, got);
    }
}

Bytes read_file(const std::filesystem::path& path, std::string_view name, long long max_pixels, Buffer& memory) {
    if (path.native().find('\0') != std::string::npos) {
        // what() ends at the first of them.
        throw_image(name.substr(0, name.find('\0')), "...: cannot be read (embedded null byte)");
    }
    const File file(path);
    struct stat status {};
    if (file.descriptor() < 0 || ::fstat(file.descriptor(), &status) != 0) {
        // Sockets and devices without a driver cannot even be opened.
        if (errno == ENXIO || errno == ENODEV) throw_image(name, "not a file; name an image file");
        throw_image(name, std::string("cannot be read (") + std::strerror(errno) + ")");
    }
    if (!S_ISREG(status.st_mode)) throw_image(name, "not a file; name an image file");
    const auto size = static_cast<std::uint64_t>(status.st_size);
    if (too_large(size, max_pixels)) {
        throw_image(name, std::to_string(size) + " bytes, more than an image of " + std::to_string(max_pixels) +
                              " pixels has; make it smaller or raise the limit");
    }
    return read_all(file.descriptor(), static_cast<std::size_t>(size), name, memory);
}

Layout layout_of(PixelFormat format) {
    switch (format) {
        case PixelFormat::bgr:
            return Layout::bgr;
        case PixelFormat::rgb:
            return Layout::rgb;
        case PixelFormat::gray:
            return Layout::gray;
        case PixelFormat::rgba:
            return Layout::rgbx;
        default:
            return Layout::bgrx;
    }
}

bool is_yuv(PixelFormat format) {
    return format == PixelFormat::nv12 || format == PixelFormat::i420;
}

// From one row to the next; throws where the view makes no sense.
std::size_t checked_row_bytes(const ImageView& view, std::string_view name) {
    const bool known = view.format >= PixelFormat::bgr && view.format <= PixelFormat::i420;
    const bool yuv = is_yuv(view.format);
    const std::int64_t least = std::int64_t{view.width} * (yuv ? 1 : channels(layout_of(view.format)));
    const std::size_t row_bytes =
        view.row_bytes != 0 ? view.row_bytes : static_cast<std::size_t>(std::max<std::int64_t>(least, 0));
    const bool even =
        view.height % 2 == 0 && view.width % 2 == 0 && (view.format == PixelFormat::nv12 || row_bytes % 2 == 0);
    const bool fits = least <= std::numeric_limits<std::int32_t>::max() / 8 &&
                      row_bytes <= std::numeric_limits<std::ptrdiff_t>::max() / 2 /
                                       static_cast<std::size_t>(std::max(view.height, 1));
    if (view.data == nullptr || !known || view.height < 1 || view.width < 1 || !fits ||
        row_bytes < static_cast<std::size_t>(least) || (yuv && !even)) {
        throw_image(name,
                    "image view of " + std::to_string(view.width) + "x" + std::to_string(view.height) +
                        " pixels, row_bytes " + std::to_string(view.row_bytes) +
                        "; expected data, at least 1x1 pixels (even sizes for NV12 and I420) and rows of at least " +
                        std::to_string(std::max<std::int64_t>(least, 1)) + " bytes");
    }
    return row_bytes;
}

// Sends rows to two sinks.
class Fork final : public RowSink {
public:
    Fork(RowSink& first, RowSink& second) : first_(first), second_(second) {}
    void restart() noexcept override {
        first_.restart();
        second_.restart();
    }
    void rows(const std::uint8_t* first, std::ptrdiff_t stride, int count) noexcept override {
        first_.rows(first, stride, count);
        second_.rows(first, stride, count);
    }

private:
    RowSink& first_;
    RowSink& second_;
};

}  // namespace

struct Preparer::Impl {
    long long max_pixels;
    JpegDecoder jpeg;
    PngDecoder png;
    Resizer resizer;
    Resizer second_resizer;
    Collector collector;
    Buffer file;
    Buffer pixels;
    Buffer scratch;

    explicit Impl(long long limit) : max_pixels(limit) {}

    bool load(Bytes encoded, std::string_view name, const InputSpec& spec, Decode decode, std::uint8_t* out,
              const Second* second);
    void prepare(const ImageView& view, std::string_view name, const InputSpec& spec, std::uint8_t* out);
    void trim() noexcept {
        file.trim();
        pixels.trim();
        scratch.trim();
    }

private:
    void decode_rows(Bytes encoded, const ImageHeader& header, std::string_view name, int scale, RowSink& sink);
    Picture decode_whole(Bytes encoded, const ImageHeader& header, std::string_view name, int scale);
    void send_yuv(const ImageView& view, std::size_t row_bytes);
};

bool Preparer::Impl::load(Bytes encoded, std::string_view name, const InputSpec& spec, Decode decode, std::uint8_t* out,
                          const Second* second) {
    if (encoded.size == 0) throw_image(name, "the file is empty; delete it or copy it again");
    const ImageHeader header = read_header(encoded, name, max_pixels);
    const bool is_jpeg = header.kind == ImageKind::jpeg;
    if (!is_jpeg && (std::max(header.height, header.width) > max_side || header.height * header.width > max_area)) {
        throw_image(name, std::to_string(header.width) + "x" + std::to_string(header.height) +
                              " pixels, the limit is 1048576 in each direction; make it smaller");
    }
    const Size whole{header.upright_height(), header.upright_width()};
    const int k = reduction(whole, spec);
    const int second_k = second != nullptr ? reduction(whole, *second->spec) : k;
    const bool in_dct = is_jpeg && decode == Decode::reduced;
    const bool both = second != nullptr && (!in_dct || second_k == k);
    const int scale = in_dct ? k : 1;
    const Size upright{(whole.height + scale - 1) / scale, (whole.width + scale - 1) / scale};
    Fork fork(resizer, second_resizer);
    RowSink& sink = both ? static_cast<RowSink&>(fork) : resizer;
    const auto begin = [&](Layout layout) {
        resizer.begin(upright, layout, k / scale, spec, out);
        if (both) second_resizer.begin(upright, layout, second_k / scale, *second->spec, second->out);
    };
    const bool in_rows = is_jpeg || header.kind == ImageKind::png;
    if (in_rows && header.orientation == 1) {
        begin(is_jpeg ? JpegDecoder::layout(header) : PngDecoder::layout(encoded));
        decode_rows(encoded, header, name, scale, sink);
    } else {
        const Picture picture = decode_whole(encoded, header, name, scale);
        begin(picture.layout);
        send_upright(picture, header.orientation, scratch, sink);
    }
    return both;
}

void Preparer::Impl::decode_rows(Bytes encoded, const ImageHeader& header, std::string_view name, int scale,
                                 RowSink& sink) {
    if (header.kind == ImageKind::jpeg) {
        jpeg.decode(encoded, header, name, scale, sink);
    } else {
        png.decode(encoded, header, name, sink);
    }
}

Picture Preparer::Impl::decode_whole(Bytes encoded, const ImageHeader& header, std::string_view name, int scale) {
    if (header.kind == ImageKind::webp) return decode_webp(encoded, header, name, pixels);
    if (header.kind == ImageKind::bmp) return decode_bmp(encoded, header, name, pixels);
    Picture picture{nullptr, {(header.height + scale - 1) / scale, (header.width + scale - 1) / scale}, Layout::bgr};
    picture.layout = header.kind == ImageKind::jpeg ? JpegDecoder::layout(header) : PngDecoder::layout(encoded);
    picture.pixels =
        pixels.take(static_cast<std::size_t>(picture.row_bytes()) * static_cast<std::size_t>(picture.size.height));
    collector.begin(picture);
    decode_rows(encoded, header, name, scale, collector);
    return picture;
}

void Preparer::Impl::prepare(const ImageView& view, std::string_view name, const InputSpec& spec, std::uint8_t* out) {
    const std::size_t row_bytes = checked_row_bytes(view, name);
    const Size size{view.height, view.width};
    resizer.begin(size, layout_of(view.format), reduction(size, spec), spec, out);
    if (is_yuv(view.format)) {
        send_yuv(view, row_bytes);
    } else {
        resizer.rows(view.data, static_cast<std::ptrdiff_t>(row_bytes), view.height);
    }
}

void Preparer::Impl::send_yuv(const ImageView& view, std::size_t row_bytes) {
    const bool planar = view.format == PixelFormat::i420;
    const std::size_t chroma_bytes = planar ? row_bytes / 2 : row_bytes;
    const std::uint8_t* u = view.data + row_bytes * static_cast<std::size_t>(view.height);
    const std::uint8_t* v = planar ? u + chroma_bytes * static_cast<std::size_t>(view.height / 2) : u + 1;
    const std::ptrdiff_t stride = 4 * static_cast<std::ptrdiff_t>(view.width);
    std::uint8_t* memory = scratch.take(static_cast<std::size_t>(stride) * yuv_rows);
    for (int top = 0; top < view.height; top += yuv_rows) {
        const int count = std::min(yuv_rows, view.height - top);
        for (int row = 0; row < count; ++row) {
            const auto y = static_cast<std::size_t>(top + row);
            kernels().yuv(view.data + y * row_bytes, u + y / 2 * chroma_bytes, v + y / 2 * chroma_bytes, planar ? 1 : 2,
                          view.width, memory + row * stride);
        }
        resizer.rows(memory, stride, count);
    }
}

Preparer::Preparer(long long max_pixels) : impl_(std::make_unique<Impl>(max_pixels)) {}
Preparer::~Preparer() = default;
Preparer::Preparer(Preparer&&) noexcept = default;
Preparer& Preparer::operator=(Preparer&&) noexcept = default;

namespace {

// Memory that an image asks for and nobody has is an error of that image.
template <typename Impl, typename Body>
void with_memory(Impl& impl, std::string_view name, const Body& body) {
    const Trimmed trimmed(impl);
    try {
        body();
    } catch (const std::bad_alloc&) {
        throw_image(name, "there is not enough memory for it; make it smaller");
    }
}

}  // namespace

bool Preparer::load(Bytes encoded, std::string_view name, const InputSpec& spec, Decode decode, std::uint8_t* out,
                    const Second* second) {
    bool both = false;
    with_memory(*impl_, name, [&] { both = impl_->load(encoded, name, spec, decode, out, second); });
    return both;
}

bool Preparer::load_file(const std::filesystem::path& path, std::string_view name, const InputSpec& spec, Decode decode,
                         std::uint8_t* out, const Second* second) {
    bool both = false;
    with_memory(*impl_, name, [&] {
        const Bytes encoded = read_file(path, name, impl_->max_pixels, impl_->file);
        both = impl_->load(encoded, name, spec, decode, out, second);
    });
    return both;
}

void Preparer::prepare(const ImageView& pixels, std::string_view name, const InputSpec& spec, std::uint8_t* out) {
    with_memory(*impl_, name, [&] { impl_->prepare(pixels, name, spec, out); });
}

}  // namespace edgedistill::detail
