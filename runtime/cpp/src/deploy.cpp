#include "deploy.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "file.hpp"
#include "text.hpp"

namespace edgedistill::detail {

namespace {

using nlohmann::json;

constexpr std::size_t max_deploy_bytes = 16U << 20U;
// Objects and arrays inside each other. Python's own limit is near 1000.
constexpr int max_depth = 500;

[[noreturn]] void refuse(const std::string& message) {
    throw Error(ErrorKind::artifact, message);
}

std::string shown(const json& value) {
    return plain(value.dump(-1, ' ', true, json::error_handler_t::replace), 80);
}

using Names = std::initializer_list<const char*>;

std::string listed(Names names) {
    std::string text;
    for (const char* name : names) text += (text.empty() ? "'" : "', '") + std::string(name);
    return "[" + text + "']";
}

bool has_name(Names names, const std::string& key) {
    return std::any_of(names.begin(), names.end(), [&](const char* name) { return key == name; });
}

void check_fields(const json& values, const std::string& what, Names names) {
    const std::string expected = ", expected some of " + listed(names);
    if (!values.is_object()) refuse(what + ": " + values.type_name() + expected);
    for (const auto& [key, value] : values.items()) {
        if (!has_name(names, key)) refuse(what + ": unknown field " + in_quotes(key) + expected);
    }
}

// Absent and null are the same where a field may be left out.
const json* find(const json& values, const char* name) {
    const auto found = values.find(name);
    return found == values.end() || found->is_null() ? nullptr : &*found;
}

std::string text_field(const json& values, const std::string& what, const char* name) {
    const auto found = values.find(name);
    if (found == values.end()) refuse(what + ": " + name + " is missing");
    if (!found->is_string()) refuse(what + ": " + name + " " + shown(*found) + ", expected text");
    return found->get<std::string>();
}

// As Python counts: true is 1.
std::optional<double> number_of(const json& value) {
    if (value.is_boolean()) return value.get<bool>() ? 1.0 : 0.0;
    if (value.is_number()) return value.get<double>();
    return std::nullopt;
}

std::optional<double> share_field(const json& values, const std::string& what, const char* name) {
    const json* value = find(values, name);
    if (value == nullptr) return std::nullopt;
    const auto number = number_of(*value);
    if (!number || !(*number >= 0 && *number <= 1)) {
        refuse(what + name + " " + shown(*value) + ", expected a number from 0 to 1");
    }
    return number;
}

std::optional<int> count_field(const json& values, const std::string& what, const char* name) {
    const json* value = find(values, name);
    if (value == nullptr) return std::nullopt;
    const bool fits = value->is_number_integer() && *value >= 1 && *value <= 4096;
    if (!fits) refuse(what + " " + name + " " + shown(*value) + ", expected a whole number from 1 to 4096");
    return value->get<int>();
}

void check_sha256(const std::string& model, const char* name, const std::string& value) {
    constexpr std::string_view digits = "0123456789abcdef";
    if (value.size() != 64 || value.find_first_not_of(digits) != std::string::npos) {
        refuse("stage " + plain(model) + ": " + name + " " + in_quotes(value, 80) + ", expected 64 hexadecimal digits");
    }
}

void check_model_path(const std::string& model) {
    constexpr std::string_view suffix = ".xml";
    bool fine = model.size() >= suffix.size() && model.compare(model.size() - suffix.size(), 4, suffix) == 0;
    fine = fine && model.front() != '/' && model.find('\\') == std::string::npos;
    fine = fine && model.find('\0') == std::string::npos;
    for (const auto& part : std::filesystem::path(model)) fine = fine && part != "..";
    if (!fine) refuse("stage model " + in_quotes(model, 200) + ": expected a path to an .xml file inside the folder");
}

double temperature_field(const json& values, const std::string& model) {
    const auto found = values.find("temperature");
    if (found == values.end()) return 1.0;
    const auto number = number_of(*found);
    if (!number || !(*number > 0 && *number <= 1000)) {
        refuse("stage " + plain(model) + ": temperature " + shown(*found) + ", expected a value above 0 up to 1000");
    }
    return *number;
}

Stage stage_from(const json& values) {
    if (!values.is_object()) refuse(std::string("a stage is ") + values.type_name() + ", expected an object");
    check_fields(values, "stage", {"model", "sha256", "input_spec", "temperature", "exit_threshold", "int8_sha256"});
    Stage stage;
    stage.model = text_field(values, "stage", "model");
    check_model_path(stage.model);
    stage.sha256 = text_field(values, "stage", "sha256");
    check_sha256(stage.model, "sha256", stage.sha256);
    if (find(values, "int8_sha256") != nullptr) {
        stage.int8_sha256 = text_field(values, "stage", "int8_sha256");
        check_sha256(stage.model, "int8_sha256", *stage.int8_sha256);
    }
    stage.input_spec = input_spec_from(values.value("input_spec", json::object()));
    stage.temperature = temperature_field(values, stage.model);
    stage.exit_threshold = share_field(values, "stage " + plain(stage.model) + ": ", "exit_threshold");
    return stage;
}

std::string precision_of(const json& value, const std::string& what, const char* expected) {
    if (!value.is_string() || !is_precision(value.get_ref<const std::string&>())) {
        refuse(what + " " + shown(value) + ", expected one of " + expected);
    }
    return value.get<std::string>();
}

std::string precision_field(const json& values, const std::string& what) {
    const auto found = values.find("precision");
    return found == values.end() ? "f32" : precision_of(*found, what + " precision", "f32, bf16, int8");
}

std::optional<std::string> later_precision_field(const json& values, const std::string& what) {
    const json* value = find(values, "later_precision");
    if (value == nullptr) return std::nullopt;
    return precision_of(*value, what + " later_precision", "f32, bf16, int8, null");
}

LatencySettings latency_from(const json& values) {
    check_fields(values, "latency", {"precision", "threads", "later_precision"});
    return {precision_field(values, "latency"), count_field(values, "latency", "threads"),
            later_precision_field(values, "latency")};
}

std::optional<bool> pinning_field(const json& values) {
    const json* value = find(values, "pinning");
    if (value == nullptr) return std::nullopt;
    const auto number = number_of(*value);
    if (!number || (*number != 0.0 && *number != 1.0)) {
        refuse("throughput pinning " + shown(*value) + ", expected true, false or null");
    }
    return *number != 0.0;
}

ThroughputSettings throughput_from(const json& values) {
    check_fields(values, "throughput",
                 {"precision", "streams", "threads", "batch", "pinning", "later_batch", "later_precision"});
    ThroughputSettings settings;
    settings.precision = precision_field(values, "throughput");
    settings.streams = count_field(values, "throughput", "streams");
    settings.threads = count_field(values, "throughput", "threads");
    settings.batch = count_field(values, "throughput", "batch").value_or(1);
    settings.pinning = pinning_field(values);
    settings.later_batch = count_field(values, "throughput", "later_batch");
    settings.later_precision = later_precision_field(values, "throughput");
    return settings;
}

void check_one_of(const json& values, const std::string& what, const char* name, Names expected) {
    const auto found = values.find(name);
    if (found == values.end()) return;
    if (!found->is_string() || !has_name(expected, found->get_ref<const std::string&>())) {
        refuse(what + name + " " + shown(*found) + ", expected one of " + listed(expected));
    }
}

// What was weighed decides nothing here, but a file that is wrong there may be wrong elsewhere.
void check_score(const json& values) {
    check_fields(values, "score", {"w", "metric", "scope", "fps_target"});
    share_field(values, "score ", "w");
    check_one_of(values, "score ", "metric", {"accuracy", "macro-f1"});
    check_one_of(values, "score ", "scope", {"model", "frames", "files"});
    const json* target = find(values, "fps_target");
    if (target == nullptr) return;
    const auto number = number_of(*target);
    if (!number || !(std::isfinite(*number) && *number > 0)) {
        refuse("score fps_target " + shown(*target) + ", expected a number above 0 or null");
    }
}

std::vector<Stage> stages_from(const json& values) {
    const auto found = values.find("stages");
    if (found == values.end() || !found->is_array()) {
        refuse(std::string("stages is ") + (found == values.end() ? "missing" : found->type_name()) +
               ", expected a list");
    }
    std::vector<Stage> stages;
    for (const json& entry : *found) stages.push_back(stage_from(entry));
    if (stages.empty()) refuse("deploy: no stages, expected at least one");
    for (std::size_t number = 0; number + 1 < stages.size(); ++number) {
        if (!stages[number].exit_threshold) {
            refuse("deploy: a stage before the last has no exit_threshold, so the last would never be asked");
        }
    }
    return stages;
}

void check_later_precision(const std::optional<std::string>& precision, const std::string& what, std::size_t stages) {
    if (!precision || stages > 1) return;
    refuse(what + " later_precision '" + *precision +
           "' is of the stages after the first, but there is one stage; expected null");
}

// Where and with what the settings were measured: nothing there is refused, and what is odd is no CPU of this world.
void read_origin(const json& values, DeployConfig& config) {
    if (const json* cpu = find(values, "cpu")) {
        config.cpu = cpu->is_string() ? cpu->get<std::string>() : shown(*cpu);
    }
    const json* versions = find(values, "versions");
    if (versions == nullptr || !versions->is_object()) return;
    const json* version = find(*versions, "openvino");
    if (version != nullptr && version->is_string()) config.openvino_version = version->get<std::string>();
}

DeployConfig config_from(const json& values) {
    check_fields(values, "deploy",
                 {"format", "version", "stages", "latency", "throughput", "decode", "reject_below", "score", "cpu",
                  "cores", "versions"});
    DeployConfig config;
    config.stages = stages_from(values);
    if (values.contains("latency")) config.latency = latency_from(values["latency"]);
    if (values.contains("throughput")) config.throughput = throughput_from(values["throughput"]);
    check_later_precision(config.latency.later_precision, "latency", config.stages.size());
    check_later_precision(config.throughput.later_precision, "throughput", config.stages.size());
    if (values.contains("score")) check_score(values["score"]);
    check_one_of(values, "deploy: ", "decode", {"full", "reduced"});
    if (values.contains("decode")) config.decode = values["decode"] == "full" ? Decode::full : Decode::reduced;
    config.reject_below = share_field(values, "deploy: ", "reject_below");
    config.cores = count_field(values, "deploy:", "cores");
    read_origin(values, config);
    return config;
}

void check_format(const json& values, const std::string& name) {
    const json format = values.is_object() ? values.value("format", json()) : json(values.type_name());
    const json version = values.is_object() ? values.value("version", json()) : json();
    if (format != "edgedistill-deploy" || number_of(version) != 1.0) {
        refuse(name + ": format " + shown(format) + " version " + shown(version) +
               ", expected 'edgedistill-deploy' version 1");
    }
}

void check_depth(std::string_view text) {
    int depth = 0;
    bool in_text = false;
    for (std::size_t index = 0; index < text.size(); ++index) {
        const char c = text[index];
        if (in_text) {
            if (c == '\\') ++index;
            in_text = c != '"';
        } else if (c == '"') {
            in_text = true;
        } else if (c == '[' || c == '{') {
            if (++depth > max_depth) throw std::invalid_argument("nested too deeply");
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
}

[[noreturn]] void refuse_spec(const std::string& message) {
    refuse("input spec: " + message + "; export the model again");
}

double spec_number(const json& value, const char* name) {
    auto number = number_of(value);
    if (value.is_string()) number = parse_number(value.get_ref<const std::string&>());
    if (!number) refuse_spec(std::string(name) + " " + shown(value) + ", expected a number");
    return *number;
}

int spec_size(const json& value, const char* name) {
    double number = 0;
    if (value.is_string()) {
        const auto whole = parse_integer(value.get_ref<const std::string&>());
        if (!whole) refuse_spec(std::string(name) + " " + shown(value) + ", expected a whole number");
        number = static_cast<double>(*whole);
    } else {
        number = spec_number(value, name);
    }
    // Any number beyond int is out of range as well.
    constexpr double most = std::numeric_limits<int>::max();
    return number >= -most && number <= most ? static_cast<int>(number) : -1;
}

std::array<double, 3> spec_triple(const json& value, const char* name) {
    if (!value.is_array() || value.size() != 3) {
        refuse_spec(std::string(name) + " " + shown(value) + ", expected three finite values");
    }
    return {spec_number(value[0], name), spec_number(value[1], name), spec_number(value[2], name)};
}

bool center_crop_from(const json& value) {
    if (value == "center-crop") return true;
    if (value != "squash") refuse_spec("resize " + shown(value) + ", expected 'squash' or 'center-crop'");
    return false;
}

std::string shown(const std::array<double, 3>& values) {
    return "(" + shown(values[0]) + ", " + shown(values[1]) + ", " + shown(values[2]) + ")";
}

}  // namespace

DeployConfig parse_deploy(std::string_view text, const std::string& name) {
    json values;
    try {
        // Python's reader refuses a byte order mark, this one would pass over it.
        if (text.substr(0, 3) == "\xEF\xBB\xBF") throw std::invalid_argument("byte order mark");
        values = parse_json(text);
    } catch (const std::exception& error) {
        refuse(name + ": not valid JSON (" + plain(error.what(), 200) +
               "); write it again with the command that made it");
    }
    check_format(values, name);
    try {
        return config_from(values);
    } catch (const Error& error) {
        refuse(name + ": " + error.what() + "; export the model again");
    } catch (const json::exception& error) {
        refuse(name + ": " + plain(error.what(), 200) + "; export the model again");
    }
}

DeployConfig read_deploy(const std::filesystem::path& path) {
    return parse_deploy(read_text_file(path, max_deploy_bytes), path.string());
}

InputSpec input_spec_from(const json& values) {
    const Names names = {"color_order", "crop_fraction", "height", "mean", "resize", "std", "width"};
    bool same = values.is_object() && values.size() == names.size();
    for (const char* name : names) same = same && values.contains(name);
    if (!same) refuse_spec("fields " + shown(values) + ", expected " + listed(names));
    if (values["color_order"] != "RGB") {
        refuse_spec("color_order " + shown(values["color_order"]) + ", expected 'RGB'");
    }
    InputSpec spec;
    spec.height = spec_size(values["height"], "height");
    spec.width = spec_size(values["width"], "width");
    spec.center_crop = center_crop_from(values["resize"]);
    spec.crop_fraction = spec_number(values["crop_fraction"], "crop_fraction");
    spec.mean = spec_triple(values["mean"], "mean");
    spec.std = spec_triple(values["std"], "std");
    return checked_spec(spec);
}

InputSpec checked_spec(const InputSpec& spec) {
    const auto size_fits = [](int size) { return size >= 8 && size <= 4096; };
    if (!size_fits(spec.height) || !size_fits(spec.width)) {
        refuse("input spec: size " + std::to_string(spec.height) + "x" + std::to_string(spec.width) +
               ", expected 8 to 4096 pixels");
    }
    if (!(spec.crop_fraction >= 0.1 && spec.crop_fraction <= 1.0)) {
        refuse("input spec: crop_fraction " + shown(spec.crop_fraction) + ", expected 0.1 to 1");
    }
    const bool means = std::all_of(spec.mean.begin(), spec.mean.end(), [](double v) { return std::isfinite(v); });
    const bool stds = std::all_of(spec.std.begin(), spec.std.end(), [](double v) { return v > 0; });
    if (!means || !stds) {
        refuse("input spec: mean " + shown(spec.mean) + " and std " + shown(spec.std) +
               ", expected three finite values each, std above 0");
    }
    return spec;
}

bool same_spec(const InputSpec& one, const InputSpec& other) {
    return same_pixels(one, other) && one.mean == other.mean && one.std == other.std;
}

bool same_pixels(const InputSpec& one, const InputSpec& other) {
    return one.height == other.height && one.width == other.width && one.center_crop == other.center_crop &&
           one.crop_fraction == other.crop_fraction;
}

json parse_json(std::string_view text) {
    check_depth(text);
    return json::parse(text);
}

bool is_precision(std::string_view precision) {
    return precision == "f32" || precision == "bf16" || precision == "int8";
}

std::vector<std::string> stage_precisions(const std::string& precision, const std::optional<std::string>& later,
                                          std::size_t stages) {
    std::vector<std::string> precisions(stages, later.value_or(precision));
    precisions.at(0) = precision;
    return precisions;
}

std::string precision_name(const std::vector<std::string>& precisions) {
    std::string name = precisions.at(0);
    if (std::count(precisions.begin(), precisions.end(), name) == static_cast<std::ptrdiff_t>(precisions.size())) {
        return name;
    }
    for (std::size_t stage = 1; stage < precisions.size(); ++stage) name += "+" + precisions[stage];
    return name;
}

}  // namespace edgedistill::detail
