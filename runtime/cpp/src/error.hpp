// What errors and warnings are made of.
#pragma once

#include <exception>
#include <string>

#include <edgedistill/error.hpp>
#include <edgedistill/options.hpp>

namespace edgedistill::detail {

// OpenVINO's messages are a stack of source lines with the reason at the end.
std::string last_line(const std::exception& error);

// One line about something the user should know: to the callback, or to standard error where there is none.
void warn(const LogCallback& log, const std::string& message);

}  // namespace edgedistill::detail
