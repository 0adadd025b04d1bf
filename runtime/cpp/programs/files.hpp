// What is written is whole, or the program fails.
#pragma once

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <edgedistill/error.hpp>
#include <filesystem>
#include <string>

namespace edgedistill::programs {

// The end of a program: throws Error (artifact) where not all that was printed got out. `fault`: errno of an earlier
// flush that failed, for a later one knows nothing of it.
inline void check_output(int fault = 0) {
    if (std::fflush(stdout) != 0 && fault == 0) {
        fault = errno;
    }
    if (fault == 0 && std::ferror(stdout) == 0) {
        return;
    }
    const std::string why = fault == 0 ? "" : std::string(" (") + std::strerror(fault) + ")";
    throw Error(ErrorKind::artifact, "standard output: cannot be written" + why + "; choose another place");
}

// A file that is written whole or not at all, as artifacts.py does it.
//
// Written under a temporary name beside `path`; `commit` syncs and renames it. Without commit nothing stays behind.
class WholeFile {
public:
    explicit WholeFile(std::filesystem::path path) : path_(std::move(path)) {
        const std::filesystem::path folder = path_.has_parent_path() ? path_.parent_path() : ".";
        std::error_code fault;
        std::filesystem::create_directories(folder, fault);
        temporary_ = (folder / ("." + path_.filename().string() + ".XXXXXX")).string();
        const int handle = ::mkstemp(temporary_.data());
        file_ = handle < 0 ? nullptr : ::fdopen(handle, "w");
        if (file_ == nullptr) {
            fail();
        }
    }
    ~WholeFile() {
        if (file_ != nullptr) {
            std::fclose(file_);
            ::unlink(temporary_.c_str());
        }
    }
    WholeFile(const WholeFile&) = delete;
    WholeFile& operator=(const WholeFile&) = delete;

    std::FILE* file() { return file_; }

    void commit() {
        const bool written = std::fflush(file_) == 0 && std::ferror(file_) == 0 && ::fsync(::fileno(file_)) == 0;
        if (!written || ::fchmod(::fileno(file_), 0644) != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) {
            fail();
        }
        std::fclose(file_);
        file_ = nullptr;
    }

private:
    [[noreturn]] void fail() const {
        const std::string why =
            errno == ENOSPC ? "the disk is full; free some space"
                            : std::string("cannot be written (") + std::strerror(errno) + "); choose another place";
        throw Error(ErrorKind::artifact, path_.string() + ": " + why);
    }

    std::filesystem::path path_;
    std::string temporary_;
    std::FILE* file_ = nullptr;
};

}  // namespace edgedistill::programs
