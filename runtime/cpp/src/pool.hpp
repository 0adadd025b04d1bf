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

using Deadline = std::chrono::steady_clock::time_point;

struct PoolSettings {
    // Images held at any moment; more than workers x largest batch, so that one can always be dropped: else, where
    // workers have all in hand, up to that many and one are held.
    std::size_t capacity = 0;
    std::vector<std::size_t> batches = {1};  // images that one worker takes at once for each stage, at most
    std::size_t pixel_bytes = 0;             // that an image which waits for a later stage has, at most
    Policy policy = Policy::block;
    std::function<void(const Prediction&)> callback;
};

// Every call may be made from any thread, and threads may still be on their way out of a call when the pool's owner
// lets it go: whoever calls holds a shared_ptr. The owner closes it.
//
// Held images are one list in the order of submission. Workers take from its front, so what they began is a prefix of
// it and what waits is the rest: the oldest of either kind is found without a search. Slots are used again with all
// their memory.
//
// What a stage passes on is gathered, and taken when it fills a batch of the next stage, when so many images were begun
// since the oldest of it was that the rest of the queue would soon wait for it, or when there is nothing else to do.
class Pool {
public:
    // One stage's answers to `count` images; what it throws is handed to whoever takes those answers. Called by one
    // thread only.
    using Answer = std::function<void(std::size_t stage, Task* const* tasks, std::size_t count)>;
    // Makes what a thread answers with, in that thread, while the others answer. What it throws is the pool's failure:
    // whoever submits gets it, and so do the images that this thread takes from then on.
    using Make = std::function<Answer()>;

    explicit Pool(PoolSettings settings);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    void start(std::vector<Make> makers);  // one thread each
    void wait_until_ready();               // until all of them made their answer, or close; throws the failure

    // False when there was no room until the timeout. Afterwards `image` holds what is to be thrown away: where another
    // image was given up for this one, `user` is that one's.
    bool submit(Submission& image, Engine::Timeout timeout);
    // False when there will be no more, or was none until the deadline. Throws what the worker threw. `user` may be
    // null, and is set before a throw.
    bool next(Prediction& out, std::uint64_t* user = nullptr, const Deadline* deadline = nullptr);
    void withdraw(std::uint64_t user);  // that image, but for one that a worker has in hand
    void finish();
    void close() noexcept;
    std::uint64_t dropped() const noexcept { return dropped_.load(std::memory_order_relaxed); }

private:
    enum class State { waiting, working, gathered, answered };

    struct Slot {
        Frame frame;
        std::vector<std::uint8_t> owned;
        std::shared_ptr<const void> keep_alive;
        std::uint64_t user = 0;
        Prediction prediction;
        Task task;
        std::uint64_t number = 0;  // images that were begun before it
        std::exception_ptr failure;
        State state = State::waiting;
        Slot* previous = nullptr;
        Slot* next = nullptr;
    };

    // What one worker has in hand.
    struct Hand {
        std::size_t stage = 0;
        std::vector<Slot*> slots;
        std::vector<Task*> tasks;
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
    static void answer_all(const Answer& answer, Hand& hand);
    bool trade(Hand& hand);
    Wake settle(Lock& lock, const Hand& hand);
    bool has_work() const { return first_waiting_ != nullptr || gathered_ > 0; }
    std::size_t next_stage() const;
    void take(Hand& hand);
    void begin(Slot& slot);
    void gather(std::size_t stage, Slot& slot);
    void forget(Slot& slot);
    void give_back_pixels(Slot& slot);
    bool deliver(Lock& lock);
    void notify(const Wake& wake);

    void check_open() const;
    bool wait_for_room(Lock& lock, const Engine::Timeout& timeout);
    Slot& slot_for_next();
    Slot* victim() const;
    void give_up(Slot& slot);
    void append(Slot& slot);
    void unlink(Slot& slot);
    void put_back(Slot& slot);
    bool front_is_answered() const { return front_ != nullptr && front_->state == State::answered; }
    bool producer_should_wake() const { return producers_ > 0 && held_ < capacity_ && waiting_ <= low_water_; }

    const std::size_t capacity_;
    const std::vector<std::size_t> batches_;
    const std::size_t pixel_bytes_;
    const Policy policy_;
    const std::function<void(const Prediction&)> callback_;
    std::size_t low_water_ = 0;
    std::size_t patience_ = 0;  // images begun after a gathered one, until it waits no longer

    std::mutex mutex_;  // guards all that follows, up to closing_
    std::condition_variable work_, room_, answers_, ready_;
    std::vector<std::unique_ptr<Slot>> slots_;
    Slot* free_ = nullptr;
    Slot* front_ = nullptr;
    Slot* back_ = nullptr;
    Slot* first_waiting_ = nullptr;
    std::size_t held_ = 0;     // in the list, or being delivered
    std::size_t waiting_ = 0;  // begun by nobody
    std::size_t idle_ = 0;     // workers asleep
    std::uint64_t begun_ = 0;
    std::vector<std::vector<Slot*>> gathered_for_;  // each stage, the first one that came in front
    std::size_t gathered_ = 0;                      // in all of them
    std::vector<std::vector<std::uint8_t>> spare_;  // pixels of nobody
    std::size_t producers_ = 0, consumers_ = 0;     // asleep
    std::size_t starting_ = 0;                      // workers that make their answer
    std::exception_ptr failure_;                    // of one that could not
    bool delivering_ = false;
    bool finished_ = false;
    bool closed_ = false;

    std::mutex closing_;  // guards threads_
    std::vector<std::thread> threads_;
    std::atomic<std::uint64_t> dropped_{0};
};

}  // namespace edgedistill::detail
