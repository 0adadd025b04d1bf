// deploy.json: what was decided for a deployable, checked. The C++ form of the settings in runtime/bundle.py.
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include <edgedistill/options.hpp>

namespace edgedistill::detail {

// One network of a deployable.
struct Stage {
    std::string model;  // a POSIX path inside the deployable's folder
    std::string sha256;
    InputSpec input_spec;
    double temperature = 1.0;
    std::optional<double> exit_threshold;    // the confidence from which this stage's answer stands
    std::optional<std::string> int8_sha256;  // nothing: there is no INT8 form
};

struct LatencySettings {
    std::string precision = "f32";
    std::optional<int> threads;                  // nothing: all cores
    std::optional<std::string> later_precision;  // of a cascade's stages after the first; nothing: `precision`
};

struct ThroughputSettings {
    std::string precision = "f32";
    std::optional<int> streams;
    std::optional<int> threads;
    int batch = 1;
    std::optional<bool> pinning;
    // Of a cascade's stages after the first; nothing: `batch` and `precision`.
    std::optional<int> later_batch;
    std::optional<std::string> later_precision;
};

struct DeployConfig {
    std::vector<Stage> stages;  // at least one; all but the last have an exit_threshold
    LatencySettings latency;
    ThroughputSettings throughput;
    Decode decode = Decode::reduced;
    std::optional<double> reject_below;  // a final confidence below it answers "unknown"
    std::string cpu;                     // where the settings were measured; empty: not said
    std::optional<int> cores;            // on how many; nothing: not said
    std::string openvino_version;        // with which they were; empty: not said
};

// Each throws Error (artifact) that names the file, the field and what was expected.
DeployConfig read_deploy(const std::filesystem::path& path);
DeployConfig parse_deploy(std::string_view text, const std::string& name);

// Throws Error (artifact) for a missing or unknown field or one out of range.
InputSpec input_spec_from(const nlohmann::json& values);
// The same spec back, or Error (artifact) where a value is out of range.
InputSpec checked_spec(const InputSpec& spec);
bool same_spec(const InputSpec& one, const InputSpec& other);
// Whether both see an image as the same uint8 [height, width, 3]: mean and std are the network's affair.
bool same_pixels(const InputSpec& one, const InputSpec& other);

// Throws std::exception, also for text nested deeper than anything that is read here.
nlohmann::json parse_json(std::string_view text);

bool is_precision(std::string_view precision);
// What each of `stages` runs at. `later` nothing: all alike.
std::vector<std::string> stage_precisions(const std::string& precision, const std::optional<std::string>& later,
                                          std::size_t stages);
// "int8", or "int8+f32" where the stages of a cascade differ.
std::string precision_name(const std::vector<std::string>& precisions);

}  // namespace edgedistill::detail
