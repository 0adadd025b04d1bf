// Arbitrary text as the metadata of an IR: settings that hold, or an error that names the file.
//
// The input is a list of changes to what export writes, ended by a zero byte each. The first byte of a change says of
// which field (below), the rest is its value. An upper-case letter makes the value a section instead of text; a field
// of the section "edgedistill" that gets no value at all is taken away; '-' takes the whole section away, so that
// OpenVINO Model API's section speaks for itself.

#include <array>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <string_view>

#include <edgedistill/error.hpp>

#include "fuzz_options.hpp"
#include "metadata.hpp"
#include "tiny_model.hpp"

namespace edgedistill::fuzz {
namespace {

constexpr const char* name = "model.xml";

struct Field {
    char letter;
    const char* section;
    const char* key;
};

constexpr std::array<Field, 22> fields{{
    {'f', "edgedistill", "format_version"},
    {'t', "edgedistill", "temperature"},
    {'l', "edgedistill", "labels"},
    {'i', "edgedistill", "input_spec"},
    {'k', "edgedistill", "task"},
    {'a', "edgedistill", "architecture"},
    {'d', "edgedistill", "dataset_hash"},
    {'w', "edgedistill", "weights_hash"},
    {'p', "edgedistill", "preprocessing_embedded"},
    {'n', "edgedistill", "thresholds"},
    {'g', "edgedistill", "heads"},
    {'b', "model_info", "labels"},
    {'m', "model_info", "mean_values"},
    {'s', "model_info", "scale_values"},
    {'r', "model_info", "resize_type"},
    {'v', "model_info", "reverse_input_channels"},
    {'u', "model_info", "multilabel"},
    {'c', "model_info", "confidence_threshold"},
    {'e', "model_info", "embedded_processing"},
    {'h', "model_info", "hierarchical"},
    {'o', "model_info", "output_raw_scores"},
    {'y', "model_info", "model_type"},
}};

void change(ov::RTMap& sections, char letter, std::string_view value) {
    if (letter == '-') {
        sections.erase("edgedistill");
        return;
    }
    const char lower = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
    for (const Field& field : fields) {
        if (field.letter != lower) continue;
        if (sections.count(field.section) == 0) sections[field.section] = ov::AnyMap{};
        auto& section = sections[field.section].as<ov::AnyMap>();
        if (value.empty() && letter == lower) {
            section.erase(field.key);
        } else if (letter == lower) {
            section[field.key] = std::string(value);
        } else {
            section[field.key] = ov::AnyMap{{"value", std::string(value)}};
        }
    }
}

ov::RTMap metadata_of(std::string_view changes) {
    ov::RTMap sections;
    sections["edgedistill"] = tiny_metadata();
    while (!changes.empty()) {
        const std::string_view one = changes.substr(0, changes.find('\0'));
        changes.remove_prefix(std::min(one.size() + 1, changes.size()));
        if (!one.empty()) change(sections, one[0], one.substr(1));
    }
    return sections;
}

void check(const std::vector<double>& thresholds, std::size_t count) {
    promise(thresholds.size() == count, "one threshold for each label");
    for (const double threshold : thresholds) promise(threshold >= 0 && threshold <= 1, "thresholds are probabilities");
}

void check(const detail::ModelMetadata& metadata) {
    const InputSpec& spec = metadata.input_spec;
    promise(metadata.labels.size() == 3, "one label for each output");
    for (const std::string& label : metadata.labels) {
        promise(!label.empty() && detail::is_printable(label), "labels are printable", label);
    }
    promise(spec.height == tiny_size && spec.width == tiny_size, "the input's size is the network's");
    promise(spec.crop_fraction >= 0.1 && spec.crop_fraction <= 1.0, "the crop has a size");
    for (std::size_t channel = 0; channel < 3; ++channel) {
        promise(std::isfinite(spec.mean[channel]) && spec.std[channel] > 0, "pixels can be normalised");
    }
    promise(metadata.temperature > 0 && metadata.temperature <= 1000, "the temperature can divide");
    check(metadata.thresholds, metadata.multi_label ? metadata.labels.size() : 0);
    std::size_t outputs = 0;
    for (const Head& head : metadata.heads) {
        promise(head.first == outputs, "heads lie side by side", head.name);
        promise(head.std > 0 && std::isfinite(head.mean), "values can be scaled back", head.name);
        check(head.thresholds, head.width());
        outputs += head.width();
    }
    promise(metadata.heads.empty() || outputs == metadata.labels.size(), "the heads have all outputs");
}

}  // namespace
}  // namespace edgedistill::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace edgedistill;
    using namespace edgedistill::fuzz;
    static const std::shared_ptr<ov::Model> model = tiny_network();
    model->get_rt_info() = metadata_of({reinterpret_cast<const char*>(data), size});
    try {
        check(detail::read_metadata(*model, name));
    } catch (const Error& error) {
        promise(error.kind() == ErrorKind::artifact || error.kind() == ErrorKind::model, "the file is to blame");
        check_message(error.what(), name);
    }
    return 0;
}
