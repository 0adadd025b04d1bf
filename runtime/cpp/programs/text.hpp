// Numbers and strings as `edgedistill predict` writes them, so that the two programs' outputs can be compared as text.
#pragma once

#include <charconv>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace edgedistill::programs {

// The shortest text that reads back as `value`, in Python's form: 0.25, 1.0, 1e-05.
inline std::string shortest(double value) {
    if (!std::isfinite(value)) {
        return std::isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity";
    }
    char text[40];
    const double magnitude = std::abs(value);
    const bool fixed = magnitude == 0 || (magnitude >= 1e-4 && magnitude < 1e16);
    const auto form = fixed ? std::chars_format::fixed : std::chars_format::scientific;
    const auto end = std::to_chars(text, text + sizeof text, value, form).ptr;
    std::string shown(text, end);
    return fixed && shown.find('.') == std::string::npos ? shown + ".0" : shown;
}

inline std::string formatted(const char* form, double value) {
    char text[64];
    std::snprintf(text, sizeof text, form, value);
    return text;
}

inline std::string json_string(const std::string& text) {
    return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

inline std::string joined(const std::vector<std::string>& parts, std::string_view between) {
    std::string text;
    for (std::size_t number = 0; number < parts.size(); ++number) {
        text.append(number == 0 ? std::string_view() : between).append(parts[number]);
    }
    return text;
}

// One CSV field: quoted where it has to be.
inline std::string csv_field(const std::string& text) {
    if (text.find_first_of(",\"\r\n") == std::string::npos) {
        return text;
    }
    std::string quoted = "\"";
    for (const char letter : text) {
        quoted.append(letter == '"' ? 2 : 1, letter);
    }
    return quoted + "\"";
}

}  // namespace edgedistill::programs
