// What every target here tells the sanitizers, and the one way to say that a promise was broken.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "text.hpp"

// OpenVINO and TBB, which are not instrumented, keep what they made until the process ends.
extern "C" inline __attribute__((used)) const char* __lsan_default_suppressions() {
    return "leak:libopenvino\nleak:libtbb\n";
}

namespace edgedistill::fuzz {

// Not assert: it has to hold in every build.
inline void promise(bool kept, const char* what, std::string_view about = {}) {
    if (kept) return;
    std::fprintf(stderr, "broken promise: %s (%.*s)\n", what, static_cast<int>(about.size()), about.data());
    std::abort();
}

// Messages end up in terminals and logs: whatever the input was, they begin with its name and hold nothing else than
// printable text.
inline void check_message(const std::string& message, std::string_view name) {
    promise(message.compare(0, name.size(), name) == 0, "a message names what it is about", message);
    promise(detail::is_printable(message), "a message is printable", message);
}

}  // namespace edgedistill::fuzz
