#include "metadata.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <unordered_set>

#include <nlohmann/json.hpp>
#include <openvino/core/model.hpp>

#include "deploy.hpp"
#include "error.hpp"
#include "text.hpp"

namespace edgedistill::detail {

namespace {

constexpr std::size_t max_metadata_characters = 16'000'000;
constexpr std::size_t max_label_characters = 1'000;

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorKind::artifact, message);
}
[[noreturn]] void refuse_model(const std::string& message) {
    throw Error(ErrorKind::model, message);
}

struct Shapes {
    bool nhwc = false;
    int height = 0;
    int width = 0;
    std::size_t classes = 0;
};

template <typename Value>
std::string printed(const Value& value) {
    std::ostringstream text;
    text << value;
    return plain(text.str(), 200);
}

bool has(const ov::Model& model, const char* section, const char* key) {
    return model.has_rt_info(std::vector<std::string>{section, key});
}

// The shape of an image classifier: one static image input and one output [1, C].
Shapes read_shapes(const ov::Model& model, const std::string& name) {
    const auto inputs = model.inputs();
    const auto outputs = model.outputs();
    std::string got;
    bool fits = inputs.size() == 1 && outputs.size() == 1;
    for (const auto* ports : {&inputs, &outputs}) {
        for (const auto& port : *ports) {
            fits = fits && port.get_partial_shape().is_static();
            if (got.size() < 200) got += (got.empty() ? "" : ", ") + printed(port.get_partial_shape());
        }
    }
    if (!fits) {
        refuse_model(name + ": shapes " + got + "; expected one static input [1, 3, H, W] and one output [1, C]");
    }
    const ov::Shape image = inputs[0].get_shape();
    const ov::Shape scores = outputs[0].get_shape();
    fits = image.size() == 4 && (image[1] == 3 || image[3] == 3) && image[0] == 1;
    fits = fits && scores.size() == 2 && scores[0] == 1 && scores[1] > 0;
    if (!fits) {
        refuse_model(name + ": input " + printed(image) + " and output " + printed(scores) +
                     "; expected [1, 3, H, W] and [1, C]");
    }
    if (inputs[0].get_element_type() == ov::element::u8 || has(model, "edgedistill", "preprocessing_embedded")) {
        refuse_model(name + ": has its preprocessing embedded; use the plain IR, this runtime adds its own");
    }
    const bool nhwc = image[1] != 3;
    const auto size = [&](std::ptrdiff_t axis) {
        return static_cast<int>(std::min<std::size_t>(image[axis], 1U << 20U));
    };
    return {nhwc, size(nhwc ? 1 : 2), size(nhwc ? 2 : 3), scores[1]};
}

// One metadata string; nothing where it is absent.
std::optional<std::string> find_text(const ov::Model& model, const char* section, const char* key) {
    if (!has(model, section, key)) return std::nullopt;
    const std::string name = std::string("metadata ") + section + "." + key;
    const auto& value = model.get_rt_info<ov::Any>(std::vector<std::string>{section, key});
    if (value.is<ov::AnyMap>()) refuse(name + ": not a plain value");
    auto text = value.as<std::string>();
    const auto length = utf8_length(text);
    if (!length) refuse(name + ": not UTF-8; export the model again");
    if (*length > max_metadata_characters) {
        refuse(name + ": longer than " + std::to_string(max_metadata_characters) + " characters");
    }
    return text;
}

std::string text_of(const ov::Model& model, const char* section, const char* key) {
    auto text = find_text(model, section, key);
    if (!text) refuse(std::string("metadata ") + section + "." + key + " is missing; export the model again");
    return *std::move(text);
}

std::string text_of(const ov::Model& model, const char* section, const char* key, const char* otherwise) {
    return find_text(model, section, key).value_or(otherwise);
}

bool flag_of(const ov::Model& model, const char* key) {
    std::string text = text_of(model, "model_info", key, "False");
    std::transform(text.begin(), text.end(), text.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    return text == "true" || text == "1" || text == "yes";
}

// One number stands for all `count` of them, as Model API has it.
std::vector<double> numbers_from(const std::string& text, const std::string& name, std::size_t count) {
    std::vector<double> numbers;
    constexpr const char* separators = " \t\n\v\f\r,[]";
    const std::string_view start = std::string_view(text).substr(0, 1000);
    for (std::size_t position = 0; (position = start.find_first_not_of(separators, position)) != start.npos;) {
        const std::size_t end = std::min(start.find_first_of(separators, position), start.size());
        const auto number = parse_number(start.substr(position, end - position));
        if (!number) refuse("metadata " + name + " " + in_quotes(text) + ": not numbers; export the model again");
        numbers.push_back(*number);
        position = end;
    }
    if (numbers.size() == 1) numbers.resize(count, numbers[0]);
    const bool finite = std::all_of(numbers.begin(), numbers.end(), [](double v) { return std::isfinite(v); });
    if (numbers.size() != count || !finite) {
        refuse("metadata " + name + " " + in_quotes(text) + ": expected " + std::to_string(count) +
               " finite numbers; export the model again");
    }
    return numbers;
}

// Of all `count` labels, as Model API has it.
std::vector<double> threshold_of(const ov::Model& model, std::size_t count) {
    const std::string name = "model_info.confidence_threshold";
    const double threshold = numbers_from(text_of(model, "model_info", "confidence_threshold", "0.5"), name, 1)[0];
    if (!(threshold >= 0 && threshold <= 1)) {
        refuse("metadata " + name + " " + shown(threshold) + ", expected a number from 0 to 1");
    }
    return std::vector<double>(count, threshold);
}

// One number for all `count` labels, or a list with one for each.
std::vector<double> thresholds_from(const nlohmann::json& value, const std::string& name, std::size_t count) {
    const auto is_share = [](const nlohmann::json& one) {
        return one.is_number() && one.get<double>() >= 0 && one.get<double>() <= 1;
    };
    if (is_share(value)) return std::vector<double>(count, value.get<double>());
    if (!value.is_array() || value.size() != count || !std::all_of(value.begin(), value.end(), is_share)) {
        refuse(name + ": threshold, expected a number from 0 to 1 or a list of " + std::to_string(count) + " of them");
    }
    return value.get<std::vector<double>>();
}

nlohmann::json json_of(const ov::Model& model, const char* key) {
    const std::string text = text_of(model, "edgedistill", key);
    try {
        return parse_json(text);
    } catch (const std::exception&) {
        refuse(std::string("metadata edgedistill.") + key + ": not JSON (" + in_quotes(text) +
               "); export the model again");
    }
}

std::vector<std::string> labels_of(const ov::Model& model) {
    nlohmann::json list = json_of(model, "labels");
    const bool texts =
        list.is_array() && std::all_of(list.begin(), list.end(), [](const auto& v) { return v.is_string(); });
    if (!texts) refuse("metadata edgedistill.labels: expected a JSON list of strings; export the model again");
    std::vector<std::string> labels;
    labels.reserve(list.size());
    for (auto& label : list) labels.push_back(std::move(label.get_ref<std::string&>()));
    return labels;
}

double number_of(const nlohmann::json& entry, const char* key, double otherwise) {
    const auto found = entry.find(key);
    if (found == entry.end()) return otherwise;
    const double value = found->is_number() ? found->get<double>() : std::numeric_limits<double>::quiet_NaN();
    if (!std::isfinite(value)) refuse(std::string("metadata edgedistill.heads: ") + key + " is no finite number");
    return value;
}

// A name of 1 to 100 characters without : = | @ and without spaces at its ends.
bool is_head_name(const std::string& name) {
    const auto length = utf8_length(name);
    return length && *length >= 1 && *length <= 100 && is_printable(name) && name.find_first_of(":=|@") == name.npos &&
           name.front() != ' ' && name.back() != ' ';
}

Head head_of(const nlohmann::json& entry) {
    constexpr std::array<std::string_view, 7> known{"name", "kind", "classes", "weight", "mean", "std", "threshold"};
    constexpr std::array<std::string_view, 3> kinds{"softmax", "sigmoid", "regression"};
    if (!entry.is_object()) refuse("metadata edgedistill.heads: expected a list of objects");
    for (const auto& item : entry.items()) {
        if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
            refuse("metadata edgedistill.heads: unknown field " + in_quotes(item.key(), 40));
        }
    }
    const auto text = [&](const char* key) {
        const auto found = entry.find(key);
        return found != entry.end() && found->is_string() ? found->get<std::string>() : std::string();
    };
    Head head;
    head.name = text("name");
    if (!is_head_name(head.name)) refuse("metadata edgedistill.heads: name " + in_quotes(head.name, 60));
    const auto kind = std::find(kinds.begin(), kinds.end(), text("kind"));
    if (kind == kinds.end()) refuse("head " + head.name + ": kind " + in_quotes(text("kind"), 40));
    head.kind = static_cast<HeadKind>(kind - kinds.begin());
    if (const auto classes = entry.find("classes"); classes != entry.end()) {
        if (!classes->is_array()) refuse("head " + head.name + ": classes are no list");
        for (const auto& name : *classes) {
            if (!name.is_string() || name.get_ref<const std::string&>().empty()) {
                refuse("head " + head.name + ": a class is no text, or empty");
            }
            head.classes.push_back(name.get<std::string>());
        }
    }
    const std::size_t least = head.kind == HeadKind::softmax ? 2 : head.kind == HeadKind::sigmoid ? 1 : 0;
    if (head.classes.size() < least || (head.kind == HeadKind::regression && !head.classes.empty())) {
        refuse("head " + head.name + ": " + std::to_string(head.classes.size()) + " classes, expected others");
    }
    head.mean = number_of(entry, "mean", 0.0);
    head.std = number_of(entry, "std", 1.0);
    if (!(head.std > 0 && number_of(entry, "weight", 1.0) >= 0)) {
        refuse("head " + head.name + ": weight or std out of range");
    }
    const auto thresholds = entry.find("threshold");
    head.thresholds.assign(head.width(), 0.5);
    if (thresholds != entry.end()) {
        if (thresholds->is_array() && head.kind != HeadKind::sigmoid) {
            refuse("head " + head.name + ": thresholds, expected of a sigmoid head alone");
        }
        head.thresholds = thresholds_from(*thresholds, "head " + head.name, head.width());
    }
    head.threshold = *std::min_element(head.thresholds.begin(), head.thresholds.end());
    return head;
}

// Checked against the labels, which name the outputs: HEAD=CLASS, or HEAD for a value; the class alone of a lone head.
std::vector<Head> heads_of(const ov::Model& model, const std::vector<std::string>& labels) {
    const nlohmann::json list = json_of(model, "heads");
    if (!list.is_array() || list.empty()) refuse("metadata edgedistill.heads: expected a list of objects");
    std::vector<Head> heads;
    std::vector<std::string> outputs;
    std::unordered_set<std::string> names;
    for (const auto& entry : list) {
        Head head = head_of(entry);
        const bool value = head.kind == HeadKind::regression;
        if (!names.insert(head.name).second) refuse("two heads are called " + in_quotes(head.name, 60));
        if (!value && !heads.empty() && heads.back().kind == HeadKind::regression) {
            refuse("a regression head stands before one of classes");
        }
        if (value && heads.empty()) refuse("a regression head stands first");
        head.first = outputs.size();
        for (const auto& name : head.classes) outputs.push_back(list.size() == 1 ? name : head.name + "=" + name);
        if (value) outputs.push_back(head.name);
        heads.push_back(std::move(head));
    }
    if (outputs != labels) refuse("metadata edgedistill.heads: not those of the labels; export the model again");
    return heads;
}

// A list with one for each label; null, or the list of one number of older exports: what Model API's section says.
std::vector<double> own_thresholds(const ov::Model& model, std::size_t count) {
    if (!has(model, "edgedistill", "thresholds")) return threshold_of(model, count);
    const nlohmann::json list = json_of(model, "thresholds");
    if (list.is_null() || (count > 1 && list.is_array() && list.size() == 1)) return threshold_of(model, count);
    return thresholds_from(list, "metadata edgedistill.thresholds", count);
}

ModelMetadata own_metadata(const ov::Model& model) {
    const std::string version = text_of(model, "edgedistill", "format_version");
    if (version != "1") {
        refuse("metadata format " + in_quotes(version, 20) + ", this runtime reads '1'; use the release that wrote it");
    }
    const std::string task = text_of(model, "edgedistill", "task");
    if (task != "single-label" && task != "multi-label" && task != "heads") {
        refuse("task " + in_quotes(task, 40) + ", this runtime does 'single-label', 'multi-label' and 'heads'");
    }
    ModelMetadata metadata;
    metadata.labels = labels_of(model);
    if (task == "heads") metadata.heads = heads_of(model, metadata.labels);
    metadata.temperature = numbers_from(text_of(model, "edgedistill", "temperature"), "edgedistill.temperature", 1)[0];
    if (!(metadata.temperature > 0 && metadata.temperature <= 1000)) {
        refuse("metadata edgedistill.temperature " + shown(metadata.temperature) +
               ", expected a value above 0 up to 1000");
    }
    metadata.input_spec = input_spec_from(json_of(model, "input_spec"));
    // Not used here; but what is longer than any of them may be is no metadata of ours.
    for (const char* key : {"architecture", "dataset_hash", "weights_hash"}) find_text(model, "edgedistill", key);
    metadata.multi_label = task == "multi-label";
    if (metadata.multi_label) metadata.thresholds = own_thresholds(model, metadata.labels.size());
    return metadata;
}

std::array<double, 3> rgb_of(const ov::Model& model, const char* key, const char* otherwise, bool bgr) {
    const auto values = numbers_from(text_of(model, "model_info", key, otherwise), std::string("model_info.") + key, 3);
    // The input spec is in RGB order whatever the network wants.
    return bgr ? std::array<double, 3>{values[2], values[1], values[0]}
               : std::array<double, 3>{values[0], values[1], values[2]};
}

// A network from elsewhere that describes itself as OpenVINO Model API's classifiers do.
ModelMetadata model_api_metadata(const ov::Model& model, const Shapes& shapes) {
    for (const char* key : {"embedded_processing", "hierarchical"}) {
        if (flag_of(model, key)) {
            refuse(std::string("metadata model_info.") + key + " is set, which this runtime does not do");
        }
    }
    const std::string resize = text_of(model, "model_info", "resize_type", "standard");
    if (resize != "standard" && resize != "crop") {
        refuse("metadata model_info.resize_type " + in_quotes(resize, 40) + ", expected ['crop', 'standard']");
    }
    ModelMetadata metadata;
    metadata.own = false;
    metadata.bgr = !flag_of(model, "reverse_input_channels");
    metadata.multi_label = flag_of(model, "multilabel");
    InputSpec spec;
    spec.height = shapes.height;
    spec.width = shapes.width;
    spec.center_crop = resize == "crop";
    spec.mean = rgb_of(model, "mean_values", "0 0 0", metadata.bgr);
    spec.std = rgb_of(model, "scale_values", "1 1 1", metadata.bgr);
    metadata.input_spec = checked_spec(spec);
    metadata.labels = split_words(text_of(model, "model_info", "labels"));
    if (metadata.multi_label) metadata.thresholds = threshold_of(model, metadata.labels.size());
    return metadata;
}

void check_labels(const std::vector<std::string>& labels, std::size_t classes) {
    if (labels.size() != classes) {
        refuse(std::to_string(labels.size()) + " labels, but the network has " + std::to_string(classes) +
               " outputs; export the model again");
    }
    std::unordered_set<std::string_view> seen;
    for (const std::string& label : labels) {
        const auto length = utf8_length(label);
        if (!length || *length == 0 || *length > max_label_characters || !is_printable(label)) {
            refuse("label " + in_quotes(label) + ": expected 1 to " + std::to_string(max_label_characters) +
                   " printable characters");
        }
        if (!seen.insert(label).second) refuse("two labels are the same; export the model again");
    }
}

ModelMetadata described(const ov::Model& model, const Shapes& shapes, const std::string& name) {
    const bool own = has(model, "edgedistill", "format_version");
    if (!own && !has(model, "model_info", "labels")) {
        refuse_model(name +
                     ": says nothing about its labels and input (no rt_info 'edgedistill' or 'model_info'); "
                     "export it with export-openvino");
    }
    try {
        ModelMetadata metadata = own ? own_metadata(model) : model_api_metadata(model, shapes);
        check_labels(metadata.labels, shapes.classes);
        return metadata;
    } catch (const Error& error) {
        refuse(name + ": " + error.what());
    }
}

bool ends_in(const ov::Model& model, std::string_view type) {
    const std::shared_ptr<const ov::Node> result = model.get_results()[0];
    return result->get_input_node_ptr(0)->get_type_name() == type;
}

ModelMetadata checked_metadata(const ov::Model& model, const std::string& name) {
    const Shapes shapes = read_shapes(model, name);
    ModelMetadata metadata = described(model, shapes, name);
    const InputSpec& spec = metadata.input_spec;
    if (spec.height != shapes.height || spec.width != shapes.width) {
        refuse(name + ": its input is " + std::to_string(shapes.height) + "x" + std::to_string(shapes.width) +
               ", its input_spec says " + std::to_string(spec.height) + "x" + std::to_string(spec.width) +
               "; export the model again");
    }
    if (metadata.multi_label && ends_in(model, "Softmax")) {
        refuse(name + ": multi-label, but it ends in a softmax; expected logits or a sigmoid");
    }
    for (const char* last : {"Softmax", "Sigmoid"}) {
        if (!metadata.heads.empty() && ends_in(model, last)) {
            refuse(name + ": several heads, but it ends in a " + last + "; expected logits");
        }
    }
    metadata.nhwc = shapes.nhwc;
    metadata.gives_probabilities = ends_in(model, metadata.multi_label ? "Sigmoid" : "Softmax");
    return metadata;
}

}  // namespace

ModelMetadata read_metadata(const ov::Model& model, const std::string& name) {
    try {
        return checked_metadata(model, name);
    } catch (const Error&) {
        throw;
    } catch (const std::exception& error) {
        refuse(name + ": metadata that cannot be read (" + last_line(error) + "); export the model again");
    }
}

}  // namespace edgedistill::detail
