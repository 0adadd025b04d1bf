// A compiled deployable and the workers that answer with it: the C++ form of runtime/network.py.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include <edgedistill/options.hpp>
#include <edgedistill/prediction.hpp>

#include "frame.hpp"

namespace edgedistill::detail {

class Bundle;  // bundle.hpp

// Bytes of the pixels of the largest stage after the first; 0 where there is none.
std::size_t later_pixel_bytes(const Bundle& bundle);

struct CompileSettings {
    std::vector<std::string> precisions;  // "f32", "bf16" or "int8", resolved, one for each stage
    Decode decode = Decode::reduced;
    int batch = 1;         // of the first stage
    int later_batch = 1;   // of the stages that see what it passes on
    bool latency = false;  // OpenVINO's latency mode on `threads` threads; else one stream with `threads` threads
    int threads = 0;       // 0: OpenVINO's choice (latency only)
    bool pinning = false;  // throughput only
    ModelCache cache;
    long long max_pixels = 100'000'000;
};

class Network;

// All stages of a bundle, read and shaped, from which any number of equal networks is compiled: this part takes a
// fourth of the time of a network that OpenVINO has in its cache. Any thread may use it.
class Blueprint {
public:
    // Throws Error (model, artifact, usage). It needs the bundle's files no more.
    Blueprint(std::shared_ptr<const Bundle> bundle, const CompileSettings& settings);
    ~Blueprint();

    Network compile() const;  // throws Error (model)

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

// All stages of a bundle, compiled. Immutable after construction; any number of workers may share it.
class Network {
public:
    // Throws Error (model, artifact, usage).
    Network(std::shared_ptr<const Bundle> bundle, const CompileSettings& settings);
    ~Network();
    Network(Network&&) noexcept;
    Network& operator=(Network&&) noexcept;

    const Bundle& bundle() const noexcept;
    const CompileSettings& settings() const noexcept;
    int threads() const;  // those that OpenVINO says it infers with

    struct Impl;
    const Impl& impl() const noexcept { return *impl_; }

private:
    friend class Blueprint;
    explicit Network(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

// Answers with infer requests and buffers of its own: one thread at a time. Keeps a reference to the network.
class Worker {
public:
    explicit Worker(const Network& network);
    ~Worker();
    Worker(Worker&&) noexcept;
    Worker& operator=(Worker&&) noexcept;

    int batch() const noexcept;
    // `count` (at most batch()) frames -> as many predictions in the same order, by as many stages as each needs,
    // written over what `out` held, with its memory used again. An image that cannot be read gets `error`; the rest
    // goes on. Throws Error (model) when the network itself fails.
    void answer(const Frame* const* frames, std::size_t count, Prediction* out);
    // One stage's part of it: stage 0 begins, a later one sees the pixels of tasks that were passed on to it. At most
    // as many as that stage's batch. Throws as above.
    void step(std::size_t stage, Task* const* tasks, std::size_t count);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

// CPUs that this process may use: its affinity, or fewer under a container's quota.
int usable_cores();

// One for each stage: `asked` for all where given, else `tuned`, in which "bf16" gives way to "f32" on a CPU that
// cannot do it (with a warning). Throws Error (model, usage).
std::vector<std::string> resolve_precisions(const Bundle& bundle, const std::string& asked,
                                            std::vector<std::string> tuned, const LogCallback& log);

}  // namespace edgedistill::detail
