// The right answer from every kind of source, with memory that is used again. That the answers are Python's:
// tests/cpp/test_answers_are_pythons.py.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <edgedistill/edgedistill.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "bundle.hpp"
#include "network.hpp"

namespace {

namespace fs = std::filesystem;
using namespace edgedistill;

fs::path models() {
    const char* folder = std::getenv("EDGEDISTILL_TEST_MODELS");
    REQUIRE_MESSAGE(folder != nullptr, "set EDGEDISTILL_TEST_MODELS to what tests/cpp/make_models.py made");
    return folder;
}

fs::path photo(const char* name) {
    return models() / "photos" / name;
}

std::vector<std::uint8_t> read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

Bytes bytes(const std::vector<std::uint8_t>& data) {
    return {data.data(), data.size()};
}

// A picture of one colour, and a view of it.
struct Picture {
    Picture(int height, int width, std::array<std::uint8_t, 3> bgr) {
        for (int pixel = 0; pixel < height * width; ++pixel) data.insert(data.end(), bgr.begin(), bgr.end());
        view.data = data.data();
        view.height = height;
        view.width = width;
    }
    std::vector<std::uint8_t> data;
    ImageView view;
};

Options quiet() {
    Options options;
    options.log = [](LogLevel, std::string_view) {};
    return options;
}

void check_whole(const Prediction& answer) {
    CHECK(answer.ok());
    REQUIRE(answer.probabilities.size() == 3);
    const float sum = std::accumulate(answer.probabilities.begin(), answer.probabilities.end(), 0.0F);
    CHECK(sum == doctest::Approx(1.0).epsilon(1e-6));
    CHECK(answer.probability == *std::max_element(answer.probabilities.begin(), answer.probabilities.end()));
}

ErrorKind kind_of(const std::function<void()>& call) {
    try {
        call();
    } catch (const Error& error) {
        INFO(error.what());
        return error.kind();
    }
    FAIL("nothing was thrown");
    return ErrorKind::closed;
}

}  // namespace

TEST_CASE("files, bytes and pixels are answered") {
    Classifier classifier(models() / "single", quiet());
    CHECK(classifier.labels() == std::vector<std::string>{"red", "green", "very blue"});
    CHECK(classifier.temperature() == 1.5);
    CHECK(classifier.precision() == "f32");
    CHECK(classifier.spec().height == 32);
    CHECK_FALSE(classifier.multi_label());
    const std::pair<const char*, const char*> photos[] = {{"red.jpg", "red"},
                                                          {"green.png", "green"},
                                                          {"blue.bmp", "very blue"},
                                                          {"red.webp", "red"},
                                                          {"large.jpg", "green"}};
    for (const auto& [name, label] : photos) {
        const Prediction answer = classifier.classify_file(photo(name));
        check_whole(answer);
        CHECK(answer.label == label);
        CHECK(answer.name == photo(name).string());
        const auto data = read(photo(name));
        const Prediction same = classifier.classify(bytes(data));
        CHECK(same.probabilities == answer.probabilities);
        CHECK(same.name.empty());
    }
    const Picture blue(20, 30, {230, 60, 20});
    CHECK(classifier.classify(blue.view).label == "very blue");
}

TEST_CASE("an answer leaves nothing of the answer before it") {
    Classifier several(models() / "multi_label", quiet());
    Prediction out;
    several.classify_file(photo("yellow.png"), out);
    CHECK(out.accepted == std::vector<int>{0, 1});
    CHECK_THROWS_AS(several.classify_file(photo("broken.jpg"), out), Error);
    CHECK_FALSE(out.ok());
    CHECK(out.label.empty());
    CHECK(out.index == -1);
    CHECK(out.probabilities.empty());
    CHECK(out.accepted.empty());
    several.classify_file(photo("red.jpg"), out);
    CHECK(out.ok());
    CHECK(out.accepted == std::vector<int>{0});
    Classifier one(models() / "single", quiet());
    one.classify_file(photo("green.png"), out);
    CHECK(out.accepted.empty());
    CHECK(out.label == "green");
}

TEST_CASE("the memory of an answer is used again") {
    Classifier classifier(models() / "single", quiet());
    Prediction out;
    classifier.classify_file(photo("blue.bmp"), out);
    const float* memory = out.probabilities.data();
    const char* label = out.label.data();
    for (const char* name : {"red.jpg", "green.png", "red.webp"}) classifier.classify_file(photo(name), out);
    CHECK(out.probabilities.data() == memory);
    CHECK(out.label.data() == label);
}

TEST_CASE("one bad image is an error that names it, and the next is answered") {
    Classifier classifier(models() / "single", quiet());
    for (const char* name : {"broken.jpg", "none.jpg"}) {
        try {
            classifier.classify_file(photo(name));
            FAIL("nothing was thrown");
        } catch (const Error& error) {
            CHECK(error.kind() == ErrorKind::image);
            CHECK(std::string(error.what()).find(name) != std::string::npos);
        }
    }
    const std::vector<std::uint8_t> junk(50, 7);
    CHECK(kind_of([&] { classifier.classify(bytes(junk)); }) == ErrorKind::image);
    CHECK(kind_of([&] { classifier.classify(Bytes{}); }) == ErrorKind::image);
    CHECK(kind_of([&] { classifier.classify(ImageView{}); }) == ErrorKind::image);
    CHECK(classifier.classify_file(photo("red.jpg")).label == "red");
    Options small = quiet();
    small.max_pixels = 1000;
    Classifier careful(models() / "single", small);
    CHECK(kind_of([&] { careful.classify_file(photo("large.jpg")); }) == ErrorKind::image);
}

TEST_CASE("a cascade asks the slow stage when the fast one is unsure") {
    Classifier classifier(models() / "cascade", quiet());
    for (const char* name : {"red.jpg", "green.png"}) {
        const Prediction answer = classifier.classify_file(photo(name));
        CHECK(answer.stage == 1);
        CHECK(answer.probability > 0.9F);
    }
    const Picture red(50, 60, {20, 30, 220});
    CHECK(classifier.classify(red.view).label == "red");
}

TEST_CASE("several labels at once, and a network from elsewhere") {
    Classifier several(models() / "multi_label", quiet());
    CHECK(several.multi_label());
    const Prediction yellow = several.classify_file(photo("yellow.png"));
    CHECK(yellow.accepted == std::vector<int>{0, 1});
    CHECK(yellow.index == static_cast<int>(std::max_element(yellow.probabilities.begin(), yellow.probabilities.end()) -
                                           yellow.probabilities.begin()));
    Classifier foreign(models() / "model_api", quiet());
    CHECK(foreign.labels()[2] == "very_blue");
    check_whole(foreign.classify_file(photo("green.png")));
    CHECK(foreign.classify_file(photo("green.png")).label == "green");
}

TEST_CASE("a batch answers each image as if it were alone, and a bad one costs only itself") {
    const auto bundle = detail::Bundle::load(models() / "cascade");
    int later_batch = 1;
    SUBCASE("later stages image by image") {}
    SUBCASE("in full batches") {
        later_batch = 2;
    }
    SUBCASE("in batches that are too few for it") {
        later_batch = 4;
    }
    detail::CompileSettings settings;
    settings.precisions = {"f32", "f32"};
    settings.batch = 4;
    settings.later_batch = later_batch;
    settings.threads = 1;
    settings.cache.enabled = false;
    const detail::Network network(bundle, settings);
    detail::Worker worker(network);
    const char* names[] = {"red.jpg", "broken.jpg", "blue.bmp"};
    std::vector<detail::Frame> frames;
    for (const char* name : names) frames.push_back({name, photo(name)});
    const detail::Frame* order[] = {&frames[0], &frames[1], &frames[2]};
    std::vector<Prediction> out(3);
    Classifier alone(models() / "cascade", quiet());
    for (int round = 0; round < 2; ++round) {
        worker.answer(order, 3, out.data());
        CHECK(out[1].error.find("broken.jpg") != std::string::npos);
        for (const std::size_t number : {std::size_t{0}, std::size_t{2}}) {
            const Prediction expected = alone.classify_file(photo(names[number]));
            CHECK(out[number].name == names[number]);
            CHECK(out[number].label == expected.label);
            CHECK(out[number].stage == 1);
            for (std::size_t label = 0; label < 3; ++label) {
                CHECK(out[number].probabilities[label] == doctest::Approx(expected.probabilities[label]).epsilon(1e-5));
            }
        }
    }
    CHECK(kind_of([&] { worker.answer(order, 5, out.data()); }) == ErrorKind::usage);
}

TEST_CASE("the likeliest come first, and equals in the order of the classes") {
    Prediction answer;
    answer.probabilities = {0.2F, 0.3F, 0.2F, 0.3F};
    const std::vector<std::string> labels = {"a", "b", "c", "d"};
    const auto best = answer.top_k(3, labels);
    REQUIRE(best.size() == 3);
    CHECK(best[0].label == "b");
    CHECK(best[1].label == "d");
    CHECK(best[2].index == 0);
    CHECK(best[2].probability == 0.2F);
    CHECK(answer.top_k(9, labels).size() == 4);
    CHECK(answer.top_k(0, labels).empty());
    CHECK(answer.top_k(-1, labels).empty());
    CHECK(Prediction().top_k(3, labels).empty());
}

TEST_CASE("options that cannot be are refused") {
    const auto refused = [](const std::function<void(Options&)>& change) {
        Options options = quiet();
        change(options);
        return kind_of([&] { Classifier classifier(models() / "single", options); });
    };
    CHECK(refused([](Options& o) { o.precision = "fp16"; }) == ErrorKind::usage);
    CHECK(refused([](Options& o) { o.threads = 0; }) == ErrorKind::usage);
    CHECK(refused([](Options& o) { o.max_pixels = 0; }) == ErrorKind::usage);
    CHECK(refused([](Options& o) { o.precision = "int8"; }) == ErrorKind::model);
    CHECK(kind_of([] { Classifier classifier(models() / "none", quiet()); }) == ErrorKind::artifact);
}

TEST_CASE("several threads may share one classifier, and it may move between calls") {
    Classifier first(models() / "single", quiet());
    Classifier classifier(std::move(first));
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    const std::pair<const char*, const char*> photos[] = {
        {"red.jpg", "red"}, {"green.png", "green"}, {"blue.bmp", "very blue"}};
    for (const auto& [name, label] : photos) {
        threads.emplace_back([&classifier, &wrong, path = photo(name), expected = std::string(label)] {
            Prediction out;
            for (int round = 0; round < 50; ++round) {
                classifier.classify_file(path, out);
                wrong += out.label == expected ? 0 : 1;
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(wrong == 0);
}
