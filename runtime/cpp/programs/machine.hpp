// What a measurement was taken on: the same fields as benchmarks/machine.py.
#pragma once

#include <stdlib.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cmath>
#include <edgedistill/version.hpp>
#include <fstream>
#include <iterator>
#include <openvino/core/version.hpp>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <thread>

#include "network.hpp"
#include "serve.hpp"

namespace edgedistill::programs {

inline std::string trimmed(const std::string& text) {
    const auto first = text.find_first_not_of(" \t\r\n");
    return first == std::string::npos ? "" : text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

inline std::optional<std::string> first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    return std::getline(file, line) ? std::optional<std::string>(trimmed(line)) : std::nullopt;
}

// A field of the first processor in /proc/cpuinfo; empty where there is none.
inline std::string cpu_field(const std::string& name) {
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line);) {
        const auto colon = line.find(':');
        if (colon != std::string::npos && trimmed(line.substr(0, colon)) == name) {
            return trimmed(line.substr(colon + 1));
        }
    }
    return "";
}

// The instruction sets that decide which kernels run.
inline Json cpu_flags() {
    std::istringstream words(cpu_field("flags") + " " + cpu_field("Features"));
    const std::set<std::string> all{std::istream_iterator<std::string>(words), {}};
    Json found = Json::array();
    for (const char* flag :
         {"avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
          "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"}) {
        if (all.count(flag) != 0) {
            found.push_back(flag);
        }
    }
    return found;
}

// CPUs' worth of time that a container's control group grants; null without a limit.
inline Json cpu_quota() {
    std::istringstream words(first_line("/sys/fs/cgroup/cpu.max").value_or(""));
    double quota = 0, period = 0;
    return words >> quota >> period && period > 0 ? Json(std::round(quota / period * 100) / 100) : nullptr;
}

// "2026.4.1" of "2026.4.1-22982-e213a147257-releases/2026/4".
inline std::string openvino_release() {
    const std::string build = ov::get_openvino_version().buildNumber;
    return build.substr(0, build.find('-'));
}

inline Json machine_record() {
    utsname system{};
    ::uname(&system);
    double load = 0;
    const bool has_load = ::getloadavg(&load, 1) == 1;
    const double gib = static_cast<double>(::sysconf(_SC_PAGE_SIZE)) * static_cast<double>(::sysconf(_SC_PHYS_PAGES)) /
                       static_cast<double>(1 << 30);
    std::string cpu = cpu_field("model name");
    cpu = cpu.empty() ? cpu_field("Model") : cpu;
    const auto governor = first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor");
    return {
        {"cpu", cpu.empty() ? std::string(system.machine) : cpu},
        {"architecture", system.machine},
        {"cpu_flags", cpu_flags()},
        {"cores", detail::usable_cores()},
        {"logical_cpus", std::thread::hardware_concurrency()},
        {"cpu_quota", cpu_quota()},
        {"frequency_governor", governor ? Json(*governor) : Json(nullptr)},
        {"memory_gib", std::round(gib * 10) / 10},
        {"load_average_1min", has_load ? Json(std::round(load * 100) / 100) : Json(nullptr)},
        {"kernel", std::string(system.sysname) + " " + system.release},
        {"python", nullptr},
        {"versions", {{"edgedistill", version()}, {"openvino", openvino_release()}}},
    };
}

}  // namespace edgedistill::programs
