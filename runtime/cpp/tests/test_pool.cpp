// Order, bounds, errors and endings of the engine's pool, with answers that need no network.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <edgedistill/error.hpp>
#include <functional>
#include <future>
#include <iterator>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pool.hpp"

namespace {

using namespace std::chrono_literals;
using edgedistill::Error;
using edgedistill::ErrorKind;
using edgedistill::Policy;
using edgedistill::Prediction;
using edgedistill::detail::Frame;
using edgedistill::detail::Pool;
using edgedistill::detail::PoolSettings;
using edgedistill::detail::Submission;
using edgedistill::detail::Task;

using PoolPointer = std::shared_ptr<Pool>;

// "7" is answered with index 7.
void answer_number(const Frame& frame, Prediction& out) {
    out.name = frame.name;
    out.index = std::stoi(frame.name);
    out.error.clear();
}

// Of a network without stages.
using Plain = std::function<void(const Frame* const* frames, std::size_t count, Prediction* out)>;

Plain answering(const std::function<void(const Frame&)>& before) {
    return [before](const Frame* const* frames, std::size_t count, Prediction* out) {
        for (std::size_t i = 0; i < count; ++i) {
            before(*frames[i]);
            answer_number(*frames[i], out[i]);
        }
    };
}

struct Shape {
    std::size_t workers = 2;
    std::size_t batch = 1;
    std::size_t capacity = 9;
    Policy policy = Policy::block;
    std::function<void(const Prediction&)> callback = {};
};

PoolPointer make_pool(const Shape& shape, std::size_t later_batch, std::vector<Pool::Make> makers) {
    PoolSettings settings;
    settings.capacity = shape.capacity;
    settings.batches = {shape.batch};
    if (later_batch > 0) settings.batches.push_back(later_batch);
    settings.pixel_bytes = later_batch > 0 ? 3 : 0;
    settings.policy = shape.policy;
    settings.callback = shape.callback;
    auto pool = std::make_shared<Pool>(std::move(settings));
    pool->start(std::move(makers));
    return pool;
}

PoolPointer make_staged_pool(const Shape& shape, std::size_t later_batch, const Pool::Answer& answer) {
    return make_pool(shape, later_batch, std::vector<Pool::Make>(shape.workers, [answer] { return answer; }));
}

// An answer of the one stage that there is.
Pool::Answer in_one_stage(const Plain& answer) {
    return [answer](std::size_t, Task* const* tasks, std::size_t count) {
        std::vector<const Frame*> frames;
        for (std::size_t i = 0; i < count; ++i) frames.push_back(tasks[i]->frame);
        std::vector<Prediction> out(count);
        answer(frames.data(), count, out.data());
        for (std::size_t i = 0; i < count; ++i) *tasks[i]->answer = out[i];
    };
}

PoolPointer make_pool(const Shape& shape, const Plain& answer) {
    return make_staged_pool(shape, 0, in_one_stage(answer));
}

PoolPointer make_pool(
    const Shape& shape, const std::function<void(const Frame&)>& before = [](const Frame&) {}) {
    return make_pool(shape, answering(before));
}

bool submit(Pool& pool, int number, edgedistill::Engine::Timeout timeout = {}) {
    Submission image;
    image.data = edgedistill::Bytes{};
    image.name = std::to_string(number);
    image.user = static_cast<std::uint64_t>(number);
    return pool.submit(image, timeout);
}

std::vector<int> drain(Pool& pool) {
    std::vector<int> numbers;
    Prediction answer;
    while (pool.next(answer)) numbers.push_back(answer.index);
    return numbers;
}

// What answers hold, in order; `failed` is called in the handler of what `next` throws, with whose it was.
template <class Failed>
std::vector<int> take_all(Pool& pool, Failed failed) {
    std::vector<int> numbers;
    Prediction answer;
    std::uint64_t user = 0;
    for (bool more = true; more;) {
        try {
            more = pool.next(answer, &user);
            if (more) numbers.push_back(answer.index);
        } catch (...) {
            failed(user, answer.name);
        }
    }
    return numbers;
}

std::vector<int> range(int from, int to) {
    std::vector<int> numbers;
    for (int number = from; number < to; ++number) numbers.push_back(number);
    return numbers;
}

void sleep_a_little() {
    thread_local std::mt19937 random(std::random_device{}());
    const auto length = std::uniform_int_distribution<int>(0, 200)(random);
    if (length > 20) std::this_thread::sleep_for(std::chrono::microseconds(length));
}

bool eventually(const std::function<bool()>& promise) {
    for (int tries = 0; tries < 5000; ++tries) {
        if (promise()) return true;
        std::this_thread::sleep_for(2ms);
    }
    return false;
}

// Holds every worker at its image until it is opened.
class Gate {
public:
    void operator()(const Frame&) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++begun_;
        changed_.wait(lock, [this] { return open_; });
    }
    void open() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            open_ = true;
        }
        changed_.notify_all();
    }
    int begun() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return begun_;
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool open_ = false;
    int begun_ = 0;
};

template <class Call>
ErrorKind kind_thrown(const Call& call) {
    try {
        call();
    } catch (const Error& error) {
        return error.kind();
    }
    FAIL("nothing was thrown");
    return ErrorKind::usage;
}

}  // namespace

TEST_CASE("answers come in the order of the submissions whatever each takes") {
    for (const std::size_t batch : {1U, 4U}) {
        for (const std::size_t workers : {1U, 2U, 5U}) {
            const auto pool =
                make_pool({workers, batch, 4 * workers * batch + 1}, [](const Frame&) { sleep_a_little(); });
            std::thread producer([&] {
                for (int number = 0; number < 500; ++number) submit(*pool, number);
                pool->finish();
            });
            const auto numbers = drain(*pool);
            producer.join();
            CHECK(numbers == range(0, 500));
            CHECK(pool->dropped() == 0);
            pool->close();
        }
    }
}

TEST_CASE("a batch takes what is there and no more than its size") {
    Gate gate;
    std::mutex mutex;
    std::vector<std::size_t> sizes;
    const auto pool = make_pool({1, 3, 20}, [&](const Frame* const* frames, std::size_t count, Prediction* out) {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            sizes.push_back(count);
        }
        gate(*frames[0]);
        for (std::size_t i = 0; i < count; ++i) answer_number(*frames[i], out[i]);
    });
    submit(*pool, 0);
    REQUIRE(eventually([&] { return gate.begun() == 1; }));
    for (int number = 1; number < 9; ++number) submit(*pool, number);
    gate.open();
    pool->finish();
    CHECK(drain(*pool) == range(0, 9));
    CHECK(sizes == std::vector<std::size_t>{1, 3, 3, 2});
    pool->close();
}

TEST_CASE("a full pool makes submit wait until an answer was taken") {
    Gate gate;
    const auto pool = make_pool({1, 1, 3}, std::ref(gate));
    for (int number = 0; number < 3; ++number) CHECK(submit(*pool, number, 1s));
    CHECK_FALSE(submit(*pool, 3, 20ms));
    CHECK_FALSE(submit(*pool, 3, 0ms));
    CHECK_FALSE(submit(*pool, 3, -5ms));
    gate.open();
    CHECK_FALSE(submit(*pool, 3, 20ms));  // answered, but not taken
    Prediction answer;
    CHECK(pool->next(answer));
    CHECK(answer.index == 0);
    CHECK(submit(*pool, 4, std::chrono::milliseconds::max()));
    auto waiting = std::async(std::launch::async, [&] { return submit(*pool, 5); });
    CHECK(waiting.wait_for(20ms) == std::future_status::timeout);
    CHECK(pool->next(answer));
    CHECK(waiting.get());
    pool->finish();
    CHECK(drain(*pool) == std::vector<int>{2, 4, 5});
    pool->close();
}

TEST_CASE("never more images are held than the capacity") {
    std::atomic<int> submitted{0};
    std::atomic<int> taken{0};
    const auto pool = make_pool({2, 1, 5});
    std::vector<std::thread> producers;
    for (int which = 0; which < 3; ++which) {
        producers.emplace_back([&] {
            for (int number = 0; number < 300; ++number) {
                submit(*pool, number);
                ++submitted;
            }
        });
    }
    Prediction answer;
    int most = 0;
    for (int number = 0; number < 900; ++number) {
        most = std::max(most, submitted.load() - taken.load());
        REQUIRE(pool->next(answer));
        ++taken;
        if (number % 50 == 0) std::this_thread::sleep_for(1ms);
    }
    for (auto& producer : producers) producer.join();
    CHECK(most <= 5 + 1);  // `taken` is counted after the room is there
    pool->close();
}

TEST_CASE("a blocked producer goes on although nobody takes any more than one answer") {
    const auto pool = make_pool({2, 1, 9});
    for (int round = 0; round < 200; ++round) {
        while (submit(*pool, round, 0ms)) continue;
        auto blocked = std::async(std::launch::async, [&] { return submit(*pool, round, 5s); });
        Prediction answer;
        CHECK(pool->next(answer));
        CHECK(blocked.get());
    }
    pool->close();
}

TEST_CASE("a camera loses the oldest that nobody began and keeps the newest") {
    Gate gate;
    const auto pool = make_pool({2, 1, 5, Policy::drop_oldest}, std::ref(gate));
    for (int number = 0; number < 2; ++number) submit(*pool, number);
    REQUIRE(eventually([&] { return gate.begun() == 2; }));
    for (int number = 2; number < 100; ++number) CHECK(submit(*pool, number));
    CHECK(pool->dropped() == 95);
    gate.open();
    pool->finish();
    CHECK(drain(*pool) == std::vector<int>{0, 1, 97, 98, 99});
    pool->close();
}

TEST_CASE("answers that nobody takes are dropped too") {
    std::atomic<int> answered{0};
    const auto pool = make_pool({1, 1, 3, Policy::drop_oldest}, [&](const Frame&) { ++answered; });
    for (int number = 0; number < 20; ++number) {
        submit(*pool, number);
        REQUIRE(eventually([&] { return answered == number + 1; }));
        std::this_thread::sleep_for(1ms);  // until the worker handed it back
    }
    pool->finish();
    const auto numbers = drain(*pool);
    CHECK(numbers.size() + pool->dropped() == 20);
    CHECK(numbers.back() == 19);
    CHECK(std::is_sorted(numbers.begin(), numbers.end()));
    pool->close();
}

TEST_CASE("a waiting consumer survives the drop of its image") {
    Gate gate;
    const auto pool = make_pool({1, 1, 2, Policy::drop_oldest}, std::ref(gate));
    auto taken = std::async(std::launch::async, [&] { return drain(*pool); });
    submit(*pool, 0);
    REQUIRE(eventually([&] { return gate.begun() == 1; }));
    for (int number = 1; number < 50; ++number) submit(*pool, number);
    gate.open();
    pool->finish();
    CHECK(taken.get() == std::vector<int>{0, 49});
    pool->close();
}

TEST_CASE("what is dropped, answered and taken add up under pressure from all sides") {
    const auto pool = make_pool({3, 2, 8, Policy::drop_oldest}, [](const Frame&) { sleep_a_little(); });
    std::atomic<int> taken{0};
    std::vector<std::thread> threads;
    for (int which = 0; which < 2; ++which) {
        threads.emplace_back([&] { taken += static_cast<int>(drain(*pool).size()); });
    }
    std::vector<std::thread> producers;
    for (int which = 0; which < 3; ++which) {
        producers.emplace_back([&] {
            for (int number = 0; number < 1000; ++number) {
                submit(*pool, number);
                if (number % 8 == 0) sleep_a_little();
            }
        });
    }
    for (auto& producer : producers) producer.join();
    pool->finish();
    for (auto& thread : threads) thread.join();
    CHECK(static_cast<int>(pool->dropped()) + taken == 3000);
    pool->close();
}

TEST_CASE("several producers and consumers lose and double nothing, and each producer's order stays") {
    const auto pool = make_pool({2, 2, 9}, [](const Frame&) { sleep_a_little(); });
    std::vector<std::thread> producers;
    for (int which = 0; which < 3; ++which) {
        producers.emplace_back([&, which] {
            for (int number = 0; number < 200; ++number) submit(*pool, 1000 * which + number);
        });
    }
    std::vector<std::future<std::vector<int>>> consumers;
    for (int which = 0; which < 3; ++which) {
        consumers.push_back(std::async(std::launch::async, [&] { return drain(*pool); }));
    }
    for (auto& producer : producers) producer.join();
    pool->finish();
    std::multiset<int> all;
    for (auto& consumer : consumers) {
        const auto numbers = consumer.get();
        all.insert(numbers.begin(), numbers.end());
        for (int which = 0; which < 3; ++which) {
            std::vector<int> own;
            std::copy_if(numbers.begin(), numbers.end(), std::back_inserter(own),
                         [&](int number) { return number / 1000 == which; });
            CHECK(std::is_sorted(own.begin(), own.end()));
        }
    }
    CHECK(all.size() == 600);
    CHECK(std::set<int>(all.begin(), all.end()).size() == 600);
    pool->close();
}

TEST_CASE("what a worker throws reaches whoever takes that answer, and the rest goes on") {
    const auto pool = make_pool({2, 1, 9}, [](const Frame& frame) {
        if (frame.name == "7") throw Error(ErrorKind::model, "the network failed");
        if (frame.name == "9") throw std::runtime_error("a bug");
        if (frame.name == "11") throw 3;
    });
    std::thread producer([&] {
        for (int number = 0; number < 30; ++number) submit(*pool, number);
        pool->finish();
    });
    std::vector<std::string> errors;
    const auto numbers = take_all(*pool, [&](std::uint64_t user, const std::string& name) {
        try {
            throw;
        } catch (const Error& error) {
            CHECK(error.kind() == ErrorKind::model);
            errors.push_back(std::to_string(user) + name + ' ' + error.what());
        } catch (const std::exception& error) {
            errors.push_back(std::to_string(user) + ' ' + error.what());
        } catch (int thrown) {
            errors.push_back(std::to_string(user) + ' ' + std::to_string(thrown));
        }
    });
    producer.join();
    CHECK(numbers.size() == 27);
    CHECK(errors == std::vector<std::string>{"77 the network failed", "9 a bug", "11 3"});
    pool->close();
}

TEST_CASE("after a failure its slot answers other images without a trace of it") {
    const auto pool = make_pool({1, 1, 2}, [](const Frame& frame) {
        if (frame.name == "0") throw Error(ErrorKind::model, "the network failed");
    });
    submit(*pool, 0);
    Prediction answer;
    CHECK(kind_thrown([&] { pool->next(answer); }) == ErrorKind::model);
    for (int number = 1; number < 10; ++number) {
        submit(*pool, number);
        CHECK(pool->next(answer));
        CHECK(answer.index == number);
    }
    pool->close();
}

TEST_CASE("nothing can be submitted after finish, and what was is answered") {
    const auto pool = make_pool({2, 1, 9}, [](const Frame&) { std::this_thread::sleep_for(1ms); });
    for (int number = 0; number < 9; ++number) submit(*pool, number);
    pool->finish();
    pool->finish();
    CHECK(kind_thrown([&] { submit(*pool, 9); }) == ErrorKind::closed);
    CHECK(drain(*pool) == range(0, 9));
    Prediction answer;
    CHECK_FALSE(pool->next(answer));
    pool->close();
    CHECK_FALSE(pool->next(answer));
}

TEST_CASE("finish wakes consumers that wait for nothing and producers that wait for room") {
    Gate gate;
    const auto pool = make_pool({1, 1, 2}, std::ref(gate));
    submit(*pool, 0);
    submit(*pool, 1);
    auto producer = std::async(std::launch::async, [&] { return kind_thrown([&] { submit(*pool, 2); }); });
    std::this_thread::sleep_for(20ms);
    pool->finish();
    CHECK(producer.get() == ErrorKind::closed);
    gate.open();
    CHECK(drain(*pool) == range(0, 2));
    pool->close();

    const auto empty = make_pool({1, 1, 2});
    std::vector<std::future<std::vector<int>>> consumers;
    for (int which = 0; which < 3; ++which) {
        consumers.push_back(std::async(std::launch::async, [&] { return drain(*empty); }));
    }
    std::this_thread::sleep_for(20ms);
    empty->finish();
    for (auto& consumer : consumers) CHECK(consumer.get().empty());
    empty->close();
}

TEST_CASE("close finishes what is in work, abandons what waits and ends everybody's calls") {
    Gate gate;
    std::atomic<int> begun{0};
    std::atomic<int> done{0};
    const auto pool = make_pool({2, 1, 5}, [&](const Frame* const* frames, std::size_t, Prediction* out) {
        ++begun;
        gate(*frames[0]);
        answer_number(*frames[0], *out);
        ++done;
    });
    const auto kept = std::make_shared<int>(1);
    for (int number = 0; number < 5; ++number) {
        Submission image;
        image.data = edgedistill::Bytes{};
        image.name = std::to_string(number);
        image.keep_alive = kept;
        pool->submit(image, {});
    }
    REQUIRE(eventually([&] { return begun == 2; }));
    auto producer = std::async(std::launch::async, [&] { return kind_thrown([&] { submit(*pool, 5); }); });
    auto consumer = std::async(std::launch::async, [&] { return drain(*pool); });
    std::this_thread::sleep_for(20ms);
    auto closer = std::async(std::launch::async, [&] { pool->close(); });
    CHECK(producer.get() == ErrorKind::closed);
    CHECK(consumer.get().empty());
    CHECK(closer.wait_for(10ms) == std::future_status::timeout);
    gate.open();
    closer.get();
    pool->close();
    CHECK(begun == 2);
    CHECK(done == 2);
    CHECK(kept.use_count() == 1);
    Prediction answer;
    CHECK_FALSE(pool->next(answer));
    CHECK(kind_thrown([&] { submit(*pool, 1); }) == ErrorKind::closed);
}

TEST_CASE("close at any moment, from any thread, ends all calls") {
    std::mt19937 random(5);
    for (int round = 0; round < 200; ++round) {
        Shape shape;
        shape.workers = 1 + static_cast<std::size_t>(random() % 3);
        shape.batch = 1 + static_cast<std::size_t>(random() % 2);
        shape.capacity = shape.workers * shape.batch + 1 + random() % 4;
        shape.policy = random() % 2 == 0 ? Policy::block : Policy::drop_oldest;
        std::atomic<int> delivered{0};
        const bool by_callback = random() % 3 == 0;
        if (by_callback) shape.callback = [&](const Prediction&) { ++delivered; };
        const auto moment = std::chrono::microseconds(random() % 1500);
        auto pool = make_pool(shape, [](const Frame&) { sleep_a_little(); });
        std::vector<std::thread> threads;
        for (int which = 0; which < 2; ++which) {
            threads.emplace_back([pool] {
                try {
                    for (int number = 0; number < 100000; ++number) submit(*pool, number);
                } catch (const Error&) {
                }
            });
            if (!by_callback) threads.emplace_back([pool] { drain(*pool); });
        }
        if (round % 4 == 0) threads.emplace_back([pool] { pool->finish(); });
        for (int which = 0; which < 2; ++which) {
            threads.emplace_back([pool, moment] {
                std::this_thread::sleep_for(moment);
                pool->close();
            });
        }
        pool.reset();  // whoever is inside keeps it
        for (auto& thread : threads) thread.join();
    }
}

TEST_CASE("a callback gets every answer in order, one at a time, and finish waits for the last") {
    for (const std::size_t batch : {1U, 3U}) {
        std::vector<int> numbers;
        std::atomic<int> inside{0};
        bool alone = true;
        Shape shape{3, batch, 4 * 3 * batch + 1};
        shape.callback = [&](const Prediction& answer) {
            alone = alone && ++inside == 1;
            numbers.push_back(answer.index);
            if (answer.index % 7 == 0) sleep_a_little();
            --inside;
        };
        const auto pool = make_pool(shape, [](const Frame&) { sleep_a_little(); });
        for (int number = 0; number < 400; ++number) submit(*pool, number);
        pool->finish();
        CHECK(numbers == range(0, 400));
        CHECK(alone);
        Prediction answer;
        CHECK(kind_thrown([&] { pool->next(answer); }) == ErrorKind::usage);
        pool->close();
    }
}

TEST_CASE("a slow callback holds producers back") {
    std::atomic<int> delivered{0};
    Shape shape{2, 1, 4};
    shape.callback = [&](const Prediction&) {
        std::this_thread::sleep_for(1ms);
        ++delivered;
    };
    const auto pool = make_pool(shape);
    int most = 0;
    for (int number = 0; number < 60; ++number) {
        submit(*pool, number);
        most = std::max(most, number + 1 - delivered);
    }
    pool->finish();
    CHECK(delivered == 60);
    CHECK(most <= 4);
    pool->close();
}

TEST_CASE("a failing network reaches the callback as an answer with an error") {
    std::vector<std::string> errors;
    Shape shape;
    shape.callback = [&](const Prediction& answer) { errors.push_back(answer.name + ": " + answer.error); };
    const auto pool = make_pool(shape, [](const Frame& frame) {
        if (frame.name == "1") throw Error(ErrorKind::model, "the network failed");
    });
    for (int number = 0; number < 3; ++number) submit(*pool, number);
    pool->finish();
    CHECK(errors == std::vector<std::string>{"0: ", "1: the network failed", "2: "});
    pool->close();
}

TEST_CASE("what was begun is delivered before close returns, and nothing after it") {
    Gate gate;
    std::vector<int> numbers;
    Shape shape{2, 1, 5};
    shape.callback = [&](const Prediction& answer) { numbers.push_back(answer.index); };
    const auto pool = make_pool(shape, std::ref(gate));
    for (int number = 0; number < 5; ++number) submit(*pool, number);
    REQUIRE(eventually([&] { return gate.begun() == 2; }));
    auto finisher = std::async(std::launch::async, [&] { pool->finish(); });
    auto closer = std::async(std::launch::async, [&] { pool->close(); });
    finisher.get();
    std::this_thread::sleep_for(5ms);
    gate.open();
    closer.get();
    CHECK(numbers == range(0, 2));
}

TEST_CASE("borrowed memory is let go as soon as the image is answered, dropped or refused") {
    Gate gate;
    const auto pool = make_pool({1, 1, 2, Policy::drop_oldest}, std::ref(gate));
    std::vector<std::weak_ptr<int>> memory;
    const auto hand_over = [&] {
        Submission image;
        auto kept = std::make_shared<int>(0);
        memory.push_back(kept);
        image.data = edgedistill::Bytes{};
        image.name = "1";
        image.keep_alive = std::move(kept);
        pool->submit(image, {});
    };
    hand_over();
    REQUIRE(eventually([&] { return gate.begun() == 1; }));
    hand_over();
    hand_over();
    CHECK_FALSE(memory[0].expired());
    CHECK(memory[1].expired());
    CHECK_FALSE(memory[2].expired());
    gate.open();
    CHECK(eventually([&] { return memory[0].expired() && memory[2].expired(); }));
    pool->close();
    CHECK(kind_thrown(hand_over) == ErrorKind::closed);
    CHECK(memory[3].expired());
}

TEST_CASE("a path is its image's name, and the caller's number comes back") {
    const auto pool = make_pool({1, 1, 3}, [](const Frame* const* frames, std::size_t, Prediction* out) {
        out->name = frames[0]->name;
        out->index = std::holds_alternative<std::filesystem::path>(frames[0]->data) ? 1 : 0;
    });
    Submission image;
    image.data = std::filesystem::path("folder/photo.jpg");
    image.user = 77;
    pool->submit(image, {});
    Prediction answer;
    std::uint64_t user = 0;
    CHECK(pool->next(answer, &user));
    CHECK(answer.name == "folder/photo.jpg");
    CHECK(answer.index == 1);
    CHECK(user == 77);
    pool->close();
}

TEST_CASE("images are answered while another worker is still starting") {
    std::promise<void> may_start;
    const auto answer = in_one_stage(answering([](const Frame&) {}));
    const auto pool = make_pool({}, 0,
                                {[&] { return answer; },
                                 [&, started = may_start.get_future().share()] {
                                     started.wait();
                                     return answer;
                                 }});
    for (int number = 0; number < 5; ++number) submit(*pool, number);
    Prediction taken;
    for (int number = 0; number < 5; ++number) {
        REQUIRE(pool->next(taken));
        CHECK(taken.index == number);
    }
    auto ready = std::async(std::launch::async, [&] { pool->wait_until_ready(); });
    CHECK(ready.wait_for(20ms) == std::future_status::timeout);
    may_start.set_value();
    ready.get();
    for (int number = 0; number < 50; ++number) {
        submit(*pool, number);
        CHECK(pool->next(taken));
    }
    pool->close();
    CHECK(kind_thrown([&] { pool->wait_until_ready(); }) == ErrorKind::closed);
}

TEST_CASE("a worker that cannot start fails the pool, and no image is left without an answer") {
    Gate gate;
    std::promise<void> may_fail;
    const Shape shape{2, 1, 4};
    const auto pool = make_pool(shape, 0,
                                {[&] { return in_one_stage(answering(std::ref(gate))); },
                                 [&, told = may_fail.get_future().share()]() -> Pool::Answer {
                                     told.wait();
                                     throw Error(ErrorKind::model, "no memory for a second network");
                                 }});
    for (int number = 0; number < 4; ++number) submit(*pool, number);
    REQUIRE(eventually([&] { return gate.begun() == 1; }));
    auto producer = std::async(std::launch::async, [&] { return kind_thrown([&] { submit(*pool, 4); }); });
    std::this_thread::sleep_for(5ms);
    may_fail.set_value();
    CHECK(producer.get() == ErrorKind::model);
    CHECK(kind_thrown([&] { submit(*pool, 5); }) == ErrorKind::model);
    CHECK(kind_thrown([&] { pool->wait_until_ready(); }) == ErrorKind::model);
    std::this_thread::sleep_for(5ms);  // the failed worker takes what waits
    gate.open();
    Prediction taken;
    REQUIRE(pool->next(taken));
    CHECK(taken.index == 0);
    for (int number = 1; number < 4; ++number) CHECK(kind_thrown([&] { pool->next(taken); }) == ErrorKind::model);
    pool->finish();
    CHECK_FALSE(pool->next(taken));
}

TEST_CASE("a callback is told of a worker that could not start") {
    std::vector<std::string> errors;
    Shape shape{1, 1, 3};
    shape.callback = [&](const Prediction& answer) { errors.push_back(answer.error); };
    std::promise<void> may_fail;
    const auto pool = make_pool(shape, 0, {[&, told = may_fail.get_future().share()]() -> Pool::Answer {
                                    told.wait();
                                    throw Error(ErrorKind::model, "no second network");
                                }});
    submit(*pool, 0);
    submit(*pool, 1);
    may_fail.set_value();
    pool->finish();
    CHECK(errors == std::vector<std::string>(2, "no second network"));
}

TEST_CASE("close waits for a worker that starts, and wakes who waits for it") {
    Gate starting;
    const auto answer = in_one_stage(answering([](const Frame&) {}));
    const auto pool = make_pool({}, 0,
                                {[&] { return answer; },
                                 [&] {
                                     starting({});
                                     return answer;
                                 }});
    REQUIRE(eventually([&] { return starting.begun() == 1; }));
    submit(*pool, 0);
    auto waiting = std::async(std::launch::async, [&] { return kind_thrown([&] { pool->wait_until_ready(); }); });
    auto closing = std::async(std::launch::async, [&] { pool->close(); });
    CHECK(waiting.get() == ErrorKind::closed);
    CHECK(closing.wait_for(5ms) == std::future_status::timeout);
    starting.open();
    closing.get();
}

// ---- stages ----

namespace {

// What a cascade of two did: for each call, its stage and the numbers that it got.
struct Calls {
    struct Call {
        std::size_t stage;
        std::vector<int> numbers;
        bool operator==(const Call& other) const { return stage == other.stage && numbers == other.numbers; }
    };
    void add(std::size_t stage, Task* const* tasks, std::size_t count) {
        Call call{stage, {}};
        for (std::size_t i = 0; i < count; ++i) call.numbers.push_back(std::stoi(tasks[i]->frame->name));
        const std::lock_guard<std::mutex> lock(mutex);
        all.push_back(call);
    }
    std::vector<Call> of_stage(std::size_t stage) const {
        std::vector<Call> found;
        std::copy_if(all.begin(), all.end(), std::back_inserter(found),
                     [&](const Call& call) { return call.stage == stage; });
        return found;
    }
    std::mutex mutex;
    std::vector<Call> all;
};

// Stage 0 passes on what `unsure` says, with the number in its pixels; the answer's stage is the one that gave it.
Pool::Answer cascading(
    Calls& calls, const std::function<bool(int)>& unsure,
    const std::function<void(std::size_t, const Frame&)>& before = [](std::size_t, const Frame&) {}) {
    return [&calls, unsure, before](std::size_t stage, Task* const* tasks, std::size_t count) {
        calls.add(stage, tasks, count);
        for (std::size_t i = 0; i < count; ++i) {
            Task& task = *tasks[i];
            before(stage, *task.frame);
            answer_number(*task.frame, *task.answer);
            const int number = task.answer->index;
            if (stage == 1 && (task.pixels[0] | task.pixels[1] << 8) != number) throw std::runtime_error("pixels");
            task.answer->stage = static_cast<int>(stage);
            task.passed_on = stage == 0 && unsure(number);
            if (!task.passed_on) continue;
            if (task.pixels.size() != 3) throw std::runtime_error("no memory for pixels");
            task.pixels[0] = static_cast<std::uint8_t>(number & 255);
            task.pixels[1] = static_cast<std::uint8_t>(number >> 8);
        }
    };
}

bool every_tenth(int number) {
    return number % 10 == 3;
}

// Lets stage 0 go on with an image once that is allowed.
class Turnstile {
public:
    void operator()(std::size_t stage, const Frame& frame) {
        if (stage > 0) return;
        const int number = std::stoi(frame.name);
        std::unique_lock<std::mutex> lock(mutex_);
        begun_ = std::max(begun_, number);
        changed_.wait(lock, [&] { return number <= allowed_; });
    }
    void allow(int number) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            allowed_ = number;
        }
        changed_.notify_all();
    }
    bool has_begun(int number) {
        return eventually([&] {
            const std::lock_guard<std::mutex> lock(mutex_);
            return begun_ >= number;
        });
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int allowed_ = -1;
    int begun_ = -1;
};

}  // namespace

TEST_CASE("what is passed on is answered in batches, and all images in order") {
    for (const std::size_t workers : {1U, 2U, 5U}) {
        for (const std::size_t later_batch : {1U, 3U, 8U}) {
            for (const int share : {1, 4, 97}) {
                Calls calls;
                const auto pool = make_staged_pool({workers, 4, 20 * workers}, later_batch,
                                                   cascading(
                                                       calls, [share](int number) { return number % share == 0; },
                                                       [](std::size_t, const Frame&) { sleep_a_little(); }));
                std::thread producer([&] {
                    for (int number = 0; number < 400; ++number) submit(*pool, number);
                    pool->finish();
                });
                Prediction answer;
                for (int number = 0; number < 400; ++number) {
                    REQUIRE(pool->next(answer));
                    REQUIRE(answer.index == number);
                    REQUIRE(answer.stage == (number % share == 0 ? 1 : 0));
                }
                CHECK_FALSE(pool->next(answer));
                producer.join();
                for (const auto& call : calls.of_stage(1)) CHECK(call.numbers.size() <= later_batch);
                pool->close();
            }
        }
    }
}

TEST_CASE("a later stage's batch is filled while there is more to begin, and answered half full at the end") {
    Calls calls;
    Turnstile turnstile;
    const auto pool = make_staged_pool({1, 4, 64}, 4,
                                       cascading(
                                           calls, [](int number) { return number % 4 == 0; }, std::ref(turnstile)));
    submit(*pool, 0);
    REQUIRE(turnstile.has_begun(0));
    for (int number = 1; number < 38; ++number) submit(*pool, number);
    pool->finish();
    turnstile.allow(100);
    CHECK(drain(*pool) == range(0, 38));
    const std::vector<Calls::Call> expected = {{1, {0, 4, 8, 12}}, {1, {16, 20, 24, 28}}, {1, {32, 36}}};
    CHECK(calls.of_stage(1) == expected);
    pool->close();
}

TEST_CASE("an idle pool keeps nothing waiting for a batch") {
    Calls calls;
    const auto pool = make_staged_pool({2, 2, 33}, 8, cascading(calls, [](int) { return true; }));
    Prediction answer;
    for (int number = 0; number < 20; ++number) {
        submit(*pool, number);
        REQUIRE(pool->next(answer));  // although nobody finishes
        CHECK(answer.index == number);
        CHECK(answer.stage == 1);
    }
    pool->close();
}

TEST_CASE("one image that waits for a batch does not hold the whole queue up") {
    Calls calls;
    Turnstile turnstile;
    const auto pool = make_staged_pool({1, 1, 9}, 8,
                                       cascading(
                                           calls, [](int number) { return number == 0; }, std::ref(turnstile)));
    for (int number = 0; number < 9; ++number) submit(*pool, number);
    turnstile.allow(100);
    pool->finish();
    CHECK(drain(*pool) == range(0, 9));
    REQUIRE(calls.all.size() == 10);
    CHECK(calls.all[7] == Calls::Call{1, {0}});  // two are left to begin
    pool->close();
}

TEST_CASE("what a later stage throws reaches just the images that it had") {
    Calls calls;
    const auto pool =
        make_staged_pool({2, 2, 40}, 2, cascading(calls, every_tenth, [](std::size_t stage, const Frame& frame) {
                             if (stage == 1 && frame.name == "13") throw std::runtime_error("13 failed");
                             if (stage == 0 && frame.name == "27") throw std::runtime_error("27 failed");
                         }));
    std::thread producer([&] {
        for (int number = 0; number < 60; ++number) submit(*pool, number);
        pool->finish();
    });
    std::set<std::uint64_t> failed;
    const auto numbers = take_all(*pool, [&](std::uint64_t user, const std::string&) {
        try {
            throw;
        } catch (const std::runtime_error&) {
            failed.insert(user);
        }
    });
    producer.join();
    CHECK(numbers.size() + failed.size() == 60);
    CHECK(std::is_sorted(numbers.begin(), numbers.end()));
    CHECK(failed.count(13) == 1);
    CHECK(failed.count(27) == 1);
    CHECK(failed.size() <= 4);  // each with at most one more in its batch
    pool->close();
}

TEST_CASE("a full camera queue may drop what waits for a later stage") {
    Calls calls;
    Turnstile turnstile;
    const auto pool = make_staged_pool({1, 2, 3, Policy::drop_oldest}, 8,
                                       cascading(
                                           calls, [](int number) { return number == 0; }, std::ref(turnstile)));
    submit(*pool, 0);
    REQUIRE(turnstile.has_begun(0));
    submit(*pool, 1);
    submit(*pool, 2);
    turnstile.allow(0);
    REQUIRE(turnstile.has_begun(1));  // with 2: nothing waits to be begun, and 0 waits for its batch
    submit(*pool, 3);
    CHECK(pool->dropped() == 1);
    submit(*pool, 4);
    CHECK(pool->dropped() == 2);
    turnstile.allow(100);
    pool->finish();
    CHECK(drain(*pool) == std::vector<int>{1, 2, 4});
    CHECK(calls.of_stage(1).empty());
    pool->close();
}

TEST_CASE("a full camera queue that workers have all in hand gives up nothing") {
    Calls calls;
    Turnstile turnstile;
    Gate gate;
    const auto pool = make_staged_pool({1, 4, 5, Policy::drop_oldest}, 8,
                                       cascading(
                                           calls, [](int number) { return number < 5; },
                                           [&](std::size_t stage, const Frame& frame) {
                                               turnstile(stage, frame);
                                               if (stage == 1) gate(frame);
                                           }));
    submit(*pool, 0);
    REQUIRE(turnstile.has_begun(0));
    for (int number = 1; number < 5; ++number) submit(*pool, number);
    turnstile.allow(100);
    REQUIRE(eventually([&] { return gate.begun() == 1; }));  // all five are in the later stage's hands
    CHECK(submit(*pool, 5));
    CHECK(pool->dropped() == 0);
    CHECK(submit(*pool, 6));
    CHECK(pool->dropped() == 1);
    gate.open();
    pool->finish();
    CHECK(drain(*pool) == std::vector<int>{0, 1, 2, 3, 4, 6});
    CHECK(calls.of_stage(1) == std::vector<Calls::Call>{{1, {0, 1, 2, 3, 4}}});
    pool->close();
}

TEST_CASE("a waiting consumer gets an answer that a drop brought to the front") {
    Calls calls;
    Turnstile turnstile;
    const auto pool = make_staged_pool({1, 3, 5, Policy::drop_oldest}, 8,
                                       cascading(
                                           calls, [](int number) { return number == 0; }, std::ref(turnstile)));
    Prediction answer;
    auto taken = std::async(std::launch::async, [&] { return pool->next(answer); });
    submit(*pool, 0);
    REQUIRE(turnstile.has_begun(0));
    submit(*pool, 1);
    turnstile.allow(0);
    REQUIRE(turnstile.has_begun(1));
    for (int number = 2; number < 5; ++number) submit(*pool, number);
    turnstile.allow(1);
    REQUIRE(turnstile.has_begun(2));  // with 3 and 4; 0 waits for its batch, and 1 is answered behind it
    CHECK(taken.wait_for(20ms) == std::future_status::timeout);
    submit(*pool, 5);
    CHECK(pool->dropped() == 1);
    CHECK(taken.wait_for(5s) == std::future_status::ready);
    turnstile.allow(100);
    CHECK(taken.get());
    CHECK(answer.index == 1);
    pool->finish();
    CHECK(drain(*pool) == range(2, 6));
    pool->close();
}

TEST_CASE("close abandons what waits for a later stage") {
    for (const bool by_callback : {false, true}) {
        Calls calls;
        Turnstile turnstile;
        std::vector<int> delivered;
        Shape shape{1, 1, 9};
        if (by_callback) shape.callback = [&](const Prediction& answer) { delivered.push_back(answer.index); };
        const auto pool = make_staged_pool(shape, 8,
                                           cascading(
                                               calls, [](int number) { return number == 1; }, std::ref(turnstile)));
        const auto kept = std::make_shared<int>(1);
        for (int number = 0; number < 5; ++number) {
            Submission image;
            image.data = edgedistill::Bytes{};
            image.name = std::to_string(number);
            image.keep_alive = kept;
            pool->submit(image, {});
        }
        turnstile.allow(1);
        REQUIRE(turnstile.has_begun(2));
        auto closer = std::async(std::launch::async, [&] { pool->close(); });
        CHECK(closer.wait_for(10ms) == std::future_status::timeout);
        turnstile.allow(100);
        closer.get();
        CHECK(kept.use_count() == 1);
        CHECK(calls.of_stage(1).empty());
        CHECK(delivered == (by_callback ? range(0, 1) : range(0, 0)));
    }
}

TEST_CASE("a callback gets a cascade's answers in order, and finish waits for the last") {
    Calls calls;
    std::vector<int> numbers;
    Shape shape{3, 2, 40};
    shape.callback = [&](const Prediction& answer) { numbers.push_back(answer.index); };
    const auto pool =
        make_staged_pool(shape, 4, cascading(calls, every_tenth, [](std::size_t, const Frame&) { sleep_a_little(); }));
    for (int number = 0; number < 400; ++number) submit(*pool, number);
    pool->finish();
    CHECK(numbers == range(0, 400));
    pool->close();
}

TEST_CASE("cascades under pressure from all sides lose and double nothing, and end at any moment") {
    std::mt19937 random(11);
    for (int round = 0; round < 100; ++round) {
        Shape shape;
        shape.workers = 1 + static_cast<std::size_t>(random() % 3);
        shape.batch = 1 + static_cast<std::size_t>(random() % 3);
        shape.capacity = shape.workers * shape.batch + 1 + random() % 20;
        shape.policy = random() % 2 == 0 ? Policy::block : Policy::drop_oldest;
        const bool ends_early = random() % 2 == 0;
        Calls calls;
        auto pool = make_staged_pool(shape, 1 + random() % 8,
                                     cascading(
                                         calls, [](int number) { return number % 3 == 0; },
                                         [](std::size_t, const Frame&) { sleep_a_little(); }));
        std::atomic<int> taken{0};
        std::vector<std::thread> consumers;
        std::vector<std::thread> producers;
        for (int which = 0; which < 2; ++which) {
            consumers.emplace_back([&taken, pool] { taken += static_cast<int>(drain(*pool).size()); });
            producers.emplace_back([pool] {
                try {
                    for (int number = 0; number < 300; ++number) submit(*pool, number);
                } catch (const Error&) {
                }
            });
        }
        if (ends_early) {
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
            pool->close();
        }
        for (auto& thread : producers) thread.join();
        if (!ends_early) pool->finish();
        for (auto& thread : consumers) thread.join();
        if (!ends_early) CHECK(static_cast<int>(pool->dropped()) + taken == 600);
        pool->close();
    }
}
