// Arbitrary text as deploy.json: settings that hold, or an error that names the file.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include <edgedistill/error.hpp>

#include "deploy.hpp"
#include "fuzz_options.hpp"

namespace edgedistill::fuzz {
namespace {

constexpr const char* name = "deploy.json";

bool is_share(const std::optional<double>& value) {
    return !value || (*value >= 0 && *value <= 1);
}
bool is_count(const std::optional<int>& value) {
    return !value || (*value >= 1 && *value <= 4096);
}

void check(const detail::Stage& stage) {
    const std::filesystem::path path(stage.model);
    const bool is_xml = stage.model.size() >= 4 && stage.model.compare(stage.model.size() - 4, 4, ".xml") == 0;
    promise(path.is_relative() && is_xml, "a model is an .xml file inside the folder", stage.model);
    promise(std::find(path.begin(), path.end(), "..") == path.end(), "no path leads out of the folder", stage.model);
    promise(stage.model.find('\0') == std::string::npos, "the path that is checked is the path that is opened");
    promise(stage.sha256.size() == 64, "every file has a checksum", stage.sha256);
    promise(stage.temperature > 0 && stage.temperature <= 1000, "the temperature can divide");
    promise(is_share(stage.exit_threshold), "a threshold is a probability");
    promise(stage.input_spec.height >= 8 && stage.input_spec.height <= 4096, "the height is in range");
    promise(stage.input_spec.width >= 8 && stage.input_spec.width <= 4096, "the width is in range");
}

template <typename Settings>
void check_precisions(const Settings& settings, std::size_t stages) {
    promise(stages > 1 || !settings.later_precision, "a single stage has none after it");
    const auto precisions = detail::stage_precisions(settings.precision, settings.later_precision, stages);
    promise(precisions.size() == stages, "every stage has a precision");
    for (const std::string& precision : precisions) {
        promise(detail::is_precision(precision), "the precision is known", precision);
    }
    promise(!detail::precision_name(precisions).empty(), "the precisions have a name");
}

void check(const detail::DeployConfig& config) {
    promise(!config.stages.empty(), "there is a stage");
    for (const detail::Stage& stage : config.stages) check(stage);
    promise(is_share(config.reject_below), "reject_below is a probability");
    promise(is_count(config.latency.threads) && is_count(config.throughput.threads), "threads are in range");
    promise(is_count(config.throughput.streams) && is_count(config.throughput.batch), "streams and batch are in range");
    promise(is_count(config.throughput.later_batch), "the later stages' batch is in range");
    check_precisions(config.latency, config.stages.size());
    check_precisions(config.throughput, config.stages.size());
}

}  // namespace
}  // namespace edgedistill::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace edgedistill;
    using namespace edgedistill::fuzz;
    try {
        check(detail::parse_deploy({reinterpret_cast<const char*>(data), size}, name));
    } catch (const Error& error) {
        promise(error.kind() == ErrorKind::artifact, "the file is to blame", error.what());
        check_message(error.what(), name);
    }
    return 0;
}
