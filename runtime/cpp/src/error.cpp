#include "error.hpp"

#include <cstdio>
#include <string_view>

#include <edgedistill/version.hpp>

#include "text.hpp"

namespace edgedistill {

Error::Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}

// Here, so that its type information is in the library alone and a catch in the caller's code finds it.
Error::~Error() = default;

const char* version() noexcept {
    return EDGEDISTILL_VERSION_STRING;
}

namespace detail {

std::string last_line(const std::exception& error) {
    constexpr std::string_view blanks = " \t\v\f\r\n";
    std::string_view text = error.what();
    const std::size_t end = text.find_last_not_of(blanks);
    if (end == std::string_view::npos) return "an unknown error";
    text = text.substr(0, end + 1);
    const std::size_t start = text.find_last_of("\r\n");
    if (start != std::string_view::npos) text.remove_prefix(start + 1);
    text.remove_prefix(text.find_first_not_of(blanks));
    return plain(text, 300);
}

void warn(const LogCallback& log, const std::string& message) {
    if (log) {
        log(LogLevel::warning, message);
    } else {
        std::fprintf(stderr, "warning: %s\n", message.c_str());
    }
}

}  // namespace detail
}  // namespace edgedistill
