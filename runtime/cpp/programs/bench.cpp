// edgedistill-bench: how many images a second a deployable answers on this machine, without Python.
//
// The three scopes of bench-fps that are never mixed: `model` (pixels of the network's size to answer, no queue),
// `frames` (decoded pixels to answer) and `files` (encoded bytes in memory to answer). Interleaved rounds, medians with
// the smallest and largest; the record is bench-fps's. With --serve it answers bench-fps instead, which compares it
// with everything else.
#include <sha256.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <edgedistill/edgedistill.hpp>
#include <filesystem>
#include <map>
#include <memory>
#include <openvino/runtime/core.hpp>
#include <openvino/runtime/properties.hpp>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "files.hpp"
#include "machine.hpp"
#include "ours.hpp"
#include "photos.hpp"
#include "processor.hpp"
#include "serve.hpp"
#include "serving.hpp"
#include "sources.hpp"

namespace {

using namespace edgedistill;
using namespace edgedistill::programs;
using edgedistill::detail::Bundle;

constexpr const char* kCandidate = "edgedistill-cpp";
constexpr std::size_t kMaxImages = 64;
constexpr double kSpreadLimit = 0.20;
const std::vector<std::string> kScopes{"model", "frames", "files"};
const std::vector<std::string> kModes{"latency", "throughput"};
const std::vector<std::string> kPrecisions{"f32", "bf16", "int8"};

struct Arguments : ServingArguments {
    std::string model;
    std::vector<std::string> images;
    std::vector<std::string> scopes = kScopes;
    std::vector<std::string> precisions;
    int rounds = 5;
    double seconds = 2.0;
    std::string out;
    bool json = false;
    bool serve = false;
    std::string command;
};

// Images that are measured together.
struct InputSet {
    std::string name;
    Photos photos;
};

// One measurement. `block`: entries of one scope and input are measured in the same rounds and may be compared.
struct Entry {
    std::string scope, mode, input, precision, reason;
    Case one;
    std::vector<Slice> slices;

    std::pair<std::string, std::string> block() const { return {scope, input}; }
};

void warn(const std::string& message) {
    std::fprintf(stderr, "warning: %s\n", message.c_str());
}

// ---- images -------------------------------------------------------------------------------------------------------

// Up to kMaxImages of them, evenly drawn, each decoded once to see that it can be.
InputSet input_set(const std::string& argument) {
    const fs::path path = tidy(argument);
    std::vector<fs::path> files{path};
    if (fs::is_directory(path)) {
        files = folder_images(path);
    } else if (!fs::is_regular_file(path)) {
        throw Error(ErrorKind::usage, argument + ": no such file or folder; give images or folders of them");
    }
    auto photos = std::make_shared<std::vector<Photo>>();
    std::set<std::string> sizes;
    const std::size_t step = std::max<std::size_t>(1, (files.size() + kMaxImages - 1) / kMaxImages);
    for (std::size_t number = 0; number < files.size(); number += step) {
        try {
            Photo photo = opened(files[number].string());
            decoded(photo);
            sizes.insert(std::to_string(photo.width) + "x" + std::to_string(photo.height) + " " + photo.kind);
            photos->push_back(std::move(photo));
        } catch (const Error& error) {
            warn(std::string(error.what()) + "; left out");
        }
    }
    if (photos->empty()) {
        throw Error(ErrorKind::usage, argument + ": none of its images can be read; see the warnings");
    }
    const std::string name = path.has_filename() ? path.filename().string() : path.string();
    const std::string size = sizes.size() == 1 ? *sizes.begin() : std::to_string(sizes.size()) + " sizes";
    const std::string count = std::to_string(photos->size());
    return {photos->size() == 1 ? name + " " + size : name + ", " + count + " images, " + size, photos};
}

// The second of a name gets " (2)", as in Python: from here on an input goes by its name.
void tell_apart(std::vector<InputSet>& sets) {
    std::set<std::string> taken;
    for (InputSet& set : sets) {
        const std::string name = set.name;
        for (int number = 2; !taken.insert(set.name).second; ++number) {
            set.name = name + " (" + std::to_string(number) + ")";
        }
    }
}

// The folder that deploy.json's paths start from.
fs::path root_of(const Bundle& bundle) {
    const fs::path source = bundle.source();
    for (const fs::path& root : {source, source / "openvino", source.parent_path()}) {
        if (fs::is_regular_file(root / bundle.config().stages.front().model)) {
            return root;
        }
    }
    return source.parent_path();
}

std::vector<std::string> runnable_precisions(const Bundle& bundle) {
    const auto abilities = bundle.core().get_property("CPU", ov::device::capabilities);
    std::vector<std::string> found{"f32"};
    if (std::find(abilities.begin(), abilities.end(), "BF16") != abilities.end()) {
        found.push_back("bf16");
    }
    const auto& stages = bundle.config().stages;
    if (std::all_of(stages.begin(), stages.end(), [](const auto& stage) { return stage.int8_sha256.has_value(); })) {
        found.push_back("int8");
    }
    return found;
}

// ---- measuring ----------------------------------------------------------------------------------------------------

// "int8+f32" by mode: what the stages of a cascade are deployed at here, where they differ.
std::map<std::string, std::string> unlike_precisions(const Bundle& bundle) {
    const auto tuned = detail::settings_here(bundle, [](LogLevel, std::string_view) {});
    std::map<std::string, std::string> found;
    const auto add = [&](const std::string& mode, const auto& settings) {
        const std::string name = detail::precision_name(
            detail::stage_precisions(settings.precision, settings.later_precision, bundle.config().stages.size()));
        if (!detail::is_precision(name)) {
            found.emplace(mode, name);
        }
    };
    add("latency", tuned.latency);
    add("throughput", tuned.throughput);
    return found;
}

std::vector<Entry> planned(const Arguments& arguments, const Bundle& bundle, const std::vector<InputSet>& sets) {
    const InputSpec& spec = bundle.config().stages.back().input_spec;
    const std::string tensor = std::to_string(spec.width) + "x" + std::to_string(spec.height) + " tensor";
    const auto precisions = arguments.precisions.empty() ? runnable_precisions(bundle) : arguments.precisions;
    const auto unlike = arguments.precisions.empty() ? unlike_precisions(bundle) : std::map<std::string, std::string>{};
    std::vector<Entry> entries;
    for (const std::string& scope : arguments.scopes) {
        for (std::size_t number = 0; number < (scope == "model" ? 1 : sets.size()); ++number) {
            const std::string& input = scope == "model" ? tensor : sets[number].name;
            for (const std::string& precision : precisions) {
                for (const std::string& mode : kModes) {
                    entries.push_back({scope, mode, input, precision, "", {}, {}});
                }
            }
            if (scope == "model") {
                continue;
            }
            for (const auto& [mode, precision] : unlike) {
                entries.push_back({scope, mode, input, precision, "", {}, {}});
            }
        }
    }
    return entries;
}

// Candidates by precision and model. Scope `model` of a cascade is its last network alone, as in Python.
using Candidates = std::map<std::pair<std::string, std::string>, Ours>;

void prepare(const Arguments& arguments, const Bundle& bundle, const std::vector<InputSet>& sets, Candidates& ours,
             Entry& entry) {
    const auto same = [&](const InputSet& set) { return set.name == entry.input; };
    const auto found = std::find_if(sets.begin(), sets.end(), same);
    const InputSet& set = found == sets.end() ? sets.front() : *found;
    const auto& stages = bundle.config().stages;
    const bool last = entry.scope == "model" && stages.size() > 1;
    const std::string model = last ? (root_of(bundle) / stages.back().model).string() : arguments.model;
    try {
        // One precision is for all stages; unlike ones are deploy.json's.
        const auto options = engine_options(arguments, detail::is_precision(entry.precision) ? entry.precision : "");
        const auto place = ours.try_emplace({entry.precision, model}, model, options).first;
        entry.one = place->second.prepare(entry.scope, entry.mode, set.photos);
        warm_up(entry.one);
    } catch (const Error& error) {
        if (error.kind() == ErrorKind::artifact) {
            throw;
        }
        entry.reason = error.what();
    }
}

// Everything once per round; the order is rotated so that over the rounds everyone stands early, late and between.
void interleave(const std::vector<Entry*>& block, int rounds, double seconds) {
    const auto count = static_cast<long>(block.size());
    const long step = std::max(1L, std::lround(static_cast<double>(count) / rounds));
    for (long round = 0; round < rounds; ++round) {
        for (long position = 0; position < count; ++position) {
            Entry& entry = *block[static_cast<std::size_t>((round * step + position) % count)];
            measure(entry.one, kPreRollShare * seconds);
            entry.slices.push_back(measure(entry.one, seconds));
        }
    }
}

void measure_all(std::vector<Entry>& entries, const Arguments& arguments) {
    std::vector<std::vector<Entry*>> blocks;
    for (Entry& entry : entries) {
        if (!entry.reason.empty()) {
            continue;
        }
        if (blocks.empty() || blocks.back().front()->block() != entry.block()) {
            blocks.emplace_back();
        }
        blocks.back().push_back(&entry);
    }
    for (const auto& block : blocks) {
        std::fprintf(stderr, "measuring %s: %s\n", block.front()->scope.c_str(), block.front()->input.c_str());
        interleave(block, arguments.rounds, arguments.seconds);
    }
}

// ---- the record ---------------------------------------------------------------------------------------------------

double rounded(double value, int digits) {
    const double scale = std::pow(10.0, digits);
    return std::round(value * scale) / scale;
}

double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    const std::size_t middle = values.size() / 2;
    return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

Json fps_of(const std::vector<Slice>& slices) {
    std::vector<double> fps;
    Json rounds = Json::array();
    for (const Slice& slice : slices) {
        fps.push_back(static_cast<double>(slice.count) / slice.seconds);
        rounds.push_back(rounded(fps.back(), 2));
    }
    const auto [least, most] = std::minmax_element(fps.begin(), fps.end());
    return {{"median", rounded(median(fps), 4)},
            {"min", rounded(*least, 4)},
            {"max", rounded(*most, 4)},
            {"rounds", rounds}};
}

// p50, p90 and p99 over the images of all rounds: the smallest value that at least that share did not exceed.
Json latency_of(const std::vector<Slice>& slices) {
    std::vector<double> pooled;
    for (const Slice& slice : slices) {
        pooled.insert(pooled.end(), slice.latency_us.begin(), slice.latency_us.end());
    }
    if (pooled.empty()) {
        return nullptr;
    }
    std::sort(pooled.begin(), pooled.end());
    Json found;
    for (const std::size_t share : {50, 90, 99}) {
        const std::size_t place = std::max<std::size_t>(1, (pooled.size() * share + 99) / 100) - 1;
        found["p" + std::to_string(share)] = rounded(pooled[place] / 1e3, 4);
    }
    return found;
}

Json named(const Entry& entry) {
    return {{"candidate", kCandidate},
            {"scope", entry.scope},
            {"mode", entry.mode},
            {"precision", entry.precision},
            {"input", entry.input}};
}

Json result_rows(const std::vector<Entry>& entries) {
    Json rows = Json::array();
    for (const Entry& entry : entries) {
        if (entry.slices.empty()) {
            continue;
        }
        Json row = named(entry);
        row["fps"] = fps_of(entry.slices);
        row["latency_ms"] = latency_of(entry.slices);
        row["ratio_to_naive_f32"] = nullptr;
        row["settings"] = entry.one.settings;
        rows.push_back(std::move(row));
    }
    return rows;
}

Json warnings_for(const Json& rows) {
    std::size_t noisy = 0;
    for (const Json& row : rows) {
        const Json& fps = row["fps"];
        noisy +=
            (fps["max"].get<double>() - fps["min"].get<double>()) / fps["median"].get<double>() > kSpreadLimit ? 1 : 0;
    }
    if (noisy == 0) {
        return Json::array();
    }
    return Json::array(
        {std::to_string(noisy) + " of " + std::to_string(rows.size()) +
         " figures vary by more than 20% between rounds: something else uses this machine; measure again with more "
         "--rounds"});
}

std::string sha256_of(const std::vector<std::uint8_t>& data) {
    char digest[SHA256_DIGEST_STRING_LENGTH];
    return ::SHA256Data(data.data(), data.size(), digest);
}

// One hash over all files of the networks, and the hash of each.
Json artifact(const Arguments& arguments, const Bundle& bundle) {
    const fs::path root = root_of(bundle);
    Json models = Json::object();
    std::vector<std::string> lines;
    for (const auto& stage : bundle.config().stages) {
        std::map<std::string, std::string> found{{stage.model, stage.sha256}};
        if (stage.int8_sha256) {
            found.emplace(stage.model.substr(0, stage.model.size() - 4) + "-int8.xml", *stage.int8_sha256);
        }
        for (const auto& [model, hash] : found) {
            models[model] = hash;
            for (const fs::path& file : {root / model, (root / model).replace_extension(".bin")}) {
                lines.push_back(file.filename().string() + std::string(1, '\0') + sha256_of(read_file(file)) + "\n");
            }
        }
    }
    std::sort(lines.begin(), lines.end());
    std::string all;
    for (const std::string& line : lines) {
        all += line;
    }
    const std::string hash = sha256_of({all.begin(), all.end()});
    return {{"path", arguments.model}, {"sha256", hash}, {"models", models}};
}

Json settings_of(const Arguments& arguments) {
    return {{"path", arguments.model},           {"scopes", arguments.scopes}, {"vs", Json::array()},
            {"images", arguments.images},        {"rounds", arguments.rounds}, {"seconds", arguments.seconds},
            {"precisions", arguments.precisions}};
}

Json record_of(const Arguments& arguments, const Bundle& bundle, const Json& machine,
               const std::vector<Entry>& entries) {
    const Json rows = result_rows(entries);
    Json missing = Json::array();
    for (const Entry& entry : entries) {
        if (!entry.reason.empty()) {
            missing.push_back(named(entry));
            missing.back()["reason"] = entry.reason;
        }
    }
    Json record;
    record["format"] = "edgedistill-bench";
    record["version"] = 1;
    record["machine"] = machine;
    record["command"] = arguments.command;
    record["artifact"] = artifact(arguments, bundle);
    record["settings"] = settings_of(arguments);
    record["rounds"] = arguments.rounds;
    record["results"] = rows;
    record["not_measured"] = missing;
    record["score"] = nullptr;
    record["warnings"] = warnings_for(rows);
    return record;
}

// ---- the terminal -------------------------------------------------------------------------------------------------

// Three significant digits or all before the point.
std::string brief(double value) {
    char text[32];
    std::snprintf(text, sizeof text, value >= 100 ? "%.0f" : value >= 10 ? "%.1f" : "%.2f", value);
    return text;
}

void print_row(const Json& row) {
    const Json& fps = row["fps"];
    const Json& latency = row["latency_ms"];
    const std::string spread = brief(fps["min"]) + "-" + brief(fps["max"]);
    const std::string times =
        latency.is_null() ? "-" : brief(latency["p50"]) + " / " + brief(latency["p90"]) + " / " + brief(latency["p99"]);
    std::printf("  %-9s %-11s %8s  %-15s %s\n", row["precision"].get<std::string>().c_str(),
                row["mode"].get<std::string>().c_str(), brief(fps["median"]).c_str(), spread.c_str(), times.c_str());
}

void print_tables(const Json& record) {
    std::string block;
    const Json rows = record["results"];
    for (const Json& row : rows) {
        const std::string title = row["scope"].get<std::string>() + ": " + row["input"].get<std::string>();
        if (title != block) {
            std::printf("%s%s\n  %-9s %-11s %8s  %-15s %s\n", block.empty() ? "" : "\n", title.c_str(), "", "mode",
                        "FPS", "min-max", "p50 / p90 / p99 ms");
            block = title;
        }
        print_row(row);
    }
    for (const auto& row : record["not_measured"]) {
        std::printf("%s %s %s not measured: %s\n", row["scope"].get<std::string>().c_str(),
                    row["precision"].get<std::string>().c_str(), row["mode"].get<std::string>().c_str(),
                    row["reason"].get<std::string>().c_str());
    }
    for (const auto& warning : record["warnings"]) {
        std::printf("%s\n", warning.get<std::string>().c_str());
    }
}

// A folder of ours that cannot be written (an image of a device) costs a warning; a file that was asked for, an error.
std::string written(const Arguments& arguments, const Bundle& bundle, const std::string& text) {
    fs::path out = arguments.out;
    if (out.empty() && fs::is_regular_file(root_of(bundle) / "deploy.json")) {
        out = root_of(bundle) / "bench-cpp.json";
    }
    if (out.empty()) {
        return "";
    }
    try {
        WholeFile file(out);
        std::fwrite(text.data(), 1, text.size(), file.file());
        file.commit();
    } catch (const Error& error) {
        if (!arguments.out.empty()) {
            throw;
        }
        warn(std::string(error.what()) + "; the record is not kept");
        return "";
    }
    return out.string();
}

int bench(const Arguments& arguments) {
    const Json machine = machine_record();
    const auto bundle = Bundle::load(arguments.model);
    std::vector<InputSet> sets;
    for (const std::string& argument : arguments.images) {
        sets.push_back(input_set(argument));
    }
    tell_apart(sets);
    auto entries = planned(arguments, *bundle, sets);
    const double minutes = static_cast<double>(entries.size()) * arguments.rounds * arguments.seconds / 60;
    std::fprintf(stderr, "%zu measurements x %d rounds x %g s: about %.1f minutes\n", entries.size(), arguments.rounds,
                 arguments.seconds, minutes);
    Candidates ours;
    for (Entry& entry : entries) {
        prepare(arguments, *bundle, sets, ours, entry);
    }
    if (std::all_of(entries.begin(), entries.end(), [](const Entry& entry) { return !entry.reason.empty(); })) {
        throw Error(ErrorKind::model, arguments.model + ": could not be measured: " + entries.front().reason);
    }
    measure_all(entries, arguments);
    const auto record = record_of(arguments, *bundle, machine, entries);
    const std::string text = record.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
    const std::string out = written(arguments, *bundle, text);
    if (arguments.json) {
        std::fputs(text.c_str(), stdout);
    } else {
        print_tables(record);
        if (!out.empty()) {
            std::printf("%s\n", out.c_str());
        }
    }
    check_output();
    return 0;
}

// One process serves all scopes, modes and inputs of one precision. "own_threads" in a request: of the classifier.
int answer_bench_fps() {
    std::map<std::string, Ours> ours;
    return serve([&](const Json& request) {
        EngineOptions options;
        options.precision = request.at("precision").is_null() ? "" : request.at("precision").get<std::string>();
        const int threads = request.value("own_threads", 0);
        if (threads > 0) {
            options.threads = threads;
        }
        const bool last = request.at("scope") == "model" && request.value("stages", 1) > 1;
        const std::string model = request.at(last ? "model" : "deployable");
        const std::string key = options.precision + " " + std::to_string(threads) + " " + model;
        const auto place = ours.try_emplace(key, model, options).first;
        return place->second.prepare(request.at("scope"), request.at("mode"), load_photos(request.at("images")));
    });
}

// An option that takes one word of known names with commas between.
void add_list(CLI::App& program, const std::string& name, std::vector<std::string>& values, const std::string& help,
              const std::vector<std::string>& known) {
    program.add_option_function<std::string>(
        name,
        [name, known, &values](const std::string& text) {
            values = CLI::detail::split(text, ',');
            for (const std::string& value : values) {
                if (std::find(known.begin(), known.end(), value) == known.end()) {
                    throw CLI::ValidationError(name, value + ": unknown, expected some of " + CLI::detail::join(known));
                }
            }
        },
        help);
}

void add_options(CLI::App& program, Arguments& arguments) {
    auto* serving = program.add_flag("--serve", arguments.serve, "Answer bench-fps on standard input");
    program.add_option("model", arguments.model, "openvino/ folder, deploy.json or model.xml")->excludes(serving);
    program.add_option("images,--images", arguments.images, "Files or folders, each an input of its own")
        ->excludes(serving);
    add_list(program, "--scope", arguments.scopes, "model, frames, files (comma between)", kScopes);
    add_list(program, "--precision", arguments.precisions, "f32, bf16, int8 (default: all that there are)",
             kPrecisions);
    add_serving_options(program, arguments);
    program.add_option("--rounds", arguments.rounds, "Interleaved rounds")->check(CLI::Range(1, 1000));
    program.add_option("--seconds", arguments.seconds, "Per measurement and round")->check(CLI::Range(0.05, 600.0));
    program.add_option("--out", arguments.out, "JSON record (default: bench-cpp.json in the folder)");
    program.add_flag("--json", arguments.json, "Print the record instead of tables");
    program.set_version_flag("--version", std::string("edgedistill ") + version());
}

}  // namespace

int main(int count, char** words) {
    Arguments arguments;
    for (int number = 0; number < count; ++number) {
        arguments.command +=
            (number == 0 ? "" : " ") + (number == 0 ? fs::path(words[0]).filename() : fs::path(words[number])).string();
    }
    CLI::App program("Measure frames a second in three scopes.", "edgedistill-bench");
    add_options(program, arguments);
    try {
        program.parse(count, words);
        if (!arguments.serve && (arguments.model.empty() || arguments.images.empty())) {
            throw CLI::RequiredError("a model and images");
        }
    } catch (const CLI::ParseError& error) {
        return program.exit(error) == 0 ? 0 : 2;
    }
    try {
        return arguments.serve ? answer_bench_fps() : bench(arguments);
    } catch (const Error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return error.kind() == ErrorKind::usage ? 2 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
