// Whose answer is whose: the pool hands out one order, Python's callers each wait for their own image.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>

#include <edgedistill/prediction.hpp>

#include "pool.hpp"

namespace edgedistill::python {

using detail::Deadline;

// An image that was handed over. `dropped`: the number of the one that was given up for it.
struct Submitted {
    std::uint64_t number = 0;
    std::optional<std::uint64_t> dropped;
};

// Every call may be made from any thread. One of those that wait takes answers out of the pool, for all of them; what
// nobody took yet stays here, so callers bound how many images they have on the way. It must be the pool's only user.
class Desk {
public:
    explicit Desk(std::shared_ptr<detail::Pool> pool) : pool_(std::move(pool)) {}

    // Nothing: the engine was still full at the deadline. Throws Error as Engine::submit does.
    std::optional<Submitted> submit(detail::Submission& image, Deadline deadline);
    // The answer to an image, once. Nothing: it was not there at the deadline. Throws Error (closed) for an image that
    // was given up or taken already and once the desk is closed, and whatever went wrong in the worker.
    std::optional<Prediction> take(std::uint64_t number, Deadline deadline);
    // Nobody will take its answer: it is not even begun where no worker has it in hand.
    void forget(std::uint64_t number);
    // Ends the pool's threads: images in work are finished, waiting ones are not. Twice does no harm.
    void close();
    std::uint64_t dropped() const noexcept { return pool_->dropped(); }
    void wait_until_ready() { pool_->wait_until_ready(); }

private:
    using Lock = std::unique_lock<std::mutex>;

    struct Image {
        bool answered = false;
        Prediction prediction;
        std::exception_ptr failure;
    };

    bool wait_for_news(Lock& lock, Deadline deadline);

    const std::shared_ptr<detail::Pool> pool_;
    std::mutex mutex_;  // guards what follows
    std::condition_variable changed_;
    std::unordered_map<std::uint64_t, Image> images_;  // handed over, and neither taken nor given up
    std::uint64_t next_number_ = 0;
    bool taking_ = false;  // somebody waits for the pool
    bool closed_ = false;
};

}  // namespace edgedistill::python
