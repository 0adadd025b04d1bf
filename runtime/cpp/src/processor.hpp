// What deploy.json's settings are worth on the processor that this program runs on: runtime/processor.py.
#pragma once

#include <edgedistill/options.hpp>

#include "deploy.hpp"

namespace edgedistill::detail {

class Bundle;

struct TunedSettings {
    LatencySettings latency;
    ThroughputSettings throughput;
};

// deploy.json's settings on the CPU that they were measured on; elsewhere safe ones, with a warning. Safe is f32 (the
// form that the certificate proves, and the one that every CPU computes alike), one stream per core, one image per
// inference. Another number of cores keeps precision and batch and has one stream per core; it is warned about, and so
// is another release of OpenVINO, which keeps everything. A deploy.json that names no CPU is taken at its word.
TunedSettings settings_here(const Bundle& bundle, const LogCallback& log);

}  // namespace edgedistill::detail
