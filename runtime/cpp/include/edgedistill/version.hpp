// The library's version: of the headers (macros) and of what was linked (function).
#pragma once

#include <edgedistill/export.hpp>

#define EDGEDISTILL_VERSION_MAJOR 0
#define EDGEDISTILL_VERSION_MINOR 1
#define EDGEDISTILL_VERSION_PATCH 0
#define EDGEDISTILL_VERSION_STRING "0.1.0"

namespace edgedistill {

// "0.1.0"
EDGEDISTILL_API const char* version() noexcept;

}  // namespace edgedistill
