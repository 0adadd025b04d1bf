#include "processor.hpp"

#include <sys/utsname.h>

#include <fstream>
#include <openvino/core/version.hpp>
#include <string>
#include <string_view>

#include "bundle.hpp"
#include "error.hpp"
#include "network.hpp"
#include "text.hpp"

namespace edgedistill::detail {

namespace {

std::string_view stripped(std::string_view text) {
    const std::size_t first = text.find_first_not_of(" \t");
    return first == std::string_view::npos ? std::string_view{}
                                           : text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

// The model name of the first processor in /proc/cpuinfo.
std::string cpu_name() {
    std::ifstream file("/proc/cpuinfo");
    std::string model;
    for (std::string line; std::getline(file, line);) {
        const std::size_t colon = line.find(':');
        if (colon == std::string::npos) continue;
        const std::string_view key = stripped(std::string_view(line).substr(0, colon));
        const std::string_view value = stripped(std::string_view(line).substr(colon + 1));
        if (key == "model name" && !value.empty()) return std::string(value);
        if (key == "Model" && model.empty()) model = value;
    }
    utsname names{};
    return !model.empty() || ::uname(&names) != 0 ? model : std::string(names.machine);
}

// "2026.4.1" -> "2026.4"
std::string release(const std::string& version) {
    const std::size_t major = version.find('.');
    return major == std::string::npos ? version : version.substr(0, version.find('.', major + 1));
}

bool is_safe(const LatencySettings& latency, const ThroughputSettings& throughput) {
    return latency.precision == "f32" && !latency.threads && !latency.later_precision &&
           throughput.precision == "f32" && !throughput.streams && !throughput.threads && throughput.batch == 1 &&
           !throughput.pinning && !throughput.later_batch && !throughput.later_precision;
}

}  // namespace

TunedSettings settings_here(const Bundle& bundle, const LogCallback& log) {
    const DeployConfig& config = bundle.config();
    if (is_safe(config.latency, config.throughput)) return {};
    const std::string here = cpu_name();
    if (!config.cpu.empty() && config.cpu != here) {
        warn(log, bundle.source() + ": its settings were measured on " + in_quotes(config.cpu, 100) + ", this is " +
                      in_quotes(here, 100) +
                      ": running with safe ones (f32, one stream per core); 'edgedistill tune' finds this CPU's");
        return {};
    }
    const std::string then = release(config.openvino_version);
    const std::string now = release(ov::get_openvino_version().buildNumber);
    if (!then.empty() && !now.empty() && then != now) {
        warn(log, bundle.source() + ": its settings were measured with OpenVINO " + plain(then, 40) + ", this is " +
                      now + "; 'edgedistill tune' measures again");
    }
    TunedSettings tuned{config.latency, config.throughput};
    const int cores = usable_cores();
    const bool spread = tuned.latency.threads || tuned.throughput.streams || tuned.throughput.threads;
    if (spread && config.cores && *config.cores != cores) {
        warn(log, bundle.source() + ": its settings were measured on " + std::to_string(*config.cores) +
                      " cores, here " + std::to_string(cores) +
                      " are usable: running with one stream per core; 'edgedistill tune' measures again");
        tuned.latency.threads.reset();
        tuned.throughput.streams.reset();
        tuned.throughput.threads.reset();
    }
    return tuned;
}

}  // namespace edgedistill::detail
