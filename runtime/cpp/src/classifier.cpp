#include <edgedistill/classifier.hpp>

#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "bundle.hpp"
#include "network.hpp"
#include "processor.hpp"

namespace edgedistill {

namespace {

using detail::Bundle;
using detail::CompileSettings;
using detail::Frame;

// 0: OpenVINO's own choice (one per physical core), which does not know of a container's quota.
int latency_threads(const Options& options, std::optional<int> tuned) {
    if (options.threads && *options.threads < 1) {
        throw Error(ErrorKind::usage, "threads " + std::to_string(*options.threads) + ", expected 1 or more");
    }
    const int cores = detail::usable_cores();
    if (options.threads) return *options.threads;
    if (tuned) return std::min(*tuned, cores);
    return cores < ::sysconf(_SC_NPROCESSORS_ONLN) ? cores : 0;
}

CompileSettings latency_settings(const Bundle& bundle, const Options& options) {
    const detail::LatencySettings tuned = detail::settings_here(bundle, options.log).latency;
    CompileSettings settings;
    const std::size_t stages = bundle.config().stages.size();
    settings.precisions =
        resolve_precisions(bundle, options.precision,
                           detail::stage_precisions(tuned.precision, tuned.later_precision, stages), options.log);
    settings.decode = options.decode.value_or(bundle.config().decode);
    settings.latency = true;
    settings.threads = latency_threads(options, tuned.threads);
    settings.cache = options.cache;
    settings.max_pixels = options.max_pixels;
    return settings;
}

}  // namespace

struct Classifier::Impl {
    Impl(const std::shared_ptr<const Bundle>& bundle, const Options& options)
        : network(bundle, latency_settings(*bundle, options)),
          precision(detail::precision_name(network.settings().precisions)),
          worker(network) {
        bundle->forget_models();
    }

    void answer(const Frame& frame, Prediction& out) {
        const Frame* frames = &frame;
        worker.answer(&frames, 1, &out);
        if (!out.ok()) throw Error(ErrorKind::image, out.error);
    }

    detail::Network network;
    std::string precision;
    std::mutex mutex;  // guards what follows
    detail::Worker worker;
    // One each: a frame that changes its kind would allocate.
    Frame file{{}, std::filesystem::path()};
    Frame encoded{{}, Bytes{}};
    Frame pixels{{}, ImageView{}};
};

Classifier::Classifier(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Classifier::Classifier(const std::filesystem::path& model, const Options& options)
    : impl_(std::make_unique<Impl>(Bundle::load(model), options)) {}

Classifier Classifier::from_memory(Bytes xml, Bytes weights, const Options& options) {
    return Classifier(std::make_unique<Impl>(Bundle::from_memory(xml, weights), options));
}

Classifier::~Classifier() = default;
Classifier::Classifier(Classifier&&) noexcept = default;
Classifier& Classifier::operator=(Classifier&&) noexcept = default;

void Classifier::classify(const ImageView& pixels, Prediction& out) {
    const std::lock_guard lock(impl_->mutex);
    std::get<ImageView>(impl_->pixels.data) = pixels;
    impl_->answer(impl_->pixels, out);
}

void Classifier::classify(Bytes encoded, Prediction& out) {
    const std::lock_guard lock(impl_->mutex);
    std::get<Bytes>(impl_->encoded.data) = encoded;
    impl_->answer(impl_->encoded, out);
}

void Classifier::classify_file(const std::filesystem::path& path, Prediction& out) {
    const std::lock_guard lock(impl_->mutex);
    std::get<std::filesystem::path>(impl_->file.data) = path;
    impl_->file.name.assign(path.native());
    impl_->answer(impl_->file, out);
}

Prediction Classifier::classify(const ImageView& pixels) {
    Prediction out;
    classify(pixels, out);
    return out;
}

Prediction Classifier::classify(Bytes encoded) {
    Prediction out;
    classify(encoded, out);
    return out;
}

Prediction Classifier::classify_file(const std::filesystem::path& path) {
    Prediction out;
    classify_file(path, out);
    return out;
}

const std::vector<std::string>& Classifier::labels() const noexcept {
    return impl_->network.bundle().labels();
}

const InputSpec& Classifier::spec() const noexcept {
    return impl_->network.bundle().config().stages[0].input_spec;
}

const std::vector<Head>& Classifier::heads() const noexcept {
    return impl_->network.bundle().heads();
}

const std::vector<double>& Classifier::thresholds() const noexcept {
    return impl_->network.bundle().thresholds();
}

std::optional<double> Classifier::threshold(int stage, int output) const noexcept {
    return impl_->network.bundle().threshold(stage, output);
}

bool Classifier::multi_label() const noexcept {
    return impl_->network.bundle().multi_label();
}

double Classifier::temperature() const noexcept {
    return impl_->network.bundle().config().stages[0].temperature;
}

const std::string& Classifier::precision() const noexcept {
    return impl_->precision;
}

int Classifier::threads() const {
    return impl_->network.threads();
}

}  // namespace edgedistill
