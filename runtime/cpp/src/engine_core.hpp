// What the C++ and the C engine are made of: networks, one worker for each, and the pool that feeds them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <edgedistill/engine.hpp>

#include "bundle.hpp"
#include "network.hpp"
#include "pool.hpp"

namespace edgedistill::detail {

class EngineCore {
public:
    // Throws Error (artifact, model, usage).
    EngineCore(std::shared_ptr<const Bundle> bundle, const EngineOptions& options, Engine::Callback callback);
    ~EngineCore();
    EngineCore(const EngineCore&) = delete;
    EngineCore& operator=(const EngineCore&) = delete;

    // Shared, so that a thread inside of a call does not need this object any more.
    std::shared_ptr<Pool> pool() const noexcept { return pool_; }
    std::shared_ptr<const Bundle> bundle() const noexcept { return bundle_; }
    const std::string& precision() const noexcept { return precision_; }
    int streams() const noexcept { return streams_; }
    int threads() const;
    int batch() const noexcept { return batch_; }
    int later_batch() const noexcept { return later_batch_; }
    int queue_size() const noexcept { return queue_size_; }

private:
    struct Lane;  // a network and the worker that runs it

    int usual_queue_size(Policy policy) const;
    void check(const EngineOptions& options) const;
    CompileSettings compile_settings(const EngineOptions& options) const;
    void start(const EngineOptions& options, Engine::Callback callback);
    Pool::Answer open_lane(std::size_t number, const Blueprint& blueprint);

    std::shared_ptr<const Bundle> bundle_;
    ThroughputSettings tuned_;
    std::vector<std::string> precisions_;
    std::string precision_;
    int streams_;
    int batch_;
    int later_batch_;
    int queue_size_;
    std::vector<std::unique_ptr<Lane>> lanes_;  // each is made by the thread that uses it, but for the first
    std::shared_ptr<Pool> pool_;
};

}  // namespace edgedistill::detail
