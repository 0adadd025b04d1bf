// The options of how a deployable is served, which both programs have.
#pragma once

#include <CLI/CLI.hpp>
#include <edgedistill/engine.hpp>
#include <optional>
#include <string>

namespace edgedistill::programs {

// Unset and empty: what deploy.json says.
struct ServingArguments {
    std::string decode;
    std::optional<int> streams;
    std::optional<int> threads;
    bool no_cache = false;
};

// Returns --streams, which other options may exclude.
inline CLI::Option* add_serving_options(CLI::App& program, ServingArguments& arguments) {
    program.add_option("--decode", arguments.decode, "reduced or full (default: as deployed)")
        ->check(CLI::IsMember({"full", "reduced"}));
    auto* streams =
        program.add_option("--streams", arguments.streams, "Images worked on at once (default: as deployed)");
    program.add_option("--threads", arguments.threads, "Inference threads in all (default: as deployed)");
    program.add_flag("--no-cache", arguments.no_cache, "Keep no compiled models between runs");
    return streams;
}

inline EngineOptions engine_options(const ServingArguments& arguments, const std::string& precision) {
    EngineOptions options;
    options.precision = precision;
    options.streams = arguments.streams;
    options.threads = arguments.threads;
    options.cache.enabled = !arguments.no_cache;
    if (!arguments.decode.empty()) {
        options.decode = arguments.decode == "full" ? Decode::full : Decode::reduced;
    }
    return options;
}

}  // namespace edgedistill::programs
