// Images on their way: held in order and in bounded memory, answered by threads that know nothing of networks.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <edgedistill/engine.hpp>
#include <edgedistill/image.hpp>
#include <edgedistill/prediction.hpp>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "frame.hpp"

namespace edgedistill::detail {

// One image as it is handed over, with what keeps its memory alive.
struct Submission {
    std::variant<std::filesystem::path, Bytes, ImageView> data;
    std::string name;                        // unused for a path, which is its own name
    std::vector<std::uint8_t> owned;         // what Bytes point to, where they are the engine's own
    std::shared_ptr<const void> keep_alive;  // of borrowed memory
    std::uint64_t user = 0;                  // comes back with the answer
};

struct PoolSettings {
    std::size_t capacity =
        0;                  // images held at any moment; more than workers x batch, so that one can always be dropped
    std::size_t batch = 1;  // images that one worker takes at once, at most
    Policy policy = Policy::block;
    std::function<void(const Prediction&)> callback;
};

// Every call may be made from any thread, and threads may still be on their way out of a call when the pool's owner
// lets it go: whoever calls holds a shared_ptr. The owner closes it.
//
// Held images are one list in the order of submission. Workers take from its front, so what they began is a prefix of
// it and what waits is the rest: the oldest of either kind is found without a search. Slots are used again with all
// their memory.
class Pool {
public:
    // Answers `count` frames; what it throws is handed to whoever takes those answers. Called by one thread only.
    using Answer = std::function<void(const Frame* const* frames, std::size_t count, Prediction* out)>;
    // Makes what a thread answers with, in that thread, while the others answer. What it throws is the pool's failure:
    // whoever submits gets it, and so do the images that this thread takes from then on.
    using Make = std::function<Answer()>;

    explicit Pool(PoolSettings settings);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    void start(std::vector<Make> makers);  // one thread each
    void wait_until_ready();               // until all of them made their answer, or close; throws the failure

    // False when there was no room until the timeout. Afterwards `image` holds what is to be thrown away.
    bool submit(Submission& image, Engine::Timeout timeout);
    // False when there will be no more. Throws what the worker threw. `user` may be null, and is set before a throw.
    bool next(Prediction& out, std::uint64_t* user = nullptr);
    void finish();
    void close() noexcept;
    std::uint64_t dropped() const noexcept { return dropped_.load(std::memory_order_relaxed); }

private:
    enum class State { waiting, working, answered };

    struct Slot {
        Frame frame;
        std::vector<std::uint8_t> owned;
        std::shared_ptr<const void> keep_alive;
        std::uint64_t user = 0;
        Prediction prediction;
        std::exception_ptr failure;
        State state = State::waiting;
        Slot* previous = nullptr;
        Slot* next = nullptr;
    };

    // Whom to wake once the lock is released.
    struct Wake {
        bool worker = false;
        bool producer = false;
        bool consumer = false;
        bool everybody = false;
        bool any() const { return worker || producer || consumer || everybody; }
    };

    using Lock = std::unique_lock<std::mutex>;

    bool is_closed();
    Answer made(const Make& make);
    void work(const Answer& answer);
    std::size_t trade(Slot** slots, std::size_t done);
    Wake settle(Lock& lock, Slot* const* slots, std::size_t done);
    bool deliver(Lock& lock);
    void notify(const Wake& wake);

    void check_open() const;
    bool wait_for_room(Lock& lock, const Engine::Timeout& timeout);
    Slot& slot_for_next();
    Slot* victim() const;
    void append(Slot& slot);
    void unlink(Slot& slot);
    void put_back(Slot& slot);
    bool front_is_answered() const { return front_ != nullptr && front_->state == State::answered; }
    bool producer_should_wake() const { return producers_ > 0 && held_ < capacity_ && waiting_ <= low_water_; }

    const std::size_t capacity_;
    const std::size_t batch_;
    const Policy policy_;
    const std::function<void(const Prediction&)> callback_;
    std::size_t low_water_ = 0;

    std::mutex mutex_;  // guards all that follows, up to closing_
    std::condition_variable work_, room_, answers_, ready_;
    std::vector<std::unique_ptr<Slot>> slots_;
    Slot* free_ = nullptr;
    Slot* front_ = nullptr;
    Slot* back_ = nullptr;
    Slot* first_waiting_ = nullptr;
    std::size_t held_ = 0;                       // in the list, or being delivered
    std::size_t waiting_ = 0;                    // begun by nobody
    std::size_t idle_ = 0;                       // workers asleep
    std::size_t producers_ = 0, consumers_ = 0;  // asleep
    std::size_t starting_ = 0;                   // workers that make their answer
    std::exception_ptr failure_;                 // of one that could not
    bool delivering_ = false;
    bool finished_ = false;
    bool closed_ = false;

    std::mutex closing_;  // guards threads_
    std::vector<std::thread> threads_;
    std::atomic<std::uint64_t> dropped_{0};
};

}  // namespace edgedistill::detail
