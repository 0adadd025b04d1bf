// Memory that is used again and again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace edgedistill::detail {

// A block of bytes that grows to the largest size asked for. Page faults of fresh memory were 15% of the time of a
// 1920x1281 JPEG.
class Buffer {
public:
    // Memory above this is not kept from one image to the next.
    static constexpr std::size_t kept_bytes = std::size_t{64} << 20;

    // At least `size` bytes; what was there before is gone. Throws std::bad_alloc.
    std::uint8_t* take(std::size_t size) {
        if (size > size_) {
            memory_.reset();
            size_ = 0;
            memory_.reset(new std::uint8_t[size]);
            size_ = size;
        }
        return memory_.get();
    }

    // At least `size` bytes, the first `keep` of which stay as they are. Throws std::bad_alloc.
    std::uint8_t* grow(std::size_t size, std::size_t keep);

    void trim() noexcept {
        if (size_ > kept_bytes) {
            memory_.reset();
            size_ = 0;
        }
    }

    std::uint8_t* data() noexcept { return memory_.get(); }
    std::size_t size() const noexcept { return size_; }

private:
    std::unique_ptr<std::uint8_t[]> memory_;
    std::size_t size_ = 0;
};

// Trims what it was made for at the end of a scope, however that ends: damaged images ask for memory too.
template <typename Memory>
class Trimmed {
public:
    explicit Trimmed(Memory& memory) : memory_(memory) {}
    ~Trimmed() { memory_.trim(); }
    Trimmed(const Trimmed&) = delete;
    Trimmed& operator=(const Trimmed&) = delete;

private:
    Memory& memory_;
};

inline std::uint8_t* Buffer::grow(std::size_t size, std::size_t keep) {
    if (size > size_) {
        std::unique_ptr<std::uint8_t[]> larger(new std::uint8_t[size]);
        for (std::size_t at = 0; at < keep; ++at) larger[at] = memory_[at];
        memory_ = std::move(larger);
        size_ = size;
    }
    return memory_.get();
}

}  // namespace edgedistill::detail
