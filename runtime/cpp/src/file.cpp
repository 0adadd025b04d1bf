#include "file.hpp"

#include <cerrno>
#include <cstring>
#include <system_error>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.hpp"

namespace edgedistill::detail {

namespace {

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& why) {
    throw Error(ErrorKind::artifact, path.string() + ": cannot be read (" + why + "); export the model again");
}

std::string reason() {
    return std::generic_category().message(errno);
}

}  // namespace

File::File(const std::filesystem::path& path, std::uint64_t most) : path_(path) {
    // A pipe would keep open() waiting for somebody who writes.
    handle_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (handle_ < 0) refuse(path, reason());
    struct stat about {};
    std::string problem;
    if (::fstat(handle_, &about) != 0) {
        problem = reason();
    } else if (!S_ISREG(about.st_mode)) {
        problem = "not a file";
    } else if (static_cast<std::uint64_t>(about.st_size) > most) {
        problem = std::to_string(about.st_size) + " bytes, the limit is " + std::to_string(most);
    }
    if (!problem.empty()) {
        ::close(handle_);
        refuse(path, problem);
    }
    size_ = static_cast<std::size_t>(about.st_size);
}

File::~File() {
    ::close(handle_);
}

void File::read(std::uint8_t* out) const {
    std::size_t done = 0;
    while (done < size_) {
        const ssize_t got = ::read(handle_, out + done, size_ - done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) refuse(path_, reason());
        if (got == 0) refuse(path_, "it became shorter meanwhile");
        done += static_cast<std::size_t>(got);
    }
}

std::string read_text_file(const std::filesystem::path& path, std::uint64_t most) {
    const File file(path, most);
    std::string text(file.size(), '\0');
    file.read(reinterpret_cast<std::uint8_t*>(text.data()));
    return text;
}

}  // namespace edgedistill::detail
