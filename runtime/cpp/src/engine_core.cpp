#include "engine_core.hpp"

#include <algorithm>
#include <edgedistill/error.hpp>
#include <system_error>
#include <utility>

#include "network.hpp"
#include "processor.hpp"

namespace edgedistill::detail {

namespace {

constexpr int MAX_COUNT = 4096;
// So many times a later stage's batch is held for it to fill up: where a share of 1/8 or more is passed on, it does.
constexpr int GATHERED_BATCHES = 8;
constexpr int CAMERA_BATCH = 8;

void check_count(const char* name, int value) {
    if (value >= 1 && value <= MAX_COUNT) return;
    throw Error(ErrorKind::usage, std::string(name) + ' ' + std::to_string(value) + ", expected 1 to 4096");
}

int streams_of(const ThroughputSettings& tuned, const EngineOptions& options) {
    const int cores = usable_cores();
    return options.streams.value_or(std::min({tuned.streams.value_or(cores), options.threads.value_or(cores), cores}));
}

int threads_per_stream(const ThroughputSettings& tuned, const EngineOptions& options, int streams) {
    const int chosen = std::max(streams, std::min(tuned.threads.value_or(0), usable_cores()));
    return options.threads.value_or(chosen) / streams;
}

// deploy.json's batch, or less where the queue has no room for it or a camera waits for its answers.
int fitting_batch(int tuned, const EngineOptions& options, int streams) {
    int most = options.policy == Policy::drop_oldest ? std::min(tuned, CAMERA_BATCH) : tuned;
    if (options.queue_size && streams > 0) most = std::min(most, (*options.queue_size - 1) / streams);
    return std::max(1, most);
}

}  // namespace

// One compiled network per worker, inferring in the worker's own thread: 1.3 times the rate of one network with as many
// streams, which hands each image to a thread of OpenVINO's and back.
struct EngineCore::Lane {
    explicit Lane(const Blueprint& blueprint) : network(blueprint.compile()), worker(network) {}
    Network network;
    Worker worker;
};

EngineCore::EngineCore(std::shared_ptr<const Bundle> bundle, const EngineOptions& options, Engine::Callback callback)
    : bundle_(std::move(bundle)),
      tuned_(settings_here(*bundle_, options.log).throughput),
      streams_(streams_of(tuned_, options)),
      batch_(options.batch.value_or(fitting_batch(tuned_.batch, options, streams_))),
      later_batch_(options.batch.value_or(fitting_batch(tuned_.later_batch.value_or(tuned_.batch), options, streams_))),
      queue_size_(0) {
    check(options);
    queue_size_ = options.queue_size.value_or(usual_queue_size(options.policy));
    if (queue_size_ <= streams_ * batch_) {
        throw Error(ErrorKind::usage,
                    "queue_size " + std::to_string(queue_size_) +
                        ", expected more than streams x batch = " + std::to_string(streams_ * batch_));
    }
    const std::size_t stages = bundle_->config().stages.size();
    precisions_ = resolve_precisions(*bundle_, options.precision,
                                     stage_precisions(tuned_.precision, tuned_.later_precision, stages), options.log);
    precision_ = precision_name(precisions_);
    start(options, std::move(callback));
}

EngineCore::~EngineCore() {
    if (pool_) pool_->close();
}

int EngineCore::threads() const {
    return streams_ * lanes_.front()->network.threads();
}

// A camera's images are to be new, but more than workers can have in hand, of any stage; anything else can wait for a
// batch.
int EngineCore::usual_queue_size(Policy policy) const {
    const int later = bundle_->config().stages.size() > 1 ? later_batch_ : 1;
    if (policy == Policy::drop_oldest) return 4 * streams_ * std::max(batch_, later) + 1;
    return 4 * streams_ * batch_ + 1 + GATHERED_BATCHES * (later - 1);
}

void EngineCore::check(const EngineOptions& options) const {
    if (options.threads) check_count("threads", *options.threads);
    check_count("streams", streams_);
    check_count("batch", batch_);
    if (options.threads && *options.threads < streams_) {
        throw Error(ErrorKind::usage, "threads " + std::to_string(*options.threads) +
                                          ", expected at least one for each of the " + std::to_string(streams_) +
                                          " streams");
    }
    if (options.policy != Policy::block && options.policy != Policy::drop_oldest) {
        throw Error(ErrorKind::usage, "policy " + std::to_string(static_cast<int>(options.policy)) +
                                          ", expected 'block' or 'drop_oldest'");
    }
}

CompileSettings EngineCore::compile_settings(const EngineOptions& options) const {
    CompileSettings settings;
    settings.precisions = precisions_;
    settings.decode = options.decode.value_or(bundle_->config().decode);
    settings.batch = batch_;
    settings.later_batch = later_batch_;
    settings.threads = threads_per_stream(tuned_, options, streams_);
    settings.pinning = tuned_.pinning.value_or(false);  // or OpenVINO pins every worker to the same first core
    settings.cache = options.cache;
    settings.max_pixels = options.max_pixels;
    return settings;
}

// The pool closes, and its threads end, before the lanes go.
Pool::Answer EngineCore::open_lane(std::size_t number, const Blueprint& blueprint) {
    lanes_[number] = std::make_unique<Lane>(blueprint);
    return [&worker = lanes_[number]->worker](std::size_t stage, Task* const* tasks, std::size_t count) {
        worker.step(stage, tasks, count);
    };
}

// The first lane is compiled here, and what is wrong with the model is thrown here; OpenVINO's CPU part also gives the
// thread that loads it a signal stack until it is unloaded, so no passing thread should. The other lanes are compiled
// by their threads while the first one answers: OpenVINO reads its cache for one network after the other anyway.
void EngineCore::start(const EngineOptions& options, Engine::Callback callback) {
    const auto blueprint = std::make_shared<const Blueprint>(bundle_, compile_settings(options));
    bundle_->forget_models();
    lanes_.resize(static_cast<std::size_t>(streams_));
    std::vector<Pool::Make> makers;
    makers.emplace_back([first = open_lane(0, *blueprint)] { return first; });
    while (makers.size() < lanes_.size()) {
        makers.emplace_back([this, number = makers.size(), blueprint] { return open_lane(number, *blueprint); });
    }
    PoolSettings settings;
    settings.capacity = static_cast<std::size_t>(queue_size_);
    settings.batches.assign(bundle_->config().stages.size(), static_cast<std::size_t>(later_batch_));
    settings.batches[0] = static_cast<std::size_t>(batch_);
    settings.pixel_bytes = later_pixel_bytes(*bundle_);
    settings.policy = options.policy;
    settings.callback = std::move(callback);
    pool_ = std::make_shared<Pool>(std::move(settings));
    try {
        pool_->start(std::move(makers));
    } catch (const std::system_error& error) {
        throw Error(ErrorKind::model,
                    std::to_string(streams_) + " threads cannot be started (" + error.what() + "); use fewer streams");
    }
}

}  // namespace edgedistill::detail
