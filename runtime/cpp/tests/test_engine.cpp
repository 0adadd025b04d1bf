// The engine with real networks: the same answers as Classifier, its settings, and its endings. Order, bounds and
// threads in depth: test_pool.cpp.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <edgedistill/edgedistill.hpp>
#include <fstream>
#include <future>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

using namespace std::chrono_literals;
namespace fs = std::filesystem;
using edgedistill::Bytes;
using edgedistill::Classifier;
using edgedistill::Engine;
using edgedistill::EngineOptions;
using edgedistill::Error;
using edgedistill::ErrorKind;
using edgedistill::ImageView;
using edgedistill::PixelFormat;
using edgedistill::Policy;
using edgedistill::Prediction;

static_assert(std::is_nothrow_move_constructible_v<Engine> && std::is_nothrow_move_assignable_v<Engine>);
static_assert(!std::is_copy_constructible_v<Engine> && !std::is_copy_assignable_v<Engine>);

fs::path models() {
    const char* folder = std::getenv("EDGEDISTILL_TEST_MODELS");
    REQUIRE_MESSAGE(folder != nullptr, "EDGEDISTILL_TEST_MODELS is not set; run ctest");
    return folder;
}

std::vector<std::uint8_t> read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

Bytes bytes_of(const std::vector<std::uint8_t>& data) {
    return {data.data(), data.size()};
}

EngineOptions options(int streams = 2, int batch = 1) {
    EngineOptions options;
    options.streams = streams;
    options.batch = batch;
    return options;
}

const std::vector<std::string>& photos() {
    static const std::vector<std::string> names = {"red.jpg",    "green.png",  "blue.bmp",   "red.webp",
                                                   "yellow.png", "broken.jpg", "nowhere.jpg"};
    return names;
}

struct Answer {
    std::string name, label, error;
    int stage;
    bool operator==(const Answer& other) const {
        return name == other.name && label == other.label && error == other.error && stage == other.stage;
    }
};

Answer answer_of(const Prediction& prediction) {
    return {prediction.name, prediction.label, prediction.error, prediction.stage};
}

std::vector<Answer> classified(const fs::path& model, const fs::path& folder) {
    Classifier classifier(model);
    std::vector<Answer> answers;
    for (const auto& name : photos()) {
        Prediction answer;
        try {
            classifier.classify_file(folder / name, answer);
        } catch (const Error& error) {
            answer = Prediction();
            answer.name = (folder / name).string();
            answer.error = error.what();
        }
        answers.push_back(answer_of(answer));
    }
    return answers;
}

template <class Call>
std::string error_of(ErrorKind kind, const Call& call) {
    try {
        call();
    } catch (const Error& error) {
        CHECK(error.kind() == kind);
        return error.what();
    }
    FAIL("nothing was thrown");
    return {};
}

}  // namespace

TEST_CASE("the engine gives the classifier's answers, in order, with errors at their images") {
    const auto folder = models() / "photos";
    for (const char* model : {"single", "cascade", "multi_label", "model_api/model.xml"}) {
        const auto expected = classified(models() / model, folder);
        for (const auto& [streams, batch] : {std::pair(1, 1), std::pair(2, 1), std::pair(2, 3)}) {
            CAPTURE(model);
            CAPTURE(batch);
            // A network from elsewhere may not be made for more than one image at once.
            Engine engine(models() / model, options(streams, batch));
            std::thread feeder([&] {
                for (int round = 0; round < 10; ++round) {
                    for (const auto& name : photos()) engine.submit_file(folder / name);
                }
                engine.finish();
            });
            std::vector<Answer> answers;
            while (const auto answer = engine.next()) answers.push_back(answer_of(*answer));
            feeder.join();
            REQUIRE(answers.size() == 10 * expected.size());
            for (std::size_t i = 0; i < answers.size(); ++i) CHECK(answers[i] == expected[i % expected.size()]);
        }
    }
}

TEST_CASE("paths, owned bytes, borrowed bytes and pixels are answered alike") {
    const auto path = models() / "photos" / "red.jpg";
    const auto data = std::make_shared<std::vector<std::uint8_t>>(read(path));
    const auto pixels = std::make_shared<std::vector<std::uint8_t>>();
    for (int i = 0; i < 20 * 30; ++i) pixels->insert(pixels->end(), {220, 30, 20});
    Engine engine(models() / "single", options());
    engine.submit_file(path);
    engine.submit(*data, "owned");
    engine.submit(bytes_of(*data), data, "borrowed");
    engine.submit(ImageView{pixels->data(), 20, 30, 90, PixelFormat::rgb}, pixels, "pixels");
    engine.submit(bytes_of(*data), nullptr);
    engine.submit(Bytes{}, nullptr, "empty");
    engine.finish();
    std::vector<std::string> names;
    Prediction answer;
    while (engine.next(answer)) {
        names.push_back(answer.name);
        if (answer.name == "empty") {
            CHECK(answer.error.find("empty: ") == 0);
        } else {
            CHECK(answer.label == "red");
        }
    }
    CHECK(names == std::vector<std::string>{path.string(), "owned", "borrowed", "pixels", "", "empty"});
    CHECK(data.use_count() == 1);
    CHECK(pixels.use_count() == 1);
}

TEST_CASE("a callback gets what next would have given") {
    std::vector<std::string> labels;
    Engine engine(models() / "single", options(), [&](const Prediction& answer) { labels.push_back(answer.label); });
    for (int round = 0; round < 20; ++round) {
        engine.submit_file(models() / "photos" / "red.jpg");
        engine.submit_file(models() / "photos" / "broken.jpg");
        engine.submit_file(models() / "photos" / "green.png");
    }
    engine.finish();
    REQUIRE(labels.size() == 60);
    for (std::size_t i = 0; i < 60; i += 3) {
        CHECK(labels[i] == "red");
        CHECK(labels[i + 1].empty());
        CHECK(labels[i + 2] == "green");
    }
    error_of(ErrorKind::usage, [&] { engine.next(); });
    error_of(ErrorKind::closed, [&] { engine.submit_file("late.jpg"); });
}

TEST_CASE("a model in memory answers as from its files") {
    const auto folder = models() / "single" / "stages" / "tiny";
    auto xml = read(folder / "model.xml");
    auto weights = read(folder / "model.bin");
    auto engine = Engine::from_memory(bytes_of(xml), bytes_of(weights), options(1));
    xml.assign(xml.size(), 0);
    weights.assign(weights.size(), 0);
    engine.submit_file(models() / "photos" / "green.png");
    CHECK(engine.next()->label == "green");
    CHECK(engine.labels() == std::vector<std::string>{"red", "green", "very blue"});
    CHECK(engine.spec().height == 32);
}

TEST_CASE("moved engines go on, and what they were moved from is closed") {
    Engine first(models() / "single", options());
    first.submit_file(models() / "photos" / "red.jpg");
    Engine second(std::move(first));
    CHECK(second.next()->label == "red");
    error_of(ErrorKind::closed, [&] { first.submit_file("x.jpg"); });  // NOLINT: that is the promise
    error_of(ErrorKind::closed, [&] { first.next(); });
    first.finish();
    first.close();
    Engine third(models() / "multi_label", options(1));
    third.submit_file(models() / "photos" / "red.jpg");
    third = std::move(second);  // closes what it was
    CHECK_FALSE(third.multi_label());
    third.submit_file(models() / "photos" / "green.png");
    CHECK(third.next()->label == "green");
    first = std::move(third);
    first.submit_file(models() / "photos" / "red.jpg");
    CHECK(first.next()->label == "red");
}

TEST_CASE("settings are the given ones, else deploy.json's, else the machine's") {
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    Engine plain(models() / "single");
    CHECK(plain.streams() >= 1);
    CHECK(plain.streams() <= cores);
    CHECK(plain.batch() == 1);
    CHECK(plain.queue_size() == 4 * plain.streams() + 1);
    CHECK(plain.precision() == "f32");
    CHECK(plain.dropped() == 0);
    auto chosen = options(3, 2);
    chosen.queue_size = 7;
    const Engine given(models() / "single", chosen);
    CHECK(given.streams() == 3);
    CHECK(given.batch() == 2);
    CHECK(given.queue_size() == 7);
    CHECK(Engine(models() / "single", options(3, 2)).queue_size() == 25);
    EngineOptions few;
    few.threads = 1;
    const Engine limited(models() / "single", few);
    CHECK(limited.streams() == 1);
    CHECK(limited.threads() == 1);
}

TEST_CASE("a camera's queue is larger than what all workers can have in hand") {
    EngineOptions camera;
    camera.streams = 2;
    camera.policy = Policy::drop_oldest;
    Engine engine(models() / "heads_cascade", camera);  // batch 1, later_batch 8
    CHECK(engine.batch() == 1);
    CHECK(engine.queue_size() == 4 * 2 * 8 + 1);
    camera.queue_size = 5;
    CHECK(Engine(models() / "heads_cascade", camera).queue_size() == 5);
    camera.queue_size.reset();
    camera.batch = 2;
    CHECK(Engine(models() / "heads_cascade", camera).queue_size() == 4 * 2 * 2 + 1);
    camera.batch.reset();
    camera.policy = Policy::block;
    CHECK(Engine(models() / "heads_cascade", camera).queue_size() == 4 * 2 + 1 + 8 * 7);
    for (int number = 0; number < 300; ++number) engine.submit_file(models() / "photos" / "red.jpg");
    engine.finish();
    std::uint64_t taken = 0;
    while (engine.next()) ++taken;
    CHECK(taken + engine.dropped() == 300);
}

TEST_CASE("settings out of range are refused with the range") {
    const auto refused = [](const EngineOptions& options) {
        return error_of(ErrorKind::usage, [&] { Engine(models() / "single", options); });
    };
    CHECK(refused(options(0)) == "streams 0, expected 1 to 4096");
    CHECK(refused(options(-3)) == "streams -3, expected 1 to 4096");
    CHECK(refused(options(1, 4097)) == "batch 4097, expected 1 to 4096");
    auto threads = options();
    threads.threads = 0;
    CHECK(refused(threads) == "threads 0, expected 1 to 4096");
    threads.streams.reset();
    CHECK(refused(threads) == "threads 0, expected 1 to 4096");
    threads = options(2);
    threads.threads = 1;
    CHECK(refused(threads) == "threads 1, expected at least one for each of the 2 streams");
    auto queue = options(2, 2);
    queue.queue_size = 4;
    CHECK(refused(queue) == "queue_size 4, expected more than streams x batch = 4");
    auto policy = options();
    policy.policy = static_cast<Policy>(7);
    CHECK(refused(policy).find("expected 'block' or 'drop_oldest'") != std::string::npos);
    auto precision = options();
    precision.precision = "f13";
    CHECK(refused(precision).find("f13") != std::string::npos);
    error_of(ErrorKind::artifact, [] { Engine(models() / "nothing"); });
}

TEST_CASE("a camera faster than the engine loses frames, and never waits") {
    auto camera = options(1);
    camera.policy = Policy::drop_oldest;
    camera.queue_size = 3;
    Engine engine(models() / "single", camera);
    const auto data = std::make_shared<std::vector<std::uint8_t>>(read(models() / "photos" / "large.jpg"));
    for (int number = 0; number < 60; ++number) {
        CHECK(engine.submit(bytes_of(*data), data, std::to_string(number), 0ms));
    }
    engine.finish();
    std::vector<int> numbers;
    while (const auto answer = engine.next()) numbers.push_back(std::stoi(answer->name));
    CHECK(numbers.size() + engine.dropped() == 60);
    CHECK(engine.dropped() > 0);
    CHECK(numbers.back() == 59);
    CHECK(std::is_sorted(numbers.begin(), numbers.end()));
}

TEST_CASE("an engine may go while producers and consumers are inside of it") {
    std::mt19937 random(3);
    for (int round = 0; round < 20; ++round) {
        auto small = options(1 + round % 2, 1 + round % 3);
        if (round % 5 == 0) small.policy = Policy::drop_oldest;
        auto engine = std::make_unique<Engine>(models() / "single", small);
        const auto path = models() / "photos" / "large.jpg";
        std::vector<std::future<void>> inside;
        for (int which = 0; which < 2; ++which) {
            inside.push_back(std::async(std::launch::async, [&engine = *engine, path] {
                try {
                    for (;;) engine.submit_file(path);
                } catch (const Error& error) {
                    if (error.kind() != ErrorKind::closed) throw;
                }
            }));
            inside.push_back(std::async(std::launch::async, [&engine = *engine] {
                Prediction answer;
                while (engine.next(answer)) continue;
            }));
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(random() % 20));
        engine->close();
        for (auto& thread : inside) thread.get();
        engine.reset();
    }
}

TEST_CASE("the destructor wakes who is inside, and they need the engine no more") {
    auto full = options(1);
    full.queue_size = 2;
    auto engine = std::make_unique<Engine>(models() / "single", full);
    const auto path = models() / "photos" / "red.jpg";
    auto consumer = std::async(std::launch::async, [&engine = *engine] { return engine.next().has_value(); });
    std::this_thread::sleep_for(50ms);
    engine.reset();
    CHECK_FALSE(consumer.get());

    engine = std::make_unique<Engine>(models() / "single", full);
    for (int number = 0; number < 2; ++number) engine->submit_file(path);
    auto producer = std::async(std::launch::async, [&engine = *engine, path] {
        return error_of(ErrorKind::closed, [&] { engine.submit_file(path); });
    });
    std::this_thread::sleep_for(50ms);
    engine.reset();
    CHECK(producer.get() == "the engine is closed; make a new one");
}

TEST_CASE("an engine that nobody uses, finishes or drains ends at once") {
    { Engine engine(models() / "single", options()); }
    Engine engine(models() / "single", options());
    for (int number = 0; number < 9; ++number) engine.submit_file(models() / "photos" / "large.jpg");
}

TEST_CASE("an engine answers, moves and ends while its other networks are being compiled") {
    const auto path = models() / "photos" / "red.jpg";
    auto cold = options(3);
    cold.cache.enabled = false;  // compiling takes its time
    for (int round = 0; round < 6; ++round) {
        Engine first(models() / "single", cold);
        first.submit_file(path);
        Engine engine(std::move(first));
        CHECK(engine.next()->label == "red");
        if (round % 3 == 0) engine.close();
        if (round % 3 == 1) engine.wait_until_ready();
    }
}

TEST_CASE("a ready engine stays ready, and a closed one says so") {
    Engine engine(models() / "cascade", options(2, 2));
    engine.wait_until_ready();
    engine.wait_until_ready();
    engine.submit_file(models() / "photos" / "red.jpg");
    CHECK(engine.next()->label == "red");
    engine.close();
    error_of(ErrorKind::closed, [&] { engine.wait_until_ready(); });
}
