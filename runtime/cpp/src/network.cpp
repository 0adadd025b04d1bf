#include "network.hpp"

#include <pwd.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <mutex>
#include <new>
#include <openvino/runtime/core.hpp>
#include <optional>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include "bundle.hpp"
#include "error.hpp"
#include "normalisation.hpp"
#include "preparer.hpp"

namespace edgedistill::detail {

namespace {

namespace fs = std::filesystem;

constexpr int max_batch = 4096;

int cores_of_affinity() {
    // More than a cpu_set_t has room for, for machines with more than 1024 CPUs.
    constexpr int most = 1 << 16;
    const std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set(CPU_ALLOC(most), [](cpu_set_t* s) { CPU_FREE(s); });
    const std::size_t size = CPU_ALLOC_SIZE(most);
    if (set && ::sched_getaffinity(0, size, set.get()) == 0) return std::max(1, CPU_COUNT_S(size, set.get()));
    return std::max(1, static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN)));
}

// OpenVINO keeps compiled models here; nothing: switched off, or nowhere to write. A cache is a convenience: a folder
// that cannot be written never fails anything.
std::optional<fs::path> cache_folder(const ModelCache& cache) {
    if (!cache.enabled) return std::nullopt;
    const auto setting = [](const char* name) { return std::string_view(std::getenv(name) ? std::getenv(name) : ""); };
    fs::path folder;
    if (!cache.folder.empty()) {
        folder = cache.folder;
    } else if (!setting("EDGEDISTILL_CACHE").empty()) {
        folder = fs::path(setting("EDGEDISTILL_CACHE")) / "openvino";
    } else {
        fs::path base = setting("XDG_CACHE_HOME");
        if (base.empty()) {
            fs::path home = setting("HOME");
            if (home.empty()) {
                const passwd* user = ::getpwuid(::getuid());
                if (user == nullptr) return std::nullopt;
                home = user->pw_dir;
            }
            base = home / ".cache";
        }
        folder = base / "edgedistill" / "openvino";
    }
    std::error_code error;
    fs::create_directories(folder, error);
    if (error || !fs::is_directory(folder, error) || ::access(folder.c_str(), W_OK | X_OK) != 0) return std::nullopt;
    return folder;
}

ov::AnyMap compile_properties(const CompileSettings& settings, const std::string& precision) {
    ov::AnyMap properties{
        // Always said: OpenVINO's own default is bfloat16 where the CPU has it.
        {"INFERENCE_PRECISION_HINT", precision == "bf16" ? "bf16" : "f32"},
        {"NUM_STREAMS", "1"},
    };
    if (settings.latency) {
        properties["PERFORMANCE_HINT"] = "LATENCY";
    } else {
        properties["ENABLE_CPU_PINNING"] = settings.pinning;
    }
    if (settings.threads > 0) properties["INFERENCE_NUM_THREADS"] = settings.threads;
    if (const auto folder = cache_folder(settings.cache)) properties["CACHE_DIR"] = folder->string();
    return properties;
}

struct CompiledStage {
    const Stage* settings = nullptr;
    const ModelMetadata* metadata = nullptr;
    std::size_t batch = 1;
    ov::CompiledModel compiled;
    // A later stage with a batch above 1 has the same network for one image too, for when few are left.
    std::optional<ov::CompiledModel> alone;
};

// What comes out must be what the host code reads: float32 [batch, C].
void check_output(const ov::CompiledModel& compiled, const ov::Shape& expected, const std::string& name) {
    const auto output = compiled.output();
    const bool fits = output.get_element_type() == ov::element::f32 && output.get_partial_shape().is_static() &&
                      output.get_shape() == expected;
    if (fits) return;
    throw Error(ErrorKind::model, name + ": output " + output.get_element_type().to_string() + " " +
                                      output.get_partial_shape().to_string() + "; expected f32 " +
                                      ov::PartialShape(expected).to_string());
}

// A stage before it is compiled.
struct DrawnStage {
    const Stage* settings = nullptr;
    const ModelMetadata* metadata = nullptr;
    std::size_t batch = 1;
    std::string precision;
    std::shared_ptr<const ov::Model> model;
    std::shared_ptr<const ov::Model> alone;  // nothing: as in CompiledStage
};

[[noreturn]] void refuse_to_compile(const Bundle& bundle, const std::string& precision, const std::exception& error) {
    throw Error(ErrorKind::model, bundle.source() + ": OpenVINO cannot compile it at precision " + precision + " (" +
                                      last_line(error) + ")");
}

std::shared_ptr<const ov::Model> draw_model(const Bundle& bundle, std::size_t number, int batch,
                                            const CompileSettings& settings) {
    const ModelMetadata& metadata = bundle.metadata()[number];
    const InputSpec& spec = bundle.config().stages[number].input_spec;
    const auto model = bundle.read_model(number, settings.precisions[number]);
    if (batch > 1) reshape_model(*model, metadata, spec, batch, bundle.source());
    try {
        embed_normalisation(model, spec, metadata.bgr, metadata.nhwc);
    } catch (const std::exception& error) {
        refuse_to_compile(bundle, settings.precisions[number], error);
    }
    return model;
}

DrawnStage draw_stage(const Bundle& bundle, std::size_t number, const CompileSettings& settings) {
    const int batch = number == 0 ? settings.batch : settings.later_batch;
    DrawnStage stage;
    stage.settings = &bundle.config().stages[number];
    stage.metadata = &bundle.metadata()[number];
    stage.batch = static_cast<std::size_t>(batch);
    stage.precision = settings.precisions[number];
    stage.model = draw_model(bundle, number, batch, settings);
    if (number > 0 && batch > 1) stage.alone = draw_model(bundle, number, 1, settings);
    return stage;
}

using Copy = std::function<std::shared_ptr<const ov::Model>(const ov::Model&)>;

CompiledStage compile_stage(const Bundle& bundle, const DrawnStage& drawn, const CompileSettings& settings,
                            const Copy& copied) {
    const ov::AnyMap properties = compile_properties(settings, drawn.precision);
    const auto compile = [&](const ov::Model& model, std::size_t batch) {
        try {
            auto compiled = bundle.core().compile_model(copied(model), "CPU", properties);
            check_output(compiled, {batch, drawn.metadata->labels.size()}, bundle.source());
            return compiled;
        } catch (const Error&) {
            throw;
        } catch (const std::exception& error) {
            refuse_to_compile(bundle, drawn.precision, error);
        }
    };
    CompiledStage stage{drawn.settings, drawn.metadata, drawn.batch, compile(*drawn.model, drawn.batch), {}};
    if (drawn.alone) stage.alone = compile(*drawn.alone, 1);
    return stage;
}

// The smallest float64 whose nearest float32 is 1: a sigmoid that came out as 1 in float32 was at least that.
constexpr double almost_one = 1.0 - 1.0 / (1 << 25);

// What the network gave -> logits.
void read_logits(const ModelMetadata& metadata, const float* raw, std::vector<float>& logits) {
    constexpr float tiny = std::numeric_limits<float>::min();
    std::copy_n(raw, metadata.labels.size(), logits.begin());
    if (!metadata.gives_probabilities) return;
    for (float& value : logits) {
        // Written so that what is not a number stays so.
        const float share = value < tiny ? tiny : value;
        if (metadata.multi_label) {
            const double capped = share > almost_one ? almost_one : static_cast<double>(share);
            value = static_cast<float>(std::log(capped) - std::log1p(-capped));
        } else {
            value = std::log(share);
        }
    }
}

using Floats = std::vector<float>::iterator;

// softmax(logits / temperature) of [begin, end), in float64. `weights`: room for as many.
void softmax(Floats begin, Floats end, double temperature, std::vector<double>& weights, Floats out) {
    const auto count = static_cast<std::size_t>(end - begin);
    double largest = -std::numeric_limits<double>::infinity();
    for (std::size_t index = 0; index < count; ++index, ++begin) {
        weights[index] = static_cast<double>(*begin) / temperature;
        largest = std::max(largest, weights[index]);
    }
    double sum = 0.0;
    for (std::size_t index = 0; index < count; ++index) sum += weights[index] = std::exp(weights[index] - largest);
    for (std::size_t index = 0; index < count; ++index, ++out) *out = static_cast<float>(weights[index] / sum);
}

// sigmoid(logits / temperature) of [begin, end), in float64.
void sigmoid(Floats begin, Floats end, double temperature, Floats out) {
    for (; begin != end; ++begin, ++out) {
        const double scaled = static_cast<double>(*begin) / temperature;
        const double small = std::exp(-std::abs(scaled));
        *out = static_cast<float>((scaled >= 0 ? 1.0 : small) / (1.0 + small));
    }
}

// But for its heads, whose memory is used again.
void clear_answer(Prediction& out) {
    out.label.clear();
    out.index = -1;
    out.probability = 0.0F;
    out.probabilities.clear();
    out.accepted.clear();
    out.stage = 0;
    out.error.clear();
}

void fail(Prediction& out, const std::string& error) {
    clear_answer(out);
    out.heads.clear();
    out.error = error;
}

}  // namespace

int usable_cores() {
    const int cores = cores_of_affinity();
    std::ifstream file("/sys/fs/cgroup/cpu.max");
    long long quota = 0;
    long long period = 0;
    // "max 100000": no quota.
    if (!(file >> quota >> period) || quota <= 0 || period <= 0) return cores;
    const long long allowed = (quota - 1) / period + 1;
    return static_cast<int>(std::min<long long>(cores, allowed));
}

std::vector<std::string> resolve_precisions(const Bundle& bundle, const std::string& asked,
                                            std::vector<std::string> tuned, const LogCallback& log) {
    if (!asked.empty() && !is_precision(asked)) {
        throw Error(ErrorKind::usage, "precision '" + asked + "', expected one of f32, bf16, int8");
    }
    std::vector<std::string> precisions = std::move(tuned);
    if (!asked.empty()) std::fill(precisions.begin(), precisions.end(), asked);
    if (std::find(precisions.begin(), precisions.end(), "bf16") == precisions.end()) return precisions;
    std::vector<std::string> capabilities;
    try {
        capabilities = bundle.core().get_property("CPU", ov::device::capabilities);
    } catch (const std::exception& error) {
        throw Error(ErrorKind::model, std::string("OpenVINO has no CPU device here (") + last_line(error) + ")");
    }
    if (std::find(capabilities.begin(), capabilities.end(), "BF16") != capabilities.end()) return precisions;
    if (!asked.empty()) {
        throw Error(ErrorKind::model, "precision 'bf16': this CPU has no bfloat16; use 'f32' or 'int8'");
    }
    warn(log, bundle.source() + " is tuned for bf16, which this CPU does not have: running at f32");
    std::replace(precisions.begin(), precisions.end(), std::string("bf16"), std::string("f32"));
    return precisions;
}

struct Network::Impl {
    std::shared_ptr<const Bundle> bundle;
    CompileSettings settings;
    std::vector<CompiledStage> stages;
};

struct Blueprint::Impl {
    std::shared_ptr<const Bundle> bundle;
    CompileSettings settings;
    std::vector<DrawnStage> stages;
    std::mutex copying;
};

Blueprint::Blueprint(std::shared_ptr<const Bundle> bundle, const CompileSettings& settings)
    : impl_(std::make_unique<Impl>()) {
    if (settings.batch < 1 || settings.batch > max_batch) {
        throw Error(ErrorKind::usage, "batch " + std::to_string(settings.batch) + ", expected 1 to 4096");
    }
    if (settings.max_pixels < 1) {
        throw Error(ErrorKind::usage, "max_pixels " + std::to_string(settings.max_pixels) + ", expected 1 or more");
    }
    if (settings.precisions.size() != bundle->config().stages.size()) {
        throw Error(ErrorKind::usage, std::to_string(settings.precisions.size()) +
                                          " precisions, expected one for each of " +
                                          std::to_string(bundle->config().stages.size()) + " stages");
    }
    impl_->bundle = std::move(bundle);
    impl_->settings = settings;
    const Bundle& source = *impl_->bundle;
    for (std::size_t number = 0; number < source.config().stages.size(); ++number) {
        impl_->stages.push_back(draw_stage(source, number, settings));
    }
}

Blueprint::~Blueprint() = default;

Network Blueprint::compile() const {
    // Two threads must not have OpenVINO look through one model at once.
    const auto copied = [this](const ov::Model& model) {
        const std::lock_guard lock(impl_->copying);
        return std::shared_ptr<const ov::Model>(model.clone());
    };
    const Bundle& bundle = *impl_->bundle;
    auto network = std::make_unique<Network::Impl>(Network::Impl{impl_->bundle, impl_->settings, {}});
    for (const DrawnStage& drawn : impl_->stages) {
        network->stages.push_back(compile_stage(bundle, drawn, impl_->settings, copied));
    }
    return Network(std::move(network));
}

Network::Network(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Network::Network(std::shared_ptr<const Bundle> bundle, const CompileSettings& settings)
    : Network(Blueprint(std::move(bundle), settings).compile()) {}

Network::~Network() = default;
Network::Network(Network&&) noexcept = default;
Network& Network::operator=(Network&&) noexcept = default;

const Bundle& Network::bundle() const noexcept {
    return *impl_->bundle;
}
const CompileSettings& Network::settings() const noexcept {
    return impl_->settings;
}
int Network::threads() const {
    return impl_->stages.back().compiled.get_property("INFERENCE_NUM_THREADS").as<int>();
}

namespace {

// One infer request whose input and output memory are ours: images are resized straight into it.
class StageRunner {
public:
    StageRunner(const CompiledStage& stage, ov::CompiledModel compiled, std::size_t batch)
        : stage_(&stage),
          batch_(batch),
          request_(compiled.create_infer_request()),
          pixels_(ov::element::u8, input_shape(stage, batch)),
          scores_(ov::element::f32, ov::Shape{batch, stage.metadata->labels.size()}) {
        std::fill_n(pixels_.data<std::uint8_t>(), pixels_.get_size(), std::uint8_t{0});
        request_.set_input_tensor(pixels_);
        request_.set_output_tensor(scores_);
    }

    const CompiledStage& stage() const { return *stage_; }
    const InputSpec& spec() const { return stage_->settings->input_spec; }
    std::size_t batch() const { return batch_; }
    std::size_t image_bytes() const { return pixels_.get_size() / batch_; }
    // uint8 [height, width, 3] BGR
    std::uint8_t* pixels(std::size_t number) { return pixels_.data<std::uint8_t>() + number * image_bytes(); }
    // float32 [C]
    const float* scores(std::size_t number) { return scores_.data<float>() + number * stage_->metadata->labels.size(); }
    void run() { request_.infer(); }

private:
    static ov::Shape input_shape(const CompiledStage& stage, std::size_t batch) {
        const InputSpec& spec = stage.settings->input_spec;
        return {batch, static_cast<std::size_t>(spec.height), static_cast<std::size_t>(spec.width), 3};
    }

    const CompiledStage* stage_;
    std::size_t batch_;
    ov::InferRequest request_;
    ov::Tensor pixels_;
    ov::Tensor scores_;
};

// A stage as one worker runs it.
struct Runner {
    explicit Runner(const CompiledStage& stage) : full(stage, stage.compiled, stage.batch) {
        if (stage.alone) alone.emplace(stage, *stage.alone, 1);
    }

    // A batch costs the same however few images are in it.
    StageRunner& fitting(std::size_t count) { return alone && 4 * count < 3 * full.batch() ? *alone : full; }

    StageRunner full;
    std::optional<StageRunner> alone;
};

std::vector<Runner> make_runners(const Network& network) {
    try {
        const auto& stages = network.impl().stages;
        return {stages.begin(), stages.end()};
    } catch (const std::exception& error) {
        throw Error(ErrorKind::model,
                    network.bundle().source() + ": OpenVINO cannot run it (" + last_line(error) + ")");
    }
}

}  // namespace

struct Worker::Impl {
    explicit Impl(const Network& compiled)
        : network(&compiled),
          runners(make_runners(compiled)),
          preparer(compiled.settings().max_pixels),
          prepares_ahead(runners.size() > 1 && !same_pixels(spec(0), spec(1))),
          is_ahead(runners[0].full.batch()),
          logits(compiled.bundle().labels().size()),
          weights(compiled.bundle().labels().size()),
          own_tasks(runners[0].full.batch()),
          hand(own_tasks.size()) {
        for (Task& task : own_tasks) task.pixels.reserve(later_pixel_bytes(compiled.bundle()));
    }

    const InputSpec& spec(std::size_t stage) const { return runners[stage].full.spec(); }

    bool load(const Frame& frame, const InputSpec& spec, std::uint8_t* out, Prediction& answer);
    bool load_first(Task& task, std::size_t place);
    bool load_data(const Frame& frame, const InputSpec& spec, std::uint8_t* out, const Preparer::Second* second);
    void run(StageRunner& runner);
    bool finish(std::size_t stage, const float* raw, Prediction& out);
    bool finish_heads(std::size_t stage, Prediction& out);
    enum class Verdict { ask_next, unknown, known };
    Verdict settle(std::size_t stage, Prediction& out) const;
    void answer_head(const Head& head, double temperature, Prediction& out, HeadPrediction& answer);
    void score(const CompiledStage& stage, const float* raw, Prediction& out);
    void accept(const CompiledStage& stage, Prediction& out) const;
    void answer(std::size_t count);
    void begin(Task* const* tasks, std::size_t count);
    void go_on(std::size_t stage, Task* const* tasks, std::size_t count);
    bool pass_on(std::size_t stage, std::size_t place, Task& task);

    const Network* network;
    std::vector<Runner> runners;
    Preparer preparer;
    // The second stage's pixels come from the first one's decoding, where that is possible.
    bool prepares_ahead;
    std::vector<bool> is_ahead;   // for each place in the first stage's batch
    std::vector<float> logits;    // [C]
    std::vector<double> weights;  // [C]
    std::vector<Task> own_tasks;  // of `answer`
    std::vector<Task*> hand;
};

namespace {

// False, and `answer` says why, when the image cannot be read.
template <typename Body>
bool is_read(const Frame& frame, Prediction& answer, const Body& body) {
    try {
        body();
        return true;
    } catch (const Error& error) {
        if (error.kind() != ErrorKind::image) throw;
        fail(answer, error.what());
    } catch (const std::bad_alloc&) {
        fail(answer, frame.name + ": not enough memory to decode it; make it smaller");
    }
    return false;
}

}  // namespace

bool Worker::Impl::load(const Frame& frame, const InputSpec& spec, std::uint8_t* out, Prediction& answer) {
    return is_read(frame, answer, [&] { load_data(frame, spec, out, nullptr); });
}

// Into that place of the first stage's batch, and where that costs no decoding, what the second stage sees.
bool Worker::Impl::load_first(Task& task, std::size_t place) {
    StageRunner& first = runners[0].full;
    is_ahead[place] = false;
    if (!prepares_ahead) return load(*task.frame, first.spec(), first.pixels(place), *task.answer);
    task.pixels.resize(runners[1].full.image_bytes());
    const Preparer::Second second{&spec(1), task.pixels.data()};
    return is_read(*task.frame, *task.answer,
                   [&] { is_ahead[place] = load_data(*task.frame, first.spec(), first.pixels(place), &second); });
}

// Whether `second` was prepared too.
bool Worker::Impl::load_data(const Frame& frame, const InputSpec& spec, std::uint8_t* out,
                             const Preparer::Second* second) {
    const Decode decode = network->settings().decode;
    if (const auto* path = std::get_if<fs::path>(&frame.data)) {
        return preparer.load_file(*path, frame.name, spec, decode, out, second);
    }
    if (const auto* encoded = std::get_if<Bytes>(&frame.data)) {
        std::array<char, 40> unnamed{"<"};
        const auto end = std::to_chars(unnamed.data() + 1, unnamed.data() + 24, encoded->size).ptr;
        constexpr std::string_view unit = " bytes>";
        std::copy(unit.begin(), unit.end(), end);
        const std::string_view name(unnamed.data(), static_cast<std::size_t>(end - unnamed.data()) + unit.size());
        return preparer.load(*encoded, frame.name.empty() ? name : std::string_view(frame.name), spec, decode, out,
                             second);
    }
    constexpr std::string_view unnamed = "image";
    const auto name = frame.name.empty() ? unnamed : std::string_view(frame.name);
    preparer.prepare(std::get<ImageView>(frame.data), name, spec, out);
    return false;
}

void Worker::Impl::run(StageRunner& runner) {
    try {
        runner.run();
    } catch (const std::exception& error) {
        throw Error(ErrorKind::model,
                    network->bundle().source() + ": OpenVINO cannot run it (" + last_line(error) + ")");
    }
}

// float32 [C] -> the answer; false when a later stage has to be asked.
bool Worker::Impl::finish(std::size_t number, const float* raw, Prediction& out) {
    const CompiledStage& stage = runners[number].full.stage();
    read_logits(*stage.metadata, raw, logits);
    if (!std::all_of(logits.begin(), logits.end(), [](float value) { return std::isfinite(value); })) {
        fail(out, (out.name.empty() ? "image" : out.name) + ": the network's output is not finite (precision " +
                      network->settings().precisions[number] + ")");
        return true;
    }
    out.probabilities.resize(logits.size());
    if (!stage.metadata->heads.empty()) return finish_heads(number, out);
    out.heads.clear();
    if (stage.metadata->multi_label) {
        sigmoid(logits.begin(), logits.end(), stage.settings->temperature, out.probabilities.begin());
    } else {
        softmax(logits.begin(), logits.end(), stage.settings->temperature, weights, out.probabilities.begin());
    }
    // From the logits: after rounding two probabilities may be equal.
    const auto index = static_cast<std::size_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
    out.probability = out.probabilities[index];
    out.index = static_cast<int>(index);
    const Verdict verdict = settle(number, out);
    if (verdict != Verdict::known) return verdict == Verdict::unknown;
    out.label.assign(stage.metadata->labels[index]);
    if (stage.metadata->multi_label) accept(stage, out);
    return true;
}

// The logits of one head -> its probabilities or value, and its answer.
void Worker::Impl::answer_head(const Head& head, double temperature, Prediction& out, HeadPrediction& answer) {
    const auto first = static_cast<std::ptrdiff_t>(head.first);
    const auto begin = logits.begin() + first;
    const auto end = begin + static_cast<std::ptrdiff_t>(head.width());
    const auto shares = out.probabilities.begin() + first;
    answer.name.assign(head.name);
    answer.kind = head.kind;
    answer.label.clear();
    answer.accepted.clear();
    answer.index = -1;
    answer.probability = answer.value = 0.0F;
    if (head.kind == HeadKind::regression) {
        answer.value = *shares = static_cast<float>(static_cast<double>(*begin) * head.std + head.mean);
        return;
    }
    if (head.kind == HeadKind::softmax) {
        softmax(begin, end, temperature, weights, shares);
    } else {
        sigmoid(begin, end, temperature, shares);
    }
    // From the logits: after rounding two probabilities may be equal.
    const auto best = std::max_element(begin, end) - begin;
    answer.index = static_cast<int>(best);
    answer.probability = shares[best];
    if (head.kind == HeadKind::softmax) {
        answer.label.assign(head.classes[static_cast<std::size_t>(best)]);
        return;
    }
    for (std::size_t place = 0; place < head.width(); ++place) {
        if (shares[static_cast<std::ptrdiff_t>(place)] < static_cast<float>(head.thresholds[place])) continue;
        answer.accepted.push_back(static_cast<int>(place));
        answer.label.append(answer.label.empty() ? "" : "|").append(head.classes[place]);
    }
    if (answer.accepted.empty()) answer.label.assign("none");
}

// As finish, of a network with several heads: its confidence is the smallest over the heads of classes.
bool Worker::Impl::finish_heads(std::size_t number, Prediction& out) {
    const CompiledStage& stage = runners[number].full.stage();
    const std::vector<Head>& heads = stage.metadata->heads;
    out.heads.resize(heads.size());
    out.label.clear();
    out.probability = std::numeric_limits<float>::infinity();
    for (std::size_t place = 0; place < heads.size(); ++place) {
        HeadPrediction& answer = out.heads[place];
        answer_head(heads[place], stage.settings->temperature, out, answer);
        if (answer.kind == HeadKind::regression) continue;
        out.probability = std::min(out.probability, answer.probability);
        out.label.append(place == 0 ? "" : ", ").append(answer.label);
    }
    out.index = out.heads[0].index;
    return settle(number, out) != Verdict::ask_next;
}

// By the answer's confidence; an unknown one loses its label.
Worker::Impl::Verdict Worker::Impl::settle(std::size_t number, Prediction& out) const {
    out.stage = static_cast<int>(number);
    const bool last = number + 1 == runners.size();
    const auto confidence = static_cast<double>(out.probability);
    if (!last) {
        const double threshold = runners[number].full.stage().settings->exit_threshold.value_or(0.0);
        if (confidence < threshold) return Verdict::ask_next;
    }
    const auto reject_below = network->bundle().config().reject_below;
    if (!reject_below || !(confidence < *reject_below)) return Verdict::known;
    out.index = -1;
    out.label.assign("unknown");
    return Verdict::unknown;
}

void Worker::Impl::accept(const CompiledStage& stage, Prediction& out) const {
    // As numpy compares float32 with a number.
    const std::vector<double>& thresholds = stage.metadata->thresholds;
    for (std::size_t index = 0; index < out.probabilities.size(); ++index) {
        if (out.probabilities[index] < static_cast<float>(thresholds[index])) continue;
        out.accepted.push_back(static_cast<int>(index));
    }
}

// What the stage after `stage` sees of the image in that place of its batch -> task.pixels. False, and the answer says
// why, when the image cannot be read again: the file may have changed.
bool Worker::Impl::pass_on(std::size_t stage, std::size_t place, Task& task) {
    const std::size_t size = runners[stage + 1].full.image_bytes();
    const bool same = same_pixels(spec(stage), spec(stage + 1));
    if (stage == 0 ? is_ahead[place] : same) return true;
    task.pixels.resize(size);
    if (!same) return load(*task.frame, spec(stage + 1), task.pixels.data(), *task.answer);
    std::copy_n(runners[0].full.pixels(place), size, task.pixels.data());
    return true;
}

void Worker::Impl::begin(Task* const* tasks, std::size_t count) {
    StageRunner& first = runners[0].full;
    bool any = false;
    for (std::size_t place = 0; place < count; ++place) {
        Task& task = *tasks[place];
        clear_answer(*task.answer);
        task.answer->name.assign(task.frame->name);
        task.passed_on = false;
        any = load_first(task, place) || any;
    }
    if (!any) return;
    run(first);
    for (std::size_t place = 0; place < count; ++place) {
        Task& task = *tasks[place];
        if (!task.answer->ok()) continue;
        task.passed_on = !finish(0, first.scores(place), *task.answer) && pass_on(0, place, task);
    }
}

void Worker::Impl::go_on(std::size_t stage, Task* const* tasks, std::size_t count) {
    StageRunner& runner = runners[stage].fitting(count);
    for (std::size_t start = 0; start < count; start += runner.batch()) {
        const std::size_t part = std::min(runner.batch(), count - start);
        for (std::size_t place = 0; place < part; ++place) {
            std::copy_n(tasks[start + place]->pixels.data(), runner.image_bytes(), runner.pixels(place));
        }
        run(runner);
        for (std::size_t place = 0; place < part; ++place) {
            Task& task = *tasks[start + place];
            task.passed_on = !finish(stage, runner.scores(place), *task.answer) && pass_on(stage, place, task);
        }
    }
}

// The first `count` of own_tasks, by as many stages as each needs.
void Worker::Impl::answer(std::size_t count) {
    for (std::size_t place = 0; place < count; ++place) hand[place] = &own_tasks[place];
    begin(hand.data(), count);
    for (std::size_t stage = 1; stage < runners.size(); ++stage) {
        const auto end = std::remove_if(hand.begin(), hand.begin() + static_cast<std::ptrdiff_t>(count),
                                        [](const Task* task) { return !task->passed_on; });
        count = static_cast<std::size_t>(end - hand.begin());
        for (std::size_t start = 0; start < count; start += runners[stage].full.batch()) {
            go_on(stage, hand.data() + start, std::min(runners[stage].full.batch(), count - start));
        }
    }
}

std::size_t later_pixel_bytes(const Bundle& bundle) {
    const auto& stages = bundle.config().stages;
    std::size_t most = 0;
    for (std::size_t stage = 1; stage < stages.size(); ++stage) {
        const InputSpec& spec = stages[stage].input_spec;
        most = std::max(most,
                        std::size_t{3} * static_cast<std::size_t>(spec.height) * static_cast<std::size_t>(spec.width));
    }
    return most;
}

namespace {

void check_count(std::size_t count, std::size_t most) {
    if (count <= most) return;
    throw Error(ErrorKind::usage, std::to_string(count) + " images, expected at most " + std::to_string(most));
}

}  // namespace

Worker::Worker(const Network& network) : impl_(std::make_unique<Impl>(network)) {}
Worker::~Worker() = default;
Worker::Worker(Worker&&) noexcept = default;
Worker& Worker::operator=(Worker&&) noexcept = default;

int Worker::batch() const noexcept {
    return static_cast<int>(impl_->runners[0].full.batch());
}

void Worker::answer(const Frame* const* frames, std::size_t count, Prediction* out) {
    check_count(count, impl_->own_tasks.size());
    for (std::size_t number = 0; number < count; ++number) {
        impl_->own_tasks[number].frame = frames[number];
        impl_->own_tasks[number].answer = &out[number];
    }
    impl_->answer(count);
}

void Worker::step(std::size_t stage, Task* const* tasks, std::size_t count) {
    check_count(count, impl_->runners.at(stage).full.batch());
    if (stage == 0) {
        impl_->begin(tasks, count);
    } else {
        impl_->go_on(stage, tasks, count);
    }
}

}  // namespace edgedistill::detail
