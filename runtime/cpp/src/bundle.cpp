#include "bundle.hpp"

#include <array>
#include <cstring>
#include <exception>
#include <future>
#include <mutex>
#include <optional>
#include <system_error>

#include <sha2.h>
#include <openvino/runtime/core.hpp>

#include "error.hpp"
#include "file.hpp"
#include "ir.hpp"

namespace edgedistill::detail {

namespace {

// Thresholds are each network's own.
bool same_heads(const std::vector<Head>& one, const std::vector<Head>& other) {
    return std::equal(one.begin(), one.end(), other.begin(), other.end(), [](const Head& a, const Head& b) {
        return a.name == b.name && a.kind == b.kind && a.classes == b.classes && a.mean == b.mean && a.std == b.std;
    });
}

namespace fs = std::filesystem;

// Far above any network that a CPU answers with at a useful rate.
constexpr std::uint64_t max_xml_bytes = 256U << 20U;
constexpr std::uint64_t max_weights_bytes = std::uint64_t{8} << 30U;

// One IR: its bytes until OpenVINO has read them, then what it read.
struct Form {
    std::string name;  // for messages
    std::string xml;
    ov::Tensor weights;
    std::shared_ptr<ov::Model> model;
};

struct Forms {
    Form plain;
    std::optional<Form> int8;
};

fs::path weights_path(fs::path xml) {
    return xml.replace_extension(".bin");
}

// model.xml -> model-int8.xml
fs::path int8_path(const fs::path& xml) {
    return xml.parent_path() / (xml.stem().string() + "-int8.xml");
}

bool is_file(const fs::path& path) {
    std::error_code ignored;
    return fs::is_regular_file(path, ignored);
}

bool is_folder(const fs::path& path) {
    std::error_code ignored;
    return fs::is_directory(path, ignored);
}

ov::Tensor weights_tensor(std::size_t size) {
    return {ov::element::u8, ov::Shape{size}};
}

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorKind::artifact, message);
}

Form read_form(const fs::path& xml) {
    Form form;
    form.name = xml.string();
    form.xml = read_text_file(xml, max_xml_bytes);
    const File file(weights_path(xml), max_weights_bytes);
    form.weights = weights_tensor(file.size());
    file.read(static_cast<std::uint8_t*>(form.weights.data()));
    return form;
}

// sha256 over the bytes of model.xml followed by those of model.bin: the network as it is deployed.
std::string sha256_of(const Form& form) {
    SHA2_CTX context;
    SHA256Init(&context);
    SHA256Update(&context, reinterpret_cast<const std::uint8_t*>(form.xml.data()), form.xml.size());
    SHA256Update(&context, static_cast<const std::uint8_t*>(form.weights.data()), form.weights.get_byte_size());
    std::array<char, SHA256_DIGEST_STRING_LENGTH> text{};
    SHA256End(&context, text.data());
    return text.data();
}

void check_sha256(const Form& form, const std::string& expected) {
    const std::string got = sha256_of(form);
    if (got != expected) {
        refuse(form.name + ": sha256 " + got.substr(0, 12) + "..., deploy.json says " + expected.substr(0, 12) +
               "...: it is damaged or from another export; export the model again");
    }
}

// Also where links lead.
bool lies_inside(const fs::path& path, const fs::path& root) {
    std::error_code error;
    const fs::path outer = fs::weakly_canonical(root.empty() ? "." : root, error);
    if (error) return false;
    const fs::path inner = fs::weakly_canonical(path, error);
    if (error) return false;
    const fs::path relative = inner.lexically_relative(outer);
    return !relative.empty() && *relative.begin() != "..";
}

// The deploy.json or model.xml that `path` names.
fs::path find_entry(const fs::path& path) {
    if (is_folder(path)) {
        for (const char* name : {"deploy.json", "openvino/deploy.json", "model.xml"}) {
            if (is_file(path / name)) return path / name;
        }
        refuse(path.string() + ": no deploy.json or model.xml in it; run export-openvino first");
    }
    const std::string expected = "expected an openvino/ folder, a deploy.json or a model.xml";
    if (!is_file(path)) refuse(path.string() + ": no such file; " + expected);
    if (path.extension() != ".xml" && path.extension() != ".json") refuse(path.string() + ": " + expected);
    return path;
}

std::string size_text(const InputSpec& spec) {
    return std::to_string(spec.height) + "x" + std::to_string(spec.width);
}

}  // namespace

struct Bundle::Impl {
    ov::Core core;
    std::mutex mutex;  // guards what follows
    std::vector<Forms> stages;
    bool forgotten = false;

    // The caller holds the mutex.
    const ov::Model& parsed(Form& form) {
        if (!form.model) {
            form.model = read_ir(core, form.xml, form.weights, form.name);
            // The model keeps the weights that it needs.
            form.xml = {};
            form.weights = {};
        }
        return *form.model;
    }
    ModelMetadata checked_metadata(Forms& forms, const Stage& stage, bool runs_int8);
};

Bundle::Bundle() : impl_(std::make_unique<Impl>()) {}
Bundle::~Bundle() = default;

ov::Core& Bundle::core() const noexcept {
    return impl_->core;
}

std::shared_ptr<const Bundle> Bundle::load(const fs::path& path) {
    const fs::path entry = find_entry(path);
    const std::shared_ptr<Bundle> bundle(new Bundle);
    if (entry.extension() == ".xml") {
        bundle->load_single(entry);
    } else {
        bundle->load_config(entry);
    }
    return bundle;
}

std::shared_ptr<const Bundle> Bundle::from_memory(Bytes xml, Bytes weights, const std::string& name) {
    const std::shared_ptr<Bundle> bundle(new Bundle);
    Form form;
    form.name = name;
    if (xml.size > 0) form.xml.assign(reinterpret_cast<const char*>(xml.data), xml.size);
    form.weights = weights_tensor(weights.size);
    if (weights.size > 0) std::memcpy(form.weights.data(), weights.data, weights.size);
    bundle->impl_->stages.push_back({std::move(form), std::nullopt});
    bundle->source_ = name;
    bundle->describe_single("model.xml");
    return bundle;
}

void Bundle::load_single(const fs::path& path) {
    source_ = path.string();
    Forms forms{read_form(path), std::nullopt};
    const fs::path int8 = int8_path(path);
    if (is_file(int8)) forms.int8 = read_form(int8);
    impl_->stages.push_back(std::move(forms));
    describe_single(path.filename().string());
}

void Bundle::describe_single(const std::string& model) {
    Form& form = impl_->stages[0].plain;
    metadata_.push_back(read_metadata(impl_->parsed(form), form.name));
    Stage stage;
    stage.model = model;
    stage.input_spec = metadata_[0].input_spec;
    stage.temperature = metadata_[0].temperature;
    config_.stages.push_back(std::move(stage));
}

void Bundle::load_config(const fs::path& path) {
    const fs::path root = path.parent_path();
    source_ = root.empty() ? "." : root.string();
    config_ = read_deploy(path);
    for (const Stage& stage : config_.stages) load_stage(root, stage);
    check_stages_agree(path);
}

void Bundle::load_stage(const fs::path& root, const Stage& stage) {
    const fs::path path = root / stage.model;
    if (!lies_inside(path, root)) {
        refuse(path.string() + ": leads outside " + source_ + "; export the model again");
    }
    Forms forms{read_form(path), std::nullopt};
    if (stage.int8_sha256) forms.int8 = read_form(int8_path(path));
    const auto is_int8 = [&, number = metadata_.size()](const auto& settings) {
        return stage_precisions(settings.precision, settings.later_precision, number + 1)[number] == "int8";
    };
    const bool runs_int8 = is_int8(config_.latency) || is_int8(config_.throughput);
    ModelMetadata metadata = impl_->checked_metadata(forms, stage, runs_int8);
    InputSpec resized = stage.input_spec;
    resized.height = metadata.input_spec.height;
    resized.width = metadata.input_spec.width;
    if (!same_spec(resized, metadata.input_spec)) {
        refuse(path.string() +
               ": its input spec and deploy.json's differ in more than the resolution; export the model again");
    }
    metadata_.push_back(std::move(metadata));
    impl_->stages.push_back(std::move(forms));
}

// Hashing takes longer than parsing, so both go on at once, and the form that will run is parsed with the one that says
// what it is. A wrong hash is the better explanation of a failed parse.
ModelMetadata Bundle::Impl::checked_metadata(Forms& forms, const Stage& stage, bool runs_int8) {
    // Views of what is hashed: parsing lets go of the forms' own.
    auto hashed = std::async(std::launch::async, [plain = forms.plain, int8 = forms.int8, &stage] {
        check_sha256(plain, stage.sha256);
        if (stage.int8_sha256) check_sha256(*int8, *stage.int8_sha256);
    });
    std::exception_ptr failure;
    ModelMetadata metadata;
    try {
        metadata = read_metadata(parsed(forms.plain), forms.plain.name);
        if (runs_int8 && forms.int8) parsed(*forms.int8);
    } catch (...) {
        failure = std::current_exception();
    }
    hashed.get();
    if (failure) std::rethrow_exception(failure);
    return metadata;
}

void Bundle::check_stages_agree(const fs::path& path) const {
    for (std::size_t number = 1; number < metadata_.size(); ++number) {
        const std::string stage = path.string() + ": stage " + std::to_string(number);
        if (metadata_[number].labels != labels()) {
            refuse(stage + " has other labels than stage 0; export them from one data set");
        }
        if (metadata_[number].multi_label != multi_label() || !same_heads(metadata_[number].heads, heads())) {
            refuse(stage + " has another task than stage 0; export them from one data set");
        }
    }
}

std::optional<double> Bundle::threshold(int stage, int output) const noexcept {
    if (stage < 0 || static_cast<std::size_t>(stage) >= metadata_.size() || output < 0) return std::nullopt;
    const ModelMetadata& network = metadata_[static_cast<std::size_t>(stage)];
    const auto place = static_cast<std::size_t>(output);
    if (place < network.thresholds.size()) return network.thresholds[place];
    for (const Head& head : network.heads) {
        if (head.kind != HeadKind::sigmoid || place < head.first) continue;
        if (place < head.first + head.width()) return head.thresholds[place - head.first];
    }
    return std::nullopt;
}

std::shared_ptr<ov::Model> Bundle::read_model(std::size_t stage, const std::string& precision) const {
    if (!is_precision(precision)) {
        throw Error(ErrorKind::usage, source_ + " precision '" + precision + "', expected one of f32, bf16, int8");
    }
    const Stage& settings = config_.stages.at(stage);
    const std::lock_guard lock(impl_->mutex);
    if (impl_->forgotten) throw Error(ErrorKind::model, source_ + ": its files were given back; load it again");
    Forms& forms = impl_->stages[stage];
    if (precision == "int8" && !forms.int8) {
        throw Error(ErrorKind::model,
                    source_ + ": stage " + settings.model + " has no INT8 form; use precision 'f32' or export it");
    }
    const std::shared_ptr<ov::Model> model = impl_->parsed(precision == "int8" ? *forms.int8 : forms.plain).clone();
    const InputSpec& own = metadata_[stage].input_spec;
    if (settings.input_spec.height != own.height || settings.input_spec.width != own.width) {
        reshape_model(*model, metadata_[stage], settings.input_spec, 1, source_);
    }
    return model;
}

void Bundle::forget_models() const {
    const std::lock_guard lock(impl_->mutex);
    impl_->forgotten = true;
    impl_->stages.clear();
}

void reshape_model(ov::Model& model, const ModelMetadata& metadata, const InputSpec& spec, int batch,
                   const std::string& name) {
    ov::PartialShape shape{batch, 3, spec.height, spec.width};
    if (metadata.nhwc) shape = {batch, spec.height, spec.width, 3};
    try {
        model.reshape(shape);
    } catch (const std::exception& error) {
        throw Error(ErrorKind::model, name + ": cannot run at " + size_text(spec) + " with batch " +
                                          std::to_string(batch) + " (" + last_line(error) + ")");
    }
}

}  // namespace edgedistill::detail
