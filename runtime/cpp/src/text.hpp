// UTF-8 text that may come from anywhere: checked, split, shortened and quoted as Python's str does it.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace edgedistill::detail {

// Code points in `text`; nothing when it is not UTF-8.
std::optional<std::size_t> utf8_length(std::string_view text);

// UTF-8 without control, format, private, separator (but for the space) and surrogate characters: str.isprintable().
// Code points that no Unicode version has given a meaning yet pass; there Python's answer depends on its release.
bool is_printable(std::string_view text);

// The words between Unicode white space: str.split().
std::vector<std::string> split_words(std::string_view text);

// In quotes, at most `most` code points of it, without anything that a terminal could take for a command.
std::string in_quotes(std::string_view text, std::size_t most = 60);

// The same without quotes: for what a library said.
std::string plain(std::string_view text, std::size_t most = 300);

// float(text), except that digits are ASCII and underscores refused. May be infinite or not a number.
std::optional<double> parse_number(std::string_view text);
std::optional<long long> parse_integer(std::string_view text);

// The shortest text that reads back as the same number.
std::string shown(double value);

}  // namespace edgedistill::detail
