#include <edgedistill/engine.hpp>
#include <utility>

#include "engine_core.hpp"

namespace edgedistill {

using detail::Bundle;
using detail::EngineCore;
using detail::Submission;

struct Engine::Impl {
    Impl(std::shared_ptr<const Bundle> bundle, const EngineOptions& options, Callback callback)
        : core(std::move(bundle), options, std::move(callback)) {}
    EngineCore core;
};

namespace {

// The pool, held: the engine may go while its caller is inside.
template <class Impl>
std::shared_ptr<detail::Pool> pool_of(const std::unique_ptr<Impl>& impl) {
    if (!impl) throw Error(ErrorKind::closed, "this engine was moved from; use the one that it was moved to");
    return impl->core.pool();
}

}  // namespace

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::Engine(const std::filesystem::path& model, const EngineOptions& options, Callback callback)
    : impl_(std::make_unique<Impl>(Bundle::load(model), options, std::move(callback))) {}

Engine Engine::from_memory(Bytes xml, Bytes weights, const EngineOptions& options, Callback callback) {
    return Engine(std::make_unique<Impl>(Bundle::from_memory(xml, weights), options, std::move(callback)));
}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

bool Engine::submit_file(std::filesystem::path path, Timeout timeout) {
    Submission image;
    image.data = std::move(path);
    return pool_of(impl_)->submit(image, timeout);
}

bool Engine::submit(std::vector<std::uint8_t> encoded, std::string name, Timeout timeout) {
    Submission image;
    image.owned = std::move(encoded);
    image.data = Bytes{image.owned.data(), image.owned.size()};
    image.name = std::move(name);
    return pool_of(impl_)->submit(image, timeout);
}

bool Engine::submit(Bytes encoded, std::shared_ptr<const void> keep_alive, std::string name, Timeout timeout) {
    Submission image;
    image.data = encoded;
    image.keep_alive = std::move(keep_alive);
    image.name = std::move(name);
    return pool_of(impl_)->submit(image, timeout);
}

bool Engine::submit(const ImageView& pixels, std::shared_ptr<const void> keep_alive, std::string name,
                    Timeout timeout) {
    Submission image;
    image.data = pixels;
    image.keep_alive = std::move(keep_alive);
    image.name = std::move(name);
    return pool_of(impl_)->submit(image, timeout);
}

std::optional<Prediction> Engine::next() {
    std::optional<Prediction> answer(std::in_place);
    if (!next(*answer)) answer.reset();
    return answer;
}

bool Engine::next(Prediction& out) {
    return pool_of(impl_)->next(out);
}

void Engine::finish() {
    if (impl_) impl_->core.pool()->finish();
}

void Engine::close() {
    if (impl_) impl_->core.pool()->close();
}

void Engine::wait_until_ready() {
    pool_of(impl_)->wait_until_ready();
}

std::uint64_t Engine::dropped() const noexcept {
    return impl_->core.pool()->dropped();
}
const std::vector<std::string>& Engine::labels() const noexcept {
    return impl_->core.bundle()->labels();
}
const InputSpec& Engine::spec() const noexcept {
    return impl_->core.bundle()->config().stages[0].input_spec;
}
const std::vector<Head>& Engine::heads() const noexcept {
    return impl_->core.bundle()->heads();
}

const std::vector<double>& Engine::thresholds() const noexcept {
    return impl_->core.bundle()->thresholds();
}

std::optional<double> Engine::threshold(int stage, int output) const noexcept {
    return impl_->core.bundle()->threshold(stage, output);
}

bool Engine::multi_label() const noexcept {
    return impl_->core.bundle()->multi_label();
}
const std::string& Engine::precision() const noexcept {
    return impl_->core.precision();
}
int Engine::streams() const noexcept {
    return impl_->core.streams();
}
int Engine::threads() const {
    return impl_->core.threads();
}
int Engine::batch() const noexcept {
    return impl_->core.batch();
}
int Engine::queue_size() const noexcept {
    return impl_->core.queue_size();
}

}  // namespace edgedistill
