// edgedistill-classify: `edgedistill predict` without Python. The same options, output lines, CSV, JSON and exit codes:
// 0 ok, 1 an image could not be read or the job failed, 2 wrong usage.
#include <CLI/CLI.hpp>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <edgedistill/edgedistill.hpp>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "files.hpp"
#include "serving.hpp"
#include "sources.hpp"
#include "text.hpp"

namespace {

using namespace edgedistill;
using namespace edgedistill::programs;

struct Arguments : ServingArguments {
    std::string model;
    std::vector<std::string> sources;
    std::string csv;
    int top_k = 1;
    std::string precision;
    bool latency = false;
    bool probabilities = false;
    bool json = false;
};

// The network's own words.
struct Labels {
    const std::vector<std::string>* names = nullptr;
    const std::vector<Head>* heads = nullptr;
    bool multi_label = false;
};

// One thing said about an image; a value, and that no label applies, have no probability.
struct Said {
    std::string label;
    std::optional<float> probability;
};

std::vector<Said> heads_said(const Prediction& prediction, int top_k, const std::vector<Head>& heads) {
    std::vector<Said> said;
    for (std::size_t place = 0; place < heads.size(); ++place) {
        const Head& head = heads[place];
        const HeadPrediction& answer = prediction.heads[place];
        if (head.kind == HeadKind::regression) {
            said.push_back({head.name + "=" + formatted("%.6g", static_cast<double>(answer.value)), std::nullopt});
        } else if (top_k > 1) {
            const auto first = prediction.probabilities.begin() + static_cast<std::ptrdiff_t>(head.first);
            Prediction of_head;
            of_head.probabilities.assign(first, first + static_cast<std::ptrdiff_t>(head.width()));
            for (const Score& score : of_head.top_k(top_k, head.classes)) {
                said.push_back({head.name + "=" + score.label, score.probability});
            }
        } else if (head.kind == HeadKind::softmax) {
            said.push_back({head.name + "=" + answer.label, answer.probability});
        } else {
            for (const int number : answer.accepted) {
                const auto index = static_cast<std::size_t>(number);
                said.push_back({head.name + "=" + head.classes[index], prediction.probabilities[head.first + index]});
            }
            if (answer.accepted.empty()) said.push_back({head.name + "=none", std::nullopt});
        }
    }
    return said;
}

// What is said about an image: labels and probabilities from the likeliest down (top_k of each head); of several labels
// all.
std::vector<Said> said_of(const Prediction& prediction, int top_k, const Labels& labels) {
    if (prediction.index < 0) return {{prediction.label, prediction.probability}};
    if (!labels.heads->empty()) return heads_said(prediction, top_k, *labels.heads);
    std::vector<Said> said;
    if (top_k == 1 && labels.multi_label) {
        for (const int number : prediction.accepted) {
            const auto index = static_cast<std::size_t>(number);
            said.push_back({(*labels.names)[index], prediction.probabilities[index]});
        }
        if (said.empty()) said.push_back({"none", std::nullopt});
        return said;
    }
    if (top_k == 1) return {{prediction.label, prediction.probability}};
    for (const Score& score : prediction.top_k(top_k, *labels.names)) said.push_back({score.label, score.probability});
    return said;
}

std::string number_or(const std::optional<float>& value, const char* otherwise) {
    return value ? shortest(static_cast<double>(*value)) : otherwise;
}

std::string text_line(const Prediction& prediction, const std::vector<Said>& best) {
    std::vector<std::string> parts{prediction.name};
    for (const Said& said : best) {
        parts.push_back(said.label);
        if (said.probability) parts.back() += " " + formatted("%.4f", static_cast<double>(*said.probability));
    }
    return joined(parts, "\t");
}

std::string json_line(const Prediction& prediction, const std::vector<Said>& best) {
    std::vector<std::string> names, shares;
    for (const Said& said : best) {
        names.push_back(json_string(said.label));
        shares.push_back(number_or(said.probability, "null"));
    }
    return "{\"image\": " + json_string(prediction.name) + ", \"labels\": [" + joined(names, ", ") +
           "], \"probabilities\": [" + joined(shares, ", ") + "]}";
}

// Every class, with the nine digits that bring a float back exactly.
std::string probabilities_line(const Prediction& prediction) {
    std::vector<std::string> shares;
    for (const float share : prediction.probabilities) {
        shares.push_back(formatted("%.9g", static_cast<double>(share)));
    }
    return "{\"image\": " + json_string(prediction.name) + ", \"label\": " + json_string(prediction.label) +
           ", \"index\": " + std::to_string(prediction.index) + ", \"probabilities\": [" + joined(shares, ", ") + "]}";
}

std::string csv_row(const Prediction& prediction, const std::vector<Said>& best) {
    std::vector<std::string> fields{csv_field(prediction.name), csv_field(prediction.error)};
    for (const Said& said : best) {
        fields.push_back(csv_field(said.label));
        fields.push_back(number_or(said.probability, ""));
    }
    return joined(fields, ",") + "\r";
}

// Writes answers as they come, in order, never from two threads at once.
class Writer {
public:
    explicit Writer(const Arguments& arguments) : arguments_(arguments) {
        if (!arguments.csv.empty()) {
            csv_ = std::make_unique<WholeFile>(arguments.csv);
            put("image,error,label,probability\r");
        }
    }

    void write(const Prediction& prediction, const Labels& labels) {
        ++images_;
        errors_ += prediction.ok() ? 0 : 1;
        const auto best = prediction.ok() ? said_of(prediction, arguments_.top_k, labels) : std::vector<Said>();
        put(line(prediction, best));
        // A camera's answers and a pipe's reader should not wait for a full buffer.
        if (!csv_ && std::fflush(stdout) != 0 && output_fault_ == 0) {
            output_fault_ = errno;
        }
    }

    // Returns the exit code.
    int finish() {
        if (csv_) {
            csv_->commit();
            csv_.reset();
            if (arguments_.json) {
                std::printf("{\n  \"path\": %s,\n  \"images\": %lld,\n  \"errors\": %lld\n}\n",
                            json_string(arguments_.csv).c_str(), images_, errors_);
            } else {
                std::printf("%s\n", arguments_.csv.c_str());
            }
        }
        check_output(output_fault_);
        return errors_ > 0 ? 1 : 0;
    }

private:
    std::string line(const Prediction& prediction, const std::vector<Said>& best) const {
        if (csv_) {
            return csv_row(prediction, best);
        }
        const bool json = arguments_.json || arguments_.probabilities;
        if (!prediction.ok()) {
            return json ? "{\"image\": " + json_string(prediction.name) +
                              ", \"error\": " + json_string(prediction.error) + "}"
                        : prediction.name + "\terror: " + prediction.error;
        }
        if (arguments_.probabilities) {
            return probabilities_line(prediction);
        }
        return json ? json_line(prediction, best) : text_line(prediction, best);
    }

    void put(const std::string& text) {
        std::FILE* file = csv_ ? csv_->file() : stdout;
        std::fwrite(text.data(), 1, text.size(), file);
        std::fputc('\n', file);
    }

    const Arguments& arguments_;
    std::unique_ptr<WholeFile> csv_;
    long long images_ = 0;
    long long errors_ = 0;
    int output_fault_ = 0;  // errno of the first answer that could not be written
};

void for_all(const std::vector<std::string>& arguments, const Take& take) {
    for (const std::string& argument : arguments) {
        each_source(argument, take);
    }
}

// Many at once. What was handed over before a source turned out to be missing is still answered.
void with_engine(const Arguments& arguments, Writer& writer) {
    Labels labels;
    Engine engine(arguments.model, engine_options(arguments, arguments.precision),
                  [&](const Prediction& prediction) { writer.write(prediction, labels); });
    labels = {&engine.labels(), &engine.heads(), engine.multi_label()};
    std::exception_ptr fault;
    try {
        for_all(arguments.sources, [&](Source source) {
            if (source.is_file()) {
                engine.submit_file(std::move(source.path));
            } else {
                engine.submit(source.pixels, std::move(source.owner), std::move(source.name));
            }
        });
    } catch (const Error&) {
        fault = std::current_exception();
    }
    engine.finish();
    if (fault) {
        std::rethrow_exception(fault);
    }
}

// One at a time, every core on it.
void with_classifier(const Arguments& arguments, Writer& writer) {
    Classifier classifier(arguments.model, engine_options(arguments, arguments.precision));
    const Labels labels{&classifier.labels(), &classifier.heads(), classifier.multi_label()};
    Prediction answer;
    for_all(arguments.sources, [&](Source source) {
        try {
            source.is_file() ? classifier.classify_file(source.path, answer)
                             : classifier.classify(source.pixels, answer);
            answer.error.clear();
        } catch (const Error& error) {
            if (error.kind() != ErrorKind::image) {
                throw;
            }
            answer = Prediction();
            answer.error = error.what();
        }
        answer.name = source.name;
        writer.write(answer, labels);
    });
}

void add_options(CLI::App& program, Arguments& arguments) {
    program.add_option("model", arguments.model, "openvino/ folder, deploy.json or model.xml")->required();
    program.add_option("sources", arguments.sources, "Images, folders, videos, or a camera's number")->required();
    auto* csv = program.add_option("--csv", arguments.csv, "Write the answers to this file");
    program.add_option("--top-k", arguments.top_k, "Labels per image")->check(CLI::PositiveNumber);
    program.add_option("--precision", arguments.precision, "f32, bf16 or int8 (default: as deployed)")
        ->check(CLI::IsMember({"f32", "bf16", "int8"}));
    auto* streams = add_serving_options(program, arguments);
    program.add_flag("--latency", arguments.latency, "One image at a time, all cores on it")->excludes(streams);
    program.add_flag("--probabilities", arguments.probabilities, "One JSON object a line with every class")
        ->excludes(csv);
    program.add_flag("--json", arguments.json, "One JSON object a line, or one about the CSV");
    program.set_version_flag("--version", std::string("edgedistill ") + version());
}

int run(const Arguments& arguments) {
    Writer writer(arguments);
    arguments.latency ? with_classifier(arguments, writer) : with_engine(arguments, writer);
    return writer.finish();
}

}  // namespace

int main(int count, char** words) {
    Arguments arguments;
    CLI::App program("Classify images, folders and videos. Exit code 1 if an image could not be read.",
                     "edgedistill-classify");
    add_options(program, arguments);
    try {
        program.parse(count, words);
    } catch (const CLI::ParseError& error) {
        return program.exit(error) == 0 ? 0 : 2;
    }
    try {
        return run(arguments);
    } catch (const Error& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return error.kind() == ErrorKind::usage ? 2 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
}
