// The classifier's answers as JSON lines, for comparison with Python's.
//
//     answer_dump MODEL [PRECISION [DECODE]] < images
//
// PRECISION and DECODE may be "-": what deploy.json says. One image a line, of one of these kinds (tabs between the
// parts):
//
//     file PATH
//     bytes PATH
//     pixels FORMAT HEIGHT WIDTH ROW_BYTES PATH      (PATH: nothing but the pixels)
//
// MODEL "memory:MODEL.XML" reads the model and hands it over in memory. First comes a line about the model, then one an
// image; when the model is refused, one line with `error` and `kind`, and the program ends with 1.
//
//     answer_dump - < models
//
// One model a line: a line about each with its `answer` for a grey image, or its `error` and `kind`.
#include <chrono>
#include <edgedistill/edgedistill.hpp>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

namespace {

using edgedistill::Bytes;
using edgedistill::Classifier;
using edgedistill::Error;
using edgedistill::ImageView;
using edgedistill::PixelFormat;
using edgedistill::Prediction;
using nlohmann::json;

std::vector<std::uint8_t> read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<std::string> parts_of(const std::string& line) {
    std::vector<std::string> parts;
    std::istringstream stream(line);
    for (std::string part; std::getline(stream, part, '\t');) parts.push_back(part);
    return parts;
}

PixelFormat format_of(const std::string& name) {
    const std::vector<std::string> names = {"bgr", "rgb", "gray", "bgra", "rgba", "nv12", "i420"};
    for (std::size_t number = 0; number < names.size(); ++number) {
        if (names[number] == name) return static_cast<PixelFormat>(number);
    }
    throw std::invalid_argument("no pixel format " + name);
}

Prediction answer(Classifier& classifier, const std::vector<std::string>& parts) {
    if (parts.at(0) == "file") return classifier.classify_file(parts.at(1));
    const auto data = read_file(parts.back());
    if (parts[0] == "bytes") return classifier.classify(Bytes{data.data(), data.size()});
    ImageView view;
    view.data = data.data();
    view.format = format_of(parts.at(1));
    view.height = std::stoi(parts.at(2));
    view.width = std::stoi(parts.at(3));
    view.row_bytes = std::stoul(parts.at(4));
    return classifier.classify(view);
}

json described(const Prediction& prediction) {
    return {{"label", prediction.label},
            {"index", prediction.index},
            {"probability", prediction.probability},
            {"probabilities", prediction.probabilities},
            {"accepted", prediction.accepted},
            {"name", prediction.name},
            {"stage", prediction.stage}};
}

Classifier open(const std::string& model, const edgedistill::Options& options) {
    const std::string memory = "memory:";
    if (model.compare(0, memory.size(), memory) != 0) return Classifier(model, options);
    std::filesystem::path path = model.substr(memory.size());
    const auto xml = read_file(path);
    const auto weights = read_file(path.replace_extension(".bin"));
    return Classifier::from_memory({xml.data(), xml.size()}, {weights.data(), weights.size()}, options);
}

json described(const Classifier& classifier) {
    const edgedistill::InputSpec& spec = classifier.spec();
    return {{"labels", classifier.labels()},
            {"precision", classifier.precision()},
            {"temperature", classifier.temperature()},
            {"multi_label", classifier.multi_label()},
            {"size", {spec.height, spec.width}},
            {"mean", spec.mean},
            {"std", spec.std}};
}

const char* name_of(edgedistill::ErrorKind kind) {
    switch (kind) {
        case edgedistill::ErrorKind::usage:
            return "usage";
        case edgedistill::ErrorKind::image:
            return "image";
        case edgedistill::ErrorKind::artifact:
            return "artifact";
        case edgedistill::ErrorKind::model:
            return "model";
        case edgedistill::ErrorKind::closed:
            return "closed";
    }
    return "";
}

// Bytes that are not UTF-8, as in a name of a file, are replaced.
void print(const json& line) {
    std::cout << line.dump(-1, ' ', true, json::error_handler_t::replace) << '\n';
}

void answer_all(Classifier& classifier, std::chrono::steady_clock::time_point start) {
    double first_label_s = 0.0;
    for (std::string line; std::getline(std::cin, line);) {
        json result;
        try {
            result = described(answer(classifier, parts_of(line)));
        } catch (const Error& error) {
            result = {{"error", error.what()}, {"kind", name_of(error.kind())}};
        }
        if (first_label_s == 0.0) {
            first_label_s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
            result["first_label_s"] = first_label_s;
        }
        print(result);
    }
}

json opened_and_asked(const std::string& model, const edgedistill::Options& options) {
    const std::vector<std::uint8_t> grey(std::size_t{40} * 56, 120);
    const ImageView view{grey.data(), 40, 56, 0, PixelFormat::gray};
    try {
        Classifier classifier = open(model, options);
        json result = described(classifier);
        result["answer"] = described(classifier.classify(view));
        return result;
    } catch (const Error& error) {
        return {{"error", error.what()}, {"kind", name_of(error.kind())}};
    }
}

int open_all(edgedistill::Options options) {
    options.cache.enabled = false;
    options.threads = 1;
    for (std::string line; std::getline(std::cin, line);) {
        print(opened_and_asked(line, options));
        std::cout.flush();
    }
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    const auto start = std::chrono::steady_clock::now();
    const std::vector<std::string> texts(arguments + 1, arguments + count);
    const auto given = [&](std::size_t number) { return texts.size() > number && texts[number] != "-"; };
    edgedistill::Options options;
    if (given(1)) options.precision = texts[1];
    if (given(2)) options.decode = texts[2] == "full" ? edgedistill::Decode::full : edgedistill::Decode::reduced;
    if (texts.at(0) == "-") return open_all(options);
    try {
        Classifier classifier = open(texts[0], options);
        print(described(classifier));
        answer_all(classifier, start);
    } catch (const Error& error) {
        print({{"error", error.what()}, {"kind", name_of(error.kind())}});
        return 1;
    }
    return 0;
}
