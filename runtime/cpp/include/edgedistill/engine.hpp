// Many images a second, in order, in bounded memory.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <edgedistill/error.hpp>
#include <edgedistill/export.hpp>
#include <edgedistill/image.hpp>
#include <edgedistill/options.hpp>
#include <edgedistill/prediction.hpp>

namespace edgedistill {

// What submit does when the engine is full.
enum class Policy {
    block,        // it waits
    drop_oldest,  // it gives up the oldest image that no worker began, else the oldest that no worker has in hand
};

struct EngineOptions : Options {
    // Images worked on at once, and worker threads; unset: deploy.json, else one per core, but no more than `threads`.
    std::optional<int> streams;
    // Images per inference, in every stage of a cascade; unset: what deploy.json says, else 1, but no more than
    // queue_size has room for, and than 8 under drop_oldest: a batch costs the same however few images are in it.
    std::optional<int> batch;
    std::optional<int> queue_size;  // images held at any moment: waiting, in work, or answered and not yet taken
    Policy policy = Policy::block;
};

// One worker thread per core does everything for one image after the other (read, decode, resize, infer) with its own
// compiled network, infer request and buffers. The constructor returns when the first of them can answer; the others
// join it one after the other, each as soon as its network is compiled.
//
//     edgedistill::Engine engine("openvino/");
//     std::thread feeder([&] { for (auto& path : paths) engine.submit_file(path); engine.finish(); });
//     while (auto answer = engine.next()) std::cout << answer->name << ' ' << answer->label << '\n';
//
// What a cascade's first stage passes on waits for a batch of its own, until that is full, nothing else is left to do
// or most of the queue would wait for it.
//
// Answers come in the order of the submissions. An image that cannot be read gets a Prediction whose `error` is set,
// and the rest goes on.
//
// Threads: submit*, next, finish, close, wait_until_ready and dropped may be called from any threads at once (several
// producers share one order: that in which their calls got in). The destructor closes: images in work are finished,
// waiting ones are not.
class EDGEDISTILL_API Engine {
public:
    // Gets every answer, in order, one at a time, from a worker thread; it must not throw, nor call back into the
    // engine. With a callback, next() is not to be used. The Prediction is only borrowed.
    using Callback = std::function<void(const Prediction&)>;
    using Timeout = std::optional<std::chrono::milliseconds>;

    explicit Engine(const std::filesystem::path& model, const EngineOptions& options = {}, Callback callback = {});
    static Engine from_memory(Bytes xml, Bytes weights, const EngineOptions& options = {}, Callback callback = {});
    ~Engine();
    Engine(Engine&&) noexcept;
    Engine& operator=(Engine&&) noexcept;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    // Hand over one image. False: the engine was still full after `timeout` (policy block; no timeout waits for ever,
    // so somebody else has to be taking answers). Throws Error: closed after finish or close, model once a worker's
    // network could not be compiled (what that worker took already comes back from next with the same error).
    bool submit_file(std::filesystem::path path, Timeout timeout = {});
    bool submit(std::vector<std::uint8_t> encoded, std::string name = {}, Timeout timeout = {});
    // Borrowed: the memory must stay as it is until the answer was taken, or for as long as `keep_alive` is held, which
    // the engine lets go as soon as it needs the memory no more.
    bool submit(Bytes encoded, std::shared_ptr<const void> keep_alive, std::string name = {}, Timeout timeout = {});
    bool submit(const ImageView& pixels, std::shared_ptr<const void> keep_alive, std::string name = {},
                Timeout timeout = {});

    // The next answer, in order; waits for it. Nothing after finish (once all were taken) or close.
    std::optional<Prediction> next();
    // The same into memory that is used again: false instead of nothing.
    bool next(Prediction& out);

    void finish();  // no more will be submitted; with a callback it returns when the last answer was delivered
    void close();   // ends the threads, and waits for a network that is being compiled; twice does no harm
    // Waits until every worker can answer: for measurements, and services that report when they are ready. Throws
    // Error: model where a network could not be compiled, closed where the engine was closed.
    void wait_until_ready();

    std::uint64_t dropped() const noexcept;  // images given up under drop_oldest

    const std::vector<std::string>& labels() const noexcept;
    const InputSpec& spec() const noexcept;
    bool multi_label() const noexcept;
    // These three as Classifier's.
    const std::vector<double>& thresholds() const noexcept;
    const std::vector<Head>& heads() const noexcept;
    std::optional<double> threshold(int stage, int output) const noexcept;
    const std::string& precision() const noexcept;  // "int8+f32" where the stages of a cascade differ
    int streams() const noexcept;
    int threads() const;  // OpenVINO's inference threads in all
    int batch() const noexcept;
    int queue_size() const noexcept;

private:
    struct Impl;
    explicit Engine(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

}  // namespace edgedistill
