// The one exception type.
#pragma once

#include <stdexcept>
#include <string>

#include <edgedistill/export.hpp>

namespace edgedistill {

enum class ErrorKind {
    usage,     // options contradict each other or name something that does not exist
    image,     // one image cannot be read: damaged, truncated, too large or in a format nobody here reads
    artifact,  // a file of the deployable is missing, damaged or hostile
    model,     // the network cannot be loaded or run
    closed,    // the engine was closed
};

// what() says what was found, what was expected, and the remedy.
class EDGEDISTILL_API Error : public std::runtime_error {
public:
    Error(ErrorKind kind, const std::string& message);
    ~Error() override;
    ErrorKind kind() const noexcept { return kind_; }

private:
    ErrorKind kind_;
};

}  // namespace edgedistill
