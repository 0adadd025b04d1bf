#include "text.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <iterator>

namespace edgedistill::detail {

namespace {

struct Range {
    char32_t first;
    char32_t last;
};

// The categories Cc, Cf, Cs, Co, Zl, Zp and Zs (but for the space) of Unicode 14, in ascending order.
constexpr Range unprintable[] = {
    {0x0000, 0x001F},   {0x007F, 0x00A0},   {0x00AD, 0x00AD},   {0x0600, 0x0605},   {0x061C, 0x061C},
    {0x06DD, 0x06DD},   {0x070F, 0x070F},   {0x0890, 0x0891},   {0x08E2, 0x08E2},   {0x1680, 0x1680},
    {0x180E, 0x180E},   {0x2000, 0x200F},   {0x2028, 0x202F},   {0x205F, 0x206F},   {0x3000, 0x3000},
    {0xD800, 0xF8FF},   {0xFEFF, 0xFEFF},   {0xFFF9, 0xFFFB},   {0x110BD, 0x110BD}, {0x110CD, 0x110CD},
    {0x13430, 0x1343F}, {0x1BCA0, 0x1BCA3}, {0x1D173, 0x1D17A}, {0xE0000, 0xE00FF}, {0xF0000, 0x10FFFF},
};

constexpr Range white_space[] = {
    {0x0009, 0x000D}, {0x001C, 0x0020}, {0x0085, 0x0085}, {0x00A0, 0x00A0}, {0x1680, 0x1680},
    {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F}, {0x3000, 0x3000},
};

template <std::size_t N>
bool is_in(const Range (&ranges)[N], char32_t point) {
    const auto* found = std::upper_bound(std::begin(ranges), std::end(ranges), point,
                                         [](char32_t value, const Range& range) { return value < range.first; });
    return found != std::begin(ranges) && point <= std::prev(found)->last;
}

constexpr char32_t damaged = 0xFFFFFFFF;

// The code point at `position`, which moves behind it: by one byte where the text is `damaged`.
char32_t next_point(std::string_view text, std::size_t& position) {
    const auto byte = [&](std::size_t index) { return static_cast<std::uint8_t>(text[index]); };
    const std::uint8_t lead = byte(position);
    const std::size_t start = position++;
    if (lead < 0x80) return lead;
    const std::size_t more = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : 1;
    if (lead < 0xC2 || lead > 0xF4 || text.size() - start <= more) return damaged;
    char32_t point = lead & (0x3FU >> more);
    for (std::size_t index = start + 1; index <= start + more; ++index) {
        if ((byte(index) & 0xC0U) != 0x80U) return damaged;
        point = (point << 6U) | (byte(index) & 0x3FU);
    }
    constexpr std::array<char32_t, 4> smallest{0, 0x80, 0x800, 0x10000};
    if (point < smallest[more] || point > 0x10FFFF || (point >= 0xD800 && point <= 0xDFFF)) return damaged;
    position = start + more + 1;
    return point;
}

bool can_be_shown(char32_t point) {
    return point != damaged && (point & 0xFFFEU) != 0xFFFEU && !is_in(unprintable, point);
}

std::string_view stripped(std::string_view text) {
    constexpr std::string_view blanks = " \t\n\v\f\r";
    const std::size_t first = text.find_first_not_of(blanks);
    return first == std::string_view::npos ? std::string_view{}
                                           : text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

template <typename Number>
std::optional<Number> parse(std::string_view text) {
    text = stripped(text);
    if (text.size() > 1 && text[0] == '+' && text[1] != '-' && text[1] != '+') text.remove_prefix(1);
    Number value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
    return value;
}

}  // namespace

std::optional<std::size_t> utf8_length(std::string_view text) {
    std::size_t count = 0;
    for (std::size_t position = 0; position < text.size(); ++count) {
        if (next_point(text, position) == damaged) return std::nullopt;
    }
    return count;
}

bool is_printable(std::string_view text) {
    for (std::size_t position = 0; position < text.size();) {
        if (!can_be_shown(next_point(text, position))) return false;
    }
    return true;
}

std::vector<std::string> split_words(std::string_view text) {
    std::vector<std::string> words;
    std::size_t start = 0;
    for (std::size_t position = 0; position < text.size();) {
        const std::size_t before = position;
        if (!is_in(white_space, next_point(text, position))) continue;
        if (before > start) words.emplace_back(text.substr(start, before - start));
        start = position;
    }
    if (start < text.size()) words.emplace_back(text.substr(start));
    return words;
}

std::string plain(std::string_view text, std::size_t most) {
    std::string result;
    std::size_t count = 0;
    for (std::size_t position = 0; position < text.size() && count < most; ++count) {
        const std::size_t before = position;
        if (can_be_shown(next_point(text, position))) {
            result.append(text, before, position - before);
        } else {
            result += '?';
        }
    }
    return result;
}

std::string in_quotes(std::string_view text, std::size_t most) {
    return "'" + plain(text, most) + "'";
}

std::optional<double> parse_number(std::string_view text) {
    return parse<double>(text);
}

std::optional<long long> parse_integer(std::string_view text) {
    return parse<long long>(text);
}

std::string shown(double value) {
    std::array<char, 32> text{};
    const auto result = std::to_chars(text.data(), text.data() + text.size(), value);
    return {text.data(), result.ptr};
}

}  // namespace edgedistill::detail
