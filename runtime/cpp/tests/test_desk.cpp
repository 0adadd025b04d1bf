// Python's desk: whoever asks gets the answer to their own image, whoever of them takes it out of the pool.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <edgedistill/error.hpp>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../python/desk.hpp"

namespace {

using namespace std::chrono_literals;
using edgedistill::Error;
using edgedistill::ErrorKind;
using edgedistill::Policy;
using edgedistill::detail::Deadline;
using edgedistill::detail::Pool;
using edgedistill::detail::PoolSettings;
using edgedistill::detail::Submission;
using edgedistill::detail::Task;
using edgedistill::python::Desk;

Deadline in(std::chrono::milliseconds time) {
    return std::chrono::steady_clock::now() + time;
}

struct Shape {
    std::size_t workers = 2;
    std::size_t capacity = 5;
    Policy policy = Policy::block;
};

// Image "7" is answered with index 7, after `before`.
std::unique_ptr<Desk> make_desk(
    const Shape& shape, const std::function<void(const std::string&)>& before = [](const std::string&) {}) {
    PoolSettings settings;
    settings.capacity = shape.capacity;
    settings.policy = shape.policy;
    const auto pool = std::make_shared<Pool>(std::move(settings));
    const Pool::Answer answer = [before](std::size_t, Task* const* tasks, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) {
            before(tasks[i]->frame->name);
            tasks[i]->answer->index = std::stoi(tasks[i]->frame->name);
        }
    };
    pool->start(std::vector<Pool::Make>(shape.workers, [answer] { return answer; }));
    return std::make_unique<Desk>(pool);
}

std::optional<edgedistill::python::Submitted> hand_over(Desk& desk, int index, Deadline deadline = in(10s),
                                                        std::shared_ptr<const void> memory = {}) {
    Submission image;
    image.data = edgedistill::Bytes{};
    image.name = std::to_string(index);
    image.keep_alive = std::move(memory);
    return desk.submit(image, deadline);
}

std::uint64_t number_of(Desk& desk, int index, std::shared_ptr<const void> memory = {}) {
    const auto submitted = hand_over(desk, index, in(10s), std::move(memory));
    REQUIRE(submitted);
    return submitted->number;
}

template <class Call>
std::optional<ErrorKind> kind_thrown(const Call& call) {
    try {
        call();
    } catch (const Error& error) {
        return error.kind();
    }
    return std::nullopt;
}

// Holds workers at their image until it is opened.
class Gate {
public:
    void operator()(const std::string&) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++begun_;
        changed_.notify_all();
        changed_.wait(lock, [this] { return open_; });
    }
    void open() {
        const std::lock_guard<std::mutex> lock(mutex_);
        open_ = true;
        changed_.notify_all();
    }
    void wait_for(int begun) {
        std::unique_lock<std::mutex> lock(mutex_);
        REQUIRE(changed_.wait_for(lock, 10s, [&] { return begun_ >= begun; }));
    }
    int begun() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return begun_;
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int begun_ = 0;
    bool open_ = false;
};

}  // namespace

TEST_CASE("answers are for whoever asks for them, once, in any order") {
    const auto desk = make_desk({});
    std::vector<std::uint64_t> numbers;
    for (int index = 0; index < 12; ++index) numbers.push_back(number_of(*desk, index));
    for (int index = 11; index >= 0; --index) {
        const auto answer = desk->take(numbers[static_cast<std::size_t>(index)], in(10s));
        REQUIRE(answer);
        CHECK(answer->index == index);
    }
    CHECK(kind_thrown([&] { desk->take(numbers[3], in(1s)); }) == ErrorKind::closed);
}

TEST_CASE("several threads at once get their own answers") {
    const auto desk = make_desk({2, 4});
    std::atomic<int> right{0};
    std::vector<std::thread> threads;
    for (int which = 0; which < 4; ++which) {
        threads.emplace_back([&desk, &right, which] {
            for (int round = 0; round < 300; ++round) {
                const int index = 1000 * which + round;
                const auto submitted = hand_over(*desk, index);
                std::optional<edgedistill::Prediction> answer;
                while (submitted && !answer) answer = desk->take(submitted->number, in(1ms));
                right += answer && answer->index == index ? 1 : 0;
            }
        });
    }
    for (auto& thread : threads) thread.join();
    CHECK(right == 1200);
}

TEST_CASE("nobody waits beyond the deadline") {
    Gate gate;
    const auto desk = make_desk({1, 2}, std::ref(gate));
    const auto first = number_of(*desk, 0);
    number_of(*desk, 1);
    CHECK_FALSE(hand_over(*desk, 2, in(5ms)));
    CHECK_FALSE(desk->take(first, in(5ms)));
    CHECK_FALSE(desk->take(first, in(0ms)));
    auto waiting = std::async(std::launch::async, [&] { return desk->take(first, in(10s)); });
    CHECK_FALSE(desk->take(first, in(5ms)));  // beside the one who waits for the pool
    gate.open();
    CHECK(waiting.get()->index == 0);
}

TEST_CASE("an image that was given up for another is named, and whoever waits for it is told") {
    Gate gate;
    const auto desk = make_desk({1, 2, Policy::drop_oldest}, std::ref(gate));
    CHECK_FALSE(hand_over(*desk, 0)->dropped);
    gate.wait_for(1);
    const auto second = number_of(*desk, 1);
    auto waiting = std::async(std::launch::async, [&] { return kind_thrown([&] { desk->take(second, in(10s)); }); });
    std::this_thread::sleep_for(10ms);
    auto memory = std::make_shared<int>(1);
    const auto third = hand_over(*desk, 2, in(10s), memory);
    CHECK(third->dropped == second);
    const auto fourth = hand_over(*desk, 3);
    CHECK(fourth->dropped == third->number);
    CHECK(memory.use_count() == 1);
    gate.open();
    CHECK(waiting.get() == ErrorKind::closed);
    CHECK(desk->take(fourth->number, in(10s))->index == 3);
    CHECK(desk->dropped() == 2);
}

TEST_CASE("what is forgotten is not begun, and its memory is let go") {
    Gate gate;
    const auto desk = make_desk({1, 4}, std::ref(gate));
    const auto memory = std::make_shared<int>(1);
    std::vector<std::uint64_t> numbers;
    for (int index = 0; index < 4; ++index) numbers.push_back(number_of(*desk, index, memory));
    gate.wait_for(1);
    CHECK(memory.use_count() == 5);
    for (const int which : {0, 2, 3}) desk->forget(numbers[static_cast<std::size_t>(which)]);
    desk->forget(12345);
    CHECK(memory.use_count() == 3);
    const auto last = number_of(*desk, 9);
    gate.open();
    CHECK(desk->take(numbers[1], in(10s))->index == 1);
    CHECK(desk->take(last, in(10s))->index == 9);
    CHECK(gate.begun() == 3);
    CHECK(memory.use_count() == 1);
}

TEST_CASE("what goes wrong is thrown at its image alone") {
    const auto desk = make_desk({}, [](const std::string& name) {
        if (name == "1") throw Error(ErrorKind::model, "the network failed");
        if (name == "2") throw std::runtime_error("a bug");
    });
    std::vector<std::uint64_t> numbers;
    for (int index = 0; index < 4; ++index) numbers.push_back(number_of(*desk, index));
    CHECK(desk->take(numbers[3], in(10s))->index == 3);
    CHECK(kind_thrown([&] { desk->take(numbers[1], in(10s)); }) == ErrorKind::model);
    CHECK_THROWS_WITH(desk->take(numbers[2], in(10s)), "a bug");
    CHECK(desk->take(numbers[0], in(10s))->index == 0);
}

TEST_CASE("closing ends every wait") {
    Gate gate;
    const auto desk = make_desk({1, 2}, std::ref(gate));
    const auto first = number_of(*desk, 0);
    const auto second = number_of(*desk, 1);
    gate.wait_for(1);
    std::vector<std::future<std::optional<ErrorKind>>> waiting;
    for (const auto number : {first, second}) {
        waiting.push_back(std::async(std::launch::async,
                                     [&desk, number] { return kind_thrown([&] { desk->take(number, in(10s)); }); }));
    }
    waiting.push_back(std::async(std::launch::async, [&] { return kind_thrown([&] { hand_over(*desk, 2); }); }));
    std::this_thread::sleep_for(10ms);
    auto closing = std::async(std::launch::async, [&] { desk->close(); });
    std::this_thread::sleep_for(10ms);
    gate.open();
    closing.get();
    for (auto& one : waiting) CHECK(one.get() == ErrorKind::closed);
    desk->close();
    CHECK(kind_thrown([&] { hand_over(*desk, 3); }) == ErrorKind::closed);
}
