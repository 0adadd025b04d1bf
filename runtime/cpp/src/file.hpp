// Whole files into memory, once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace edgedistill::detail {

// A regular file, open for reading, and its size.
class File {
public:
    // Throws Error (artifact) for what cannot be read, is no file, or has more than `most` bytes.
    File(const std::filesystem::path& path, std::uint64_t most);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    std::size_t size() const noexcept { return size_; }
    // All of it. Throws Error (artifact) when the file has become shorter.
    void read(std::uint8_t* out) const;

private:
    std::filesystem::path path_;
    int handle_ = -1;
    std::size_t size_ = 0;
};

std::string read_text_file(const std::filesystem::path& path, std::uint64_t most);

}  // namespace edgedistill::detail
