#include "image_header.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <edgedistill/error.hpp>
#include <optional>

namespace edgedistill::detail {
namespace {

// A header that does not hold together; `read_header` adds the file's name.
struct BadHeader {
    std::string why;
};

constexpr const char* ends_early = "it ends inside its header";

// Bytes that are read only after their place was checked.
class Reader {
public:
    explicit Reader(Bytes data, bool big_endian = true) : data_(data), big_endian_(big_endian) {}

    std::size_t size() const noexcept { return data_.size; }
    bool has(std::uint64_t at, std::uint64_t count) const noexcept {
        return at <= data_.size && count <= data_.size - at;
    }
    bool matches(std::uint64_t at, std::string_view text) const noexcept {
        return has(at, text.size()) && std::memcmp(data_.data + at, text.data(), text.size()) == 0;
    }
    std::uint32_t u8(std::uint64_t at) const {
        need(at, 1);
        return data_.data[at];
    }
    std::uint32_t u16(std::uint64_t at) const {
        need(at, 2);
        const std::uint8_t* p = data_.data + at;
        return big_endian_ ? static_cast<std::uint32_t>(p[0] << 8 | p[1])
                           : static_cast<std::uint32_t>(p[1] << 8 | p[0]);
    }
    std::uint32_t u32(std::uint64_t at) const {
        need(at, 4);
        return big_endian_ ? u16(at) << 16 | u16(at + 2) : u16(at + 2) << 16 | u16(at);
    }
    // What there is of `count` bytes at `at`.
    Bytes part(std::uint64_t at, std::uint64_t count) const noexcept {
        if (at >= data_.size) return {};
        return {data_.data + at, static_cast<std::size_t>(std::min<std::uint64_t>(count, data_.size - at))};
    }

private:
    void need(std::uint64_t at, std::uint64_t count) const {
        if (!has(at, count)) throw BadHeader{ends_early};
    }

    Bytes data_;
    bool big_endian_;
};

std::string python_bytes(Bytes bytes) {
    std::string text = "b'";
    for (std::size_t at = 0; at < bytes.size; ++at) {
        const std::uint8_t byte = bytes.data[at];
        std::array<char, 5> code{};
        if (byte >= 32 && byte < 127) {
            text += static_cast<char>(byte);
        } else {
            std::snprintf(code.data(), code.size(), "\\x%02x", byte);
            text += code.data();
        }
    }
    return text + "'";
}

bool is_frame(std::uint32_t marker) {
    return marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC;
}

bool is_standalone(std::uint32_t marker) {
    return (marker >= 0xD0 && marker <= 0xD8) || marker == 0x01;
}

bool is_progressive(int marker) {
    return marker == 0xC2 || marker == 0xC6 || marker == 0xCA || marker == 0xCE;
}

bool too_many_scans(Bytes data) {
    int scans = 0;
    const std::uint8_t* at = data.data;
    const std::uint8_t* const end = data.data + data.size;
    while (end - at >= 2 && (at = static_cast<const std::uint8_t*>(
                                 std::memchr(at, 0xFF, static_cast<std::size_t>(end - at - 1)))) != nullptr) {
        if (at[1] == 0xDA && ++scans > max_jpeg_scans) return true;
        ++at;
    }
    return false;
}

void read_frame(Bytes body, std::uint32_t marker, ImageHeader& header) {
    const Reader reader(body);
    header.jpeg_components = static_cast<int>(reader.u8(5));
    header.jpeg_frame = static_cast<int>(marker);
    header.height = reader.u16(1);
    header.width = reader.u16(3);
    if (const std::uint32_t precision = reader.u8(0); precision != 8) {
        throw BadHeader{"a " + std::to_string(precision) + "-bit JPEG, only 8 bits are read"};
    }
    if (header.jpeg_components > 0) reader.u8(static_cast<std::uint64_t>(6 + 3 * (header.jpeg_components - 1) + 1));
}

ImageHeader read_jpeg(Bytes data) {
    const Reader reader(data);
    ImageHeader header;
    header.kind = ImageKind::jpeg;
    std::optional<int> orientation;
    std::optional<std::pair<std::uint32_t, Bytes>> frame;
    int scanned = 0;  // components of the first scan
    for (std::uint64_t at = 2;;) {
        if (reader.u8(at) != 0xFF) throw BadHeader{"something else where a marker should be"};
        while (reader.u8(at) == 0xFF) ++at;
        const std::uint32_t marker = reader.u8(at++);
        if (is_standalone(marker)) continue;
        if (marker == 0xD9) break;
        const std::uint32_t length = reader.u16(at);
        if (length < 2 || !reader.has(at, length)) throw BadHeader{"a segment reaches beyond the end"};
        const Bytes body = reader.part(at + 2, length - 2);
        if (marker == 0xDA) {
            scanned = static_cast<int>(Reader(body).u8(0));
            break;
        }
        if (marker == 0xE1 && !orientation && Reader(body).matches(0, std::string_view("Exif\0\0", 6))) {
            orientation = exif_orientation({body.data + 6, body.size - 6});
        } else if (is_frame(marker) && !frame) {
            frame.emplace(marker, body);
        }
        at += length;
    }
    if (!frame) throw BadHeader{"no frame header before the pixels"};
    header.orientation = orientation.value_or(1);
    read_frame(frame->second, frame->first, header);
    // After a scan of all components libjpeg takes no other, but in a progressive file.
    const bool several = is_progressive(header.jpeg_frame) || scanned < header.jpeg_components;
    if (several && too_many_scans(data)) throw BadHeader{"more than " + std::to_string(max_jpeg_scans) + " scans"};
    return header;
}

ImageHeader read_png(Bytes data) {
    const Reader reader(data);
    if (!reader.matches(0, "\x89PNG\r\n\x1a\n") || !reader.matches(12, "IHDR")) throw BadHeader{"not a PNG signature"};
    ImageHeader header;
    header.kind = ImageKind::png;
    header.width = reader.u32(16);
    header.height = reader.u32(20);
    std::uint64_t at = 33;
    for (int chunk = 0; chunk < max_chunks && reader.has(at, 12); ++chunk) {
        const std::uint64_t length = reader.u32(at);
        if (reader.matches(at + 4, "eXIf")) {
            header.orientation = exif_orientation(reader.part(at + 8, std::min<std::uint64_t>(length, 1 << 16)));
        }
        at += 12 + length;
    }
    return header;
}

int webp_orientation(Bytes data) {
    const Reader reader(data, false);
    std::uint64_t at = 12;
    for (int chunk = 0; chunk < max_chunks && reader.has(at, 8); ++chunk) {
        const std::uint64_t length = reader.u32(at + 4);
        if (reader.matches(at, "EXIF")) {
            Bytes block = reader.part(at + 8, std::min<std::uint64_t>(length, 1 << 16));
            if (Reader(block).matches(0, std::string_view("Exif\0\0", 6))) block = {block.data + 6, block.size - 6};
            return exif_orientation(block);
        }
        at += 8 + length + (length & 1);
    }
    return 1;
}

ImageHeader read_webp(Bytes data) {
    const Reader reader(data, false);
    if (std::uint64_t{reader.u32(4)} + 8 > data.size) throw BadHeader{"shorter than it says"};
    ImageHeader header;
    header.kind = ImageKind::webp;
    constexpr std::uint64_t at = 20;
    if (reader.matches(12, "VP8 ")) {
        if (!reader.matches(at + 3, "\x9d\x01\x2a")) throw BadHeader{"no key frame"};
        header.width = reader.u16(at + 6) & 0x3FFF;
        header.height = reader.u16(at + 8) & 0x3FFF;
    } else if (reader.matches(12, "VP8L")) {
        const std::uint32_t bits = reader.u32(at + 1);
        if (reader.u8(at) != 0x2F) throw BadHeader{"no lossless signature"};
        header.width = (bits & 0x3FFF) + 1;
        header.height = (bits >> 14 & 0x3FFF) + 1;
    } else if (reader.matches(12, "VP8X")) {
        reader.u8(at + 9);
        header.width = (reader.u16(at + 4) | reader.u8(at + 6) << 16) + 1;
        header.height = (reader.u16(at + 7) | reader.u8(at + 9) << 16) + 1;
        header.orientation = (reader.u8(at) & 0x08) != 0 ? webp_orientation(data) : 1;
    } else {
        throw BadHeader{"an unknown WebP chunk " + python_bytes(reader.part(12, 4))};
    }
    return header;
}

ImageHeader read_bmp(Bytes data) {
    const Reader reader(data, false);
    ImageHeader header;
    header.kind = ImageKind::bmp;
    if (reader.u32(14) == 12) {
        header.width = reader.u16(18);
        header.height = reader.u16(20);
    } else {
        header.width = static_cast<std::int32_t>(reader.u32(18));
        header.height = std::abs(std::int64_t{static_cast<std::int32_t>(reader.u32(22))});
    }
    return header;
}

struct Named {
    std::string_view magic;
    const char* what;
};

using std::string_view_literals::operator""sv;

constexpr std::array<Named, 14> foreign_formats{{
    {"GIF8"sv, "a GIF"},
    {"%PDF"sv, "a PDF document"},
    {"8BPS"sv, "a Photoshop file"},
    {"\0\0\0\x0cJXL "sv, "a JPEG XL file"},
    {"\xff\x0a"sv, "a JPEG XL file"},
    {"\0\0\0\x0cjP"sv, "a JPEG 2000 file"},
    {"\xff\x4f\xff\x51"sv, "a JPEG 2000 file"},
    {"v/1\x01"sv, "an OpenEXR file"},
    {"PK\x03\x04"sv, "a ZIP archive"},
    {"\x1f\x8b"sv, "a gzip archive"},
    {"RIFF"sv, "a RIFF file (video or sound)"},
    {"\x93NUMPY"sv, "a NumPy array"},
    {"\0\0\0\x01"
     "Bud1"sv,
     "a .DS_Store file"},
    {"version https://git-lfs"sv, "a Git LFS pointer (run `git lfs pull` to fetch the image)"},
}};

constexpr std::array<Named, 8> boxes{{
    {"avif", "an AVIF file"},
    {"avis", "an AVIF file"},
    {"mif1", "a HEIF file"},
    {"heic", "a HEIC file"},
    {"heix", "a HEIC file"},
    {"hevc", "a HEIC file"},
    {"msf1", "a HEIF file"},
    {"qt  ", "a QuickTime video"},
}};

std::string first_bytes(Bytes data) {
    std::string text = "an unknown format (first bytes";
    for (std::size_t at = 0; at < std::min<std::size_t>(data.size, 8); ++at) {
        std::array<char, 4> code{};
        std::snprintf(code.data(), code.size(), " %02x", data.data[at]);
        text += code.data();
    }
    return text + ")";
}

std::string what_it_is(Bytes data) {
    const Reader reader(data);
    for (const Named& format : foreign_formats) {
        if (reader.matches(0, format.magic)) return format.what;
    }
    if (reader.matches(4, "ftyp")) {
        for (const Named& box : boxes) {
            if (reader.matches(8, box.magic)) return box.what;
        }
        return "an MP4-like file (video, HEIF)";
    }
    const std::size_t size = std::min<std::size_t>(data.size, 512);
    const std::uint8_t* const end = data.data + size;
    if (std::all_of(data.data, end, [](std::uint8_t byte) { return byte == 0; })) {
        return "nothing but zero bytes (a copy that did not finish?)";
    }
    std::string head(data.data, end);
    head.erase(0, std::min(head.find_first_not_of(" \t\n\r\v\f"), head.size()));
    std::transform(head.begin(), head.end(), head.begin(),
                   [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
    const auto starts = [&head](std::string_view text) { return head.compare(0, text.size(), text) == 0; };
    if (starts("<!doctype html") || starts("<html")) return "an HTML page (a download that failed?)";
    if (starts("<svg") || starts("<?xml")) return "an SVG or XML file";
    const auto printable = [](std::uint8_t byte) { return byte >= 32 || byte == 9 || byte == 10 || byte == 13; };
    if (std::all_of(data.data, end, printable)) return "a text file";
    return first_bytes(data);
}

ImageHeader read_any(Bytes data, std::string_view name) {
    const Reader reader(data);
    if (reader.matches(0, "\xff\xd8")) return read_jpeg(data);
    if (reader.matches(0, "\x89PNG")) return read_png(data);
    if (reader.matches(0, "RIFF") && reader.matches(8, "WEBP")) return read_webp(data);
    if (reader.matches(0, "BM")) return read_bmp(data);
    if (reader.matches(0, "II") || reader.matches(0, "MM")) {
        throw Error(
            ErrorKind::image,
            std::string(name) + ": a TIFF file, and the C++ runtime does not read TIFF; convert it to PNG or JPEG");
    }
    throw Error(ErrorKind::image, std::string(name) + ": " + what_it_is(data) +
                                      ", not a JPEG, PNG, WebP, BMP or TIFF file; convert it or remove it");
}

}  // namespace

void throw_damaged(std::string_view name, std::string_view why) {
    throw Error(ErrorKind::image,
                std::string(name) + ": damaged or truncated (" + std::string(why) + "); copy it again or remove it");
}

int exif_orientation(Bytes block) {
    try {
        const bool big_endian = Reader(block).matches(0, "MM");
        if (!big_endian && !Reader(block).matches(0, "II")) return 1;
        const Reader reader(block, big_endian);
        if (reader.u16(2) != 42) return 1;
        const std::uint64_t offset = reader.u32(4);
        const std::uint32_t count = reader.u16(offset);
        std::uint32_t orientation = 1;
        for (std::uint32_t number = 0; number < count; ++number) {
            const std::uint64_t at = offset + 2 + std::uint64_t{12} * number;
            const std::uint32_t tag = reader.u16(at);
            const std::uint32_t kind = reader.u16(at + 2);
            reader.u32(at + 4);
            if (kind != 3 && kind != 4) continue;
            const std::uint32_t value = kind == 3 ? reader.u16(at + 8) : reader.u32(at + 8);
            if (tag == 274) orientation = value;
        }
        return orientation >= 1 && orientation <= 8 ? static_cast<int>(orientation) : 1;
    } catch (const BadHeader&) {
        return 1;
    }
}

ImageHeader read_header(Bytes data, std::string_view name, long long max_pixels) {
    ImageHeader header;
    try {
        header = read_any(data, name);
    } catch (const BadHeader& bad) {
        throw_damaged(name, bad.why);
    }
    const auto size = [&header] {
        return std::to_string(header.width) + "x" + std::to_string(header.height) + " pixels";
    };
    if (header.height < 1 || header.width < 1) throw_damaged(name, "it says " + size());
    // A product of two PNG sizes may not fit.
    if (header.height > max_pixels / header.width) {
        throw Error(ErrorKind::image, std::string(name) + ": " + size() + ", the limit is " +
                                          std::to_string(max_pixels) + "; make it smaller or raise the limit");
    }
    return header;
}

}  // namespace edgedistill::detail
