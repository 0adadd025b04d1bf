// In the steady state nothing is allocated per image, beyond what OpenVINO's own infer call takes.
//
//     test_no_allocation [DEPLOYABLE PHOTO...]
//
// Every allocation of the process is counted, in all threads and libraries: those of operator new end in malloc too.
// Without arguments it uses the models and photos of $EDGEDISTILL_TEST_MODELS. The photos are baseline JPEG, plain
// PNG and BMP.
#include <malloc.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <edgedistill/edgedistill.hpp>
#include <fstream>
#include <functional>
#include <iterator>
#include <openvino/runtime/core.hpp>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "normalisation.hpp"

namespace {

std::atomic<bool> counting{false};
std::atomic<long> allocations{0};

void count() noexcept {
    if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

// glibc's own, under the names that it keeps for those who replace malloc.
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* memory, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

void* malloc(std::size_t size) noexcept {
    count();
    return __libc_malloc(size);
}
void* calloc(std::size_t number, std::size_t size) noexcept {
    count();
    return __libc_calloc(number, size);
}
void* realloc(void* memory, std::size_t size) noexcept {
    count();
    return __libc_realloc(memory, size);
}
void* memalign(std::size_t alignment, std::size_t size) noexcept {
    count();
    return __libc_memalign(alignment, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
    count();
    return __libc_memalign(alignment, size);
}
int posix_memalign(void** memory, std::size_t alignment, std::size_t size) noexcept {
    count();
    *memory = __libc_memalign(alignment, size);
    return *memory == nullptr ? ENOMEM : 0;
}
}

namespace {

namespace fs = std::filesystem;
using edgedistill::Bytes;
using edgedistill::Classifier;
using edgedistill::Engine;
using edgedistill::ImageView;
using edgedistill::PixelFormat;
using edgedistill::Prediction;

constexpr int WARM_UP = 40;
constexpr int ROUNDS = 100;

long counted(int rounds, const std::function<void()>& step) {
    for (int round = 0; round < WARM_UP; ++round) step();
    allocations = 0;
    counting = true;
    for (int round = 0; round < rounds; ++round) step();
    counting = false;
    return allocations;
}

// Of one inference, with a network made as the library makes it.
double infer_alone(const fs::path& model, const ov::AnyMap& properties, std::size_t stage = 0) {
    const auto bundle = edgedistill::detail::Bundle::load(model);
    const auto& spec = bundle->config().stages[stage].input_spec;
    const auto& metadata = bundle->metadata()[stage];
    auto network = bundle->read_model(stage, "f32");
    edgedistill::detail::embed_normalisation(network, spec, metadata.bgr, metadata.nhwc);
    ov::AnyMap all{{"INFERENCE_PRECISION_HINT", "f32"}, {"NUM_STREAMS", "1"}, {"INFERENCE_NUM_THREADS", 1}};
    all.insert(properties.begin(), properties.end());
    auto compiled = bundle->core().compile_model(network, "CPU", all);
    auto request = compiled.create_infer_request();
    ov::Tensor pixels(compiled.input().get_element_type(), compiled.input().get_shape());
    ov::Tensor scores(compiled.output().get_element_type(), compiled.output().get_shape());
    request.set_input_tensor(pixels);
    request.set_output_tensor(scores);
    return static_cast<double>(counted(ROUNDS, [&] { request.infer(); })) / ROUNDS;
}

bool failed = false;

void report(const std::string& what, double per_image, double infer) {
    // OpenVINO's lists of past inferences take a new block now and then.
    const bool good = per_image <= infer + 0.05;
    std::printf("%-60s %6.2f an image, of which OpenVINO's infer %6.2f  %s\n", what.c_str(), per_image, infer,
                good ? "ok" : "FAILED");
    failed = failed || !good;
}

std::vector<std::uint8_t> read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<std::uint8_t> bytes{std::istreambuf_iterator<char>(file), {}};
    if (bytes.empty()) std::fprintf(stderr, "%s: cannot be read\n", path.c_str());
    if (bytes.empty()) std::exit(2);
    return bytes;
}

void check_classifier(const fs::path& model, const std::vector<fs::path>& photos, double infer) {
    edgedistill::Options options;
    options.precision = "f32";
    options.threads = 1;
    Classifier classifier(model, options);
    Prediction out;
    std::vector<std::vector<std::uint8_t>> files;
    for (const auto& photo : photos) files.push_back(read(photo));
    const auto images = static_cast<double>(photos.size()) * ROUNDS;

    report("Classifier, bytes",
           static_cast<double>(counted(ROUNDS,
                                       [&] {
                                           for (const auto& file : files)
                                               classifier.classify(Bytes{file.data(), file.size()}, out);
                                       })) /
               images,
           infer);
    report("Classifier, files",
           static_cast<double>(counted(ROUNDS,
                                       [&] {
                                           for (const auto& photo : photos) classifier.classify_file(photo, out);
                                       })) /
               images,
           infer);
    const std::vector<std::uint8_t> memory(480 * 640 * 4, 77);
    for (const auto format :
         {PixelFormat::bgr, PixelFormat::rgba, PixelFormat::gray, PixelFormat::nv12, PixelFormat::i420}) {
        const ImageView view{memory.data(), 480, 640, 0, format};
        report("Classifier, pixels in format " + std::to_string(static_cast<int>(format)),
               static_cast<double>(counted(ROUNDS, [&] { classifier.classify(view, out); })) / ROUNDS, infer);
    }
}

void check_engine(const fs::path& model, const std::vector<fs::path>& photos, double infer, int streams,
                  int batch = 1) {
    edgedistill::EngineOptions options;
    options.precision = "f32";
    options.streams = streams;
    options.threads = streams;
    options.batch = batch;
    Engine engine(model, options);
    engine.wait_until_ready();
    const auto file = std::make_shared<const std::vector<std::uint8_t>>(read(photos.back()));
    const Bytes bytes{file->data(), file->size()};
    const std::vector<std::uint8_t> memory(480 * 640 * 3, 77);
    const ImageView view{memory.data(), 480, 640, 0, PixelFormat::bgr};
    Prediction out;
    // The queue is filled and drained, so that every slot of it was used before anything is counted.
    const auto per_image = [&](const std::function<void()>& submit) {
        return static_cast<double>(counted(ROUNDS,
                                           [&] {
                                               for (int number = 0; number < engine.queue_size(); ++number) submit();
                                               for (int number = 0; number < engine.queue_size(); ++number)
                                                   engine.next(out);
                                           })) /
               ROUNDS / engine.queue_size();
    };
    const std::string name = model.filename().string() + ", Engine, " + std::to_string(streams) + " streams, batch " +
                             std::to_string(batch) + ", ";
    report(name + "borrowed bytes", per_image([&] { engine.submit(bytes, file, "photo"); }), infer);
    report(name + "borrowed pixels", per_image([&] { engine.submit(view, nullptr); }), infer);
    // Moved in: the paths were allocated before.
    std::vector<fs::path> paths(static_cast<std::size_t>((WARM_UP + ROUNDS) * engine.queue_size()), photos.back());
    auto path = paths.begin();
    report(name + "files", per_image([&] { engine.submit_file(std::move(*path++)); }), infer);
}

}  // namespace

int main(int argc, char** argv) {
    const char* models = std::getenv("EDGEDISTILL_TEST_MODELS");
    if (argc < 3 && models == nullptr) {
        std::fprintf(stderr, "usage: test_no_allocation DEPLOYABLE PHOTO..., or set EDGEDISTILL_TEST_MODELS\n");
        return 2;
    }
    const fs::path model = argc < 3 ? fs::path(models) / "single" : fs::path(argv[1]);
    std::vector<fs::path> photos(argv + (argc < 3 ? argc : 2), argv + argc);
    if (photos.empty()) {
        for (const char* name : {"large.jpg", "green.png", "blue.bmp", "red.jpg"}) {
            photos.push_back(fs::path(models) / "photos" / name);
        }
    }

    allocations = 0;
    counting = true;
    std::free(std::malloc(1));
    delete new std::string(100, 'x');
    counting = false;
    if (allocations < 3) {
        std::fprintf(stderr, "the counter does not count: %ld of 3\n", allocations.load());
        return 2;
    }
    check_classifier(model, photos, infer_alone(model, {{"PERFORMANCE_HINT", "LATENCY"}}));
    if (argc < 3) {
        const fs::path other = fs::path(models) / "multi_label";
        check_classifier(other, photos, infer_alone(other, {{"PERFORMANCE_HINT", "LATENCY"}}));
    }
    const double infer = infer_alone(model, {{"ENABLE_CPU_PINNING", false}});
    check_engine(model, photos, infer, 1);
    check_engine(model, photos, infer, 2);
    if (argc < 3) {
        // Its first stage passes every image on.
        const fs::path cascade = fs::path(models) / "cascade";
        double both = 0;
        for (const std::size_t stage : {0U, 1U}) both += infer_alone(cascade, {{"ENABLE_CPU_PINNING", false}}, stage);
        check_engine(cascade, photos, both, 2);
        // Full batches but for the first and the last few images.
        check_engine(cascade, photos, 1.5 * both / 4, 2, 4);
    }
    return failed ? 1 : 0;
}
