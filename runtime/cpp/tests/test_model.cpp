// What is read from deploy.json and IR files holds together, or one error says why. The hostile files that Python
// refuses are refused here as well: tests/cpp/test_answers_are_pythons.py.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <edgedistill/error.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <openvino/core/model.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/convolution.hpp>
#include <openvino/op/fake_quantize.hpp>
#include <openvino/op/parameter.hpp>
#include <openvino/runtime/core.hpp>
#include <random>
#include <string>
#include <thread>

#include "bundle.hpp"
#include "deploy.hpp"
#include "error.hpp"
#include "file.hpp"
#include "ir.hpp"
#include "network.hpp"
#include "normalisation.hpp"
#include "processor.hpp"
#include "text.hpp"

namespace {

namespace fs = std::filesystem;
using namespace edgedistill;
using namespace edgedistill::detail;
using nlohmann::json;

fs::path models() {
    const char* folder = std::getenv("EDGEDISTILL_TEST_MODELS");
    REQUIRE_MESSAGE(folder != nullptr, "set EDGEDISTILL_TEST_MODELS to what tests/cpp/make_models.py made");
    return folder;
}

// A copy of a test model that may be damaged; gone at the end.
class Copy {
public:
    explicit Copy(const char* name) {
        std::string pattern = (fs::temp_directory_path() / "edgedistill-XXXXXX").string();
        REQUIRE(::mkdtemp(pattern.data()) != nullptr);
        root = pattern;
        fs::copy(models() / name, root, fs::copy_options::recursive);
    }
    ~Copy() {
        std::error_code ignored;
        fs::remove_all(root, ignored);
    }
    Copy(const Copy&) = delete;
    Copy& operator=(const Copy&) = delete;

    fs::path root;
};

void write(const fs::path& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
}

std::string read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// What the call throws, as "kind: message"; "" when it throws nothing.
std::string refusal(const std::function<void()>& call) {
    try {
        call();
    } catch (const Error& error) {
        const char* kinds[] = {"usage", "image", "artifact", "model", "closed"};
        return std::string(kinds[static_cast<int>(error.kind())]) + ": " + error.what();
    }
    return "";
}

bool has(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

// A deploy.json that holds, to be changed.
json deploy_values() {
    const json spec = {{"height", 48},           {"width", 64},          {"resize", "center-crop"},
                       {"crop_fraction", 0.875}, {"color_order", "RGB"}, {"mean", {1.0, 2.0, 3.0}},
                       {"std", {4.0, 5.0, 6.0}}};
    const json fast = {{"model", "a/model.xml"}, {"sha256", std::string(64, '0')},
                       {"input_spec", spec},     {"temperature", 1.25},
                       {"exit_threshold", 0.9},  {"int8_sha256", std::string(64, 'f')}};
    const json slow = {{"model", "b.xml"}, {"sha256", std::string(64, '1')}, {"input_spec", spec}};
    return {{"format", "edgedistill-deploy"},
            {"version", 1},
            {"stages", {fast, slow}},
            {"latency", {{"precision", "int8"}, {"threads", 2}, {"later_precision", "f32"}}},
            {"throughput",
             {{"precision", "bf16"},
              {"streams", 4},
              {"batch", 2},
              {"pinning", false},
              {"later_batch", 8},
              {"later_precision", "int8"}}},
            {"decode", "full"},
            {"reject_below", 0.3},
            {"score", {{"w", 0.5}, {"metric", "macro-f1"}, {"scope", "frames"}, {"fps_target", 200}}},
            {"cpu", "a processor"},
            {"cores", 4},
            {"versions", {{"openvino", "2026.4.1"}}}};
}

DeployConfig parsed(const json& values) {
    return parse_deploy(values.dump(), "deploy.json");
}

CompileSettings plain_settings() {
    CompileSettings settings;
    settings.precisions = {"f32"};
    settings.latency = true;
    settings.cache.enabled = false;
    return settings;
}

}  // namespace

TEST_CASE("every field of deploy.json arrives") {
    const DeployConfig config = parsed(deploy_values());
    REQUIRE(config.stages.size() == 2);
    CHECK(config.stages[0].model == "a/model.xml");
    CHECK(config.stages[0].temperature == 1.25);
    CHECK(config.stages[0].exit_threshold == 0.9);
    CHECK(config.stages[0].int8_sha256 == std::string(64, 'f'));
    CHECK(config.stages[0].input_spec.center_crop);
    CHECK(config.stages[0].input_spec.crop_fraction == 0.875);
    CHECK(config.stages[0].input_spec.mean == std::array<double, 3>{1, 2, 3});
    CHECK(same_spec(config.stages[0].input_spec, config.stages[1].input_spec));
    CHECK(config.stages[1].temperature == 1.0);
    CHECK_FALSE(config.stages[1].int8_sha256);
    CHECK(config.latency.precision == "int8");
    CHECK(config.latency.threads == 2);
    CHECK(config.throughput.precision == "bf16");
    CHECK(config.throughput.streams == 4);
    CHECK_FALSE(config.throughput.threads);
    CHECK(config.throughput.batch == 2);
    CHECK(config.throughput.later_batch == 8);
    CHECK(config.latency.later_precision == "f32");
    CHECK(config.throughput.later_precision == "int8");
    json older = deploy_values();
    older["throughput"].erase("later_batch");
    older["throughput"].erase("later_precision");
    older["latency"]["later_precision"] = nullptr;
    CHECK_FALSE(parsed(older).throughput.later_batch);
    CHECK_FALSE(parsed(older).throughput.later_precision);
    CHECK_FALSE(parsed(older).latency.later_precision);
    CHECK(config.throughput.pinning == false);
    CHECK(config.decode == Decode::full);
    CHECK(config.reject_below == 0.3);
    CHECK(config.cpu == "a processor");
    CHECK(config.cores == 4);
    CHECK(config.openvino_version == "2026.4.1");
}

TEST_CASE("a deploy.json with one wrong field is refused and the field is named") {
    const std::pair<const char*, json> changes[] = {
        {"/stages/0/model", "../outside.xml"},
        {"/stages/0/model", "/etc/model.xml"},
        {"/stages/0/model", "a\\model.xml"},
        {"/stages/0/sha256", std::string(63, '0')},
        {"/stages/0/temperature", 0},
        {"/stages/0/temperature", "hot"},
        {"/stages/0/exit_threshold", 1.5},
        {"/stages/0/exit_threshold", nullptr},
        {"/stages/0/surprise", 1},
        {"/stages/0/input_spec/height", 7},
        {"/stages/0/input_spec/width", 1e300},
        {"/stages/0/input_spec/std", {0, 1, 1}},
        {"/stages/0/input_spec/mean", {1, 2}},
        {"/stages/0/input_spec/extra", 1},
        {"/latency/precision", "fp32"},
        {"/latency/threads", 0},
        {"/latency/threads", 1e9},
        {"/throughput/batch", true},
        {"/throughput/batch", 4097},
        {"/throughput/pinning", "yes"},
        {"/throughput/later_batch", 0},
        {"/throughput/later_precision", "fp32"},
        {"/throughput/later_precision", ""},
        {"/latency/later_precision", {"f32"}},
        {"/latency/later_precision", 8},
        {"/decode", "sideways"},
        {"/reject_below", -1},
        {"/score/metric", "speed"},
        {"/score/fps_target", 0},
        {"/cores", 0},
        {"/cores", "many"},
        {"/version", 2},
        {"/format", "other"},
        {"/extra", 1},
    };
    for (const auto& [where, value] : changes) {
        json values = deploy_values();
        values[json::json_pointer(where)] = value;
        const std::string said = refusal([&] { parsed(values); });
        const std::string field = std::string(where).substr(std::string(where).rfind('/') + 1);
        INFO(where, " ", value.dump(), ": ", said);
        CHECK(has(said, "artifact: deploy.json"));
        const bool about_size = field == "height" || field == "width";
        CHECK(has(said, about_size ? "expected 8 to 4096 pixels" : field));
    }
}

TEST_CASE("the stages after the first run at a precision of their own where one is named") {
    using Names = std::vector<std::string>;
    CHECK(stage_precisions("int8", std::nullopt, 3) == Names{"int8", "int8", "int8"});
    CHECK(stage_precisions("int8", "f32", 3) == Names{"int8", "f32", "f32"});
    CHECK(stage_precisions("int8", "f32", 1) == Names{"int8"});
    CHECK(precision_name({"int8", "f32"}) == "int8+f32");
    CHECK(precision_name({"int8", "int8"}) == "int8");
    for (const char* what : {"latency", "throughput"}) {
        json single = deploy_values();
        single["stages"].erase(1);
        single["latency"]["later_precision"] = nullptr;
        single["throughput"].erase("later_precision");
        CHECK(parsed(single).stages.size() == 1);
        single[what]["later_precision"] = "int8";
        CHECK(has(refusal([&] { parsed(single); }), what + std::string(" later_precision 'int8' is of the stages")));
    }
}

TEST_CASE("text is counted, split and shown as Python does it") {
    CHECK(utf8_length("a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x99\x82") == 4);
    for (const char* damaged : {"\xC3", "\xC0\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\x80", "\xE2\x82", "\xFF"}) {
        CHECK_FALSE(utf8_length(damaged));
        CHECK_FALSE(is_printable(damaged));
    }
    CHECK(is_printable("solar cell \xE6\x97\xA5"));
    for (const char* hidden : {"\x1B[2J", "\x7F", "a\n", "\xC2\xA0", "\xE2\x80\xAE", "\xEF\xBB\xBF", "\xEE\x80\x80"}) {
        CHECK_FALSE(is_printable(hidden));
    }
    CHECK(split_words(" a\tb\xC2\xA0 c\n") == std::vector<std::string>{"a", "b", "c"});
    CHECK(split_words("  ").empty());
    CHECK(in_quotes("a\x1B[2Jb\xFF", 6) == "'a?[2Jb'");
    CHECK(parse_number(" +1.5e2 ") == 150.0);
    for (const char* other : {"", "a", "1 2", "1,5", "0x10", "1_0", "+-1"}) CHECK_FALSE(parse_number(other));
    CHECK(last_line(std::runtime_error("Check failed at a.cpp:1\n  why \n\n")) == "why");
}

TEST_CASE("elements that lie too deep in each other are seen in any disguise") {
    const auto nested = [](int depth, const std::string& inside) {
        std::string text;
        for (int level = 0; level < depth; ++level) text += "<a>" + inside;
        for (int level = 0; level < depth; ++level) text += "</a>";
        return text;
    };
    CHECK(fault_of(nested(200, "<b c='>'/><!-- </d> <e> --><?xml <f> ?>")).empty());
    CHECK(fault_of(nested(200, "<![CDATA[ <g> ]]><b c=\"<h>\"></b>")).empty());
    for (const char* closing : {"<b c='</a></a>'/>", "<!-- </a></a> -->", "<![CDATA[</a></a>]]>", "<? </a></a> ?>"}) {
        CHECK(fault_of(nested(400, closing)).find("too deep") != std::string::npos);
    }
    CHECK_FALSE(fault_of("<!DOCTYPE net [<!ENTITY a 'b'>]><net/>").empty());
    for (const char* cut : {"", "<", "<a", "<a b='", "<!-", "<!--", "<?", "</", "<![CDATA[", "text"}) fault_of(cut);
}

TEST_CASE("an IR in UTF-16 or UTF-32, in which no element would be seen, is refused") {
    for (const std::size_t width : {2U, 4U}) {
        for (const bool big_endian : {false, true}) {
            std::string wide;
            for (const char letter : std::string("<net/>")) {
                std::string unit(width, '\0');
                (big_endian ? unit.back() : unit.front()) = letter;
                wide += unit;
            }
            CHECK(fault_of(wide) == "it is not UTF-8");
        }
    }
    CHECK(fault_of("<net/>").empty());
}

TEST_CASE("operations that would end OpenVINO are seen before it gets them") {
    const auto net = [](const std::string& layer, const std::string& edges, const std::string& more = "") {
        return "<net><layers><layer id='0' type='Parameter'/>" + layer + "</layers><edges>" + edges + "</edges>" +
               more + "</net>";
    };
    const std::string edge = "<edge from-layer='0' to-layer='1'/>";
    const std::string relu = "<layer id='1' type='ReLU'/>";
    CHECK(fault_of(net(relu, edge)).empty());
    CHECK(fault_of(net(relu, edge, "<rt_info><layers/><edges/><layer/></rt_info>")).empty());
    CHECK(fault_of(net("<layer type = \"Const\" id=\"1\"></layer>", "")).empty());
    const std::string back = "<back_edges><edge from-layer='7' to-layer='8'/></back_edges>";
    const std::string body = "<layer id='1' type='Loop'>" + back + "<body>" + net(relu, edge) + "</body></layer>";
    CHECK(fault_of(net(body, edge)).empty());
    const std::string broadcast = "<layer id='1' type='Broadcast'/>";
    CHECK(fault_of(net(broadcast, edge + edge)).empty());
    CHECK_FALSE(fault_of(net(broadcast, edge)).empty());
    CHECK_FALSE(fault_of(net("<layer id='1' type='ReadValue'/>", edge)).empty());
    CHECK_FALSE(fault_of(net("<layer id='1' type='&#82;eadValue'/>", edge)).empty());
    CHECK_FALSE(fault_of(net("<layer name='type=\"Const\"' id='1' type='ReLU'/>", "")).empty());
    CHECK_FALSE(fault_of(net(relu + relu, edge)).empty());
    CHECK_FALSE(fault_of(net(relu, "")).empty());
    CHECK_FALSE(fault_of(net(relu, edge, "<edges/>")).empty());
    CHECK_FALSE(fault_of(net(relu, edge, "<layers></layers>")).empty());
    // Where OpenVINO does not look for them.
    const std::string own = "<layers><layer id='1' type='ReLU'/></layers>";
    CHECK(fault_of("<net>" + own + "<edges>" + edge + "</edges></net>").empty());
    CHECK_FALSE(fault_of("<net>" + own + "<edges><x>" + edge + "</x></edges></net>").empty());
    CHECK_FALSE(fault_of("<net>" + own + "<x><edges>" + edge + "</edges></x></net>").empty());
    CHECK_FALSE(fault_of("<net><x>" + own + "</x><y><edges>" + edge + "</edges></y></net>").empty());
    CHECK_FALSE(fault_of("<net><layers><layer id='1' type='ReLU'/>" + edge + "</layers><edges/></net>").empty());
    CHECK_FALSE(fault_of("<net><layers><x><layer id='1' type='Const'/></x></layers><edges/></net>").empty());
}

TEST_CASE("a folder, a run, a deploy.json, an IR and memory all load") {
    const Copy copy("single");
    const fs::path ir = copy.root / "stages" / "tiny" / "model.xml";
    fs::create_directory(copy.root / "run");
    fs::create_symlink(copy.root, copy.root / "run" / "openvino");
    for (const fs::path& path : {copy.root, copy.root / "run", copy.root / "deploy.json", ir, ir.parent_path()}) {
        const auto bundle = Bundle::load(path);
        CHECK(bundle->labels() == std::vector<std::string>{"red", "green", "very blue"});
        CHECK(bundle->config().stages[0].temperature == 1.5);
        CHECK(bundle->metadata()[0].own);
    }
    const std::string xml = read(ir);
    const std::string weights = read(fs::path(ir).replace_extension(".bin"));
    const auto bytes = [](const std::string& text) {
        return Bytes{reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
    };
    const auto bundle = Bundle::from_memory(bytes(xml), bytes(weights));
    CHECK(bundle->source() == "<memory>");
    CHECK(bundle->read_model(0, "f32")->inputs().size() == 1);
    CHECK(has(refusal([&] { bundle->read_model(0, "int8"); }), "model: <memory>: stage model.xml has no INT8 form"));
    CHECK(has(refusal([&] { Bundle::from_memory({}, {}); }), "not a readable OpenVINO IR"));
}

TEST_CASE("files that were given back are not read again") {
    const auto bundle = Bundle::load(models() / "single");
    const auto model = bundle->read_model(0, "f32");
    CHECK(bundle->read_model(0, "f32") != model);
    bundle->forget_models();
    CHECK(has(refusal([&] { bundle->read_model(0, "f32"); }), "given back"));
    CHECK(bundle->labels().size() == 3);
    // What was handed out lives on.
    CHECK(bundle->core().compile_model(model, "CPU").inputs().size() == 1);
}

TEST_CASE("the same bytes are hashed and loaded, and a flipped bit is noticed") {
    const Copy copy("single");
    for (const char* name : {"model.xml", "model.bin"}) {
        const fs::path path = copy.root / "stages" / "tiny" / name;
        std::string content = read(path);
        content[content.size() / 2] = static_cast<char>(content[content.size() / 2] ^ 1);
        const std::string whole = read(path);
        write(path, content);
        const std::string said = refusal([&] { Bundle::load(copy.root); });
        CHECK(has(said, "artifact: "));
        CHECK(has(said, "model.xml: sha256 "));
        CHECK(has(said, "export the model again"));
        write(path, whole);
    }
    CHECK(refusal([&] { Bundle::load(copy.root); }).empty());
}

TEST_CASE("a damaged IR is an error or a model, never the end of the process") {
    const Copy copy("single");
    const fs::path path = copy.root / "stages" / "tiny" / "model.xml";
    const std::string whole = read(path);
    std::mt19937 random(7);
    int refused = 0;
    for (int round = 0; round < 120; ++round) {
        std::string content = whole;
        const auto place = [&] { return std::uniform_int_distribution<std::size_t>(0, content.size() - 1)(random); };
        if (round % 3 == 0) content.resize(place());
        for (int flips = 0; flips < round % 4 && !content.empty(); ++flips) {
            content[place()] = static_cast<char>(std::uniform_int_distribution<int>(32, 126)(random));
        }
        write(path, content);
        refused += refusal([&] {
                       const Network network(Bundle::load(path), plain_settings());
                       const Worker worker(network);
                   }).empty()
                       ? 0
                       : 1;
    }
    CHECK(refused > 40);
    CHECK(refused < 120);
}

TEST_CASE("a network runs at another batch size only if it can") {
    CompileSettings settings = plain_settings();
    settings.batch = 3;
    const auto bundle = Bundle::load(models() / "single");
    const Network network(bundle, settings);
    Worker worker(network);
    CHECK(worker.batch() == 3);
    settings.batch = 0;
    CHECK(has(refusal([&] { const Network none(bundle, settings); }), "usage: batch 0"));
}

namespace {

// Planes of 12 x 20 pixels, quantised within limits of that shape, then a convolution.
std::shared_ptr<ov::Model> quantised_network(const ov::Shape& limits) {
    using namespace ov::op;
    const auto planes = std::make_shared<v0::Parameter>(ov::element::f32, ov::Shape{2, 3, 12, 20});
    const auto numbers = [&](float value) { return v0::Constant::create(ov::element::f32, limits, {value}); };
    const auto quantised =
        std::make_shared<v0::FakeQuantize>(planes, numbers(-2.3F), numbers(2.3F), numbers(-2.3F), numbers(2.3F), 256);
    const auto weights = v0::Constant::create(ov::element::f32, {4, 3, 3, 3}, std::vector<float>(108, 0.1F));
    const auto found = std::make_shared<v1::Convolution>(
        quantised, weights, ov::Strides{2, 2}, ov::CoordinateDiff{1, 1}, ov::CoordinateDiff{1, 1}, ov::Strides{1, 1});
    return std::make_shared<ov::Model>(ov::OutputVector{found}, ov::ParameterVector{planes});
}

}  // namespace

TEST_CASE("an input is quantised as it is normalised where all of it is quantised alike") {
    const auto quantised_shape = [](const ov::Shape& limits) {
        const auto model = quantised_network(limits);
        InputSpec spec;
        spec.height = 12;
        spec.width = 20;
        embed_normalisation(model, spec, false, false);
        ov::Shape found;
        for (const auto& node : model->get_ordered_ops()) {
            if (ov::is_type<ov::op::v0::FakeQuantize>(node)) found = node->get_output_shape(0);
        }
        return found;
    };
    const ov::Shape rows{2, 12, 60};
    CHECK(quantised_shape({1, 1, 1, 1}) == rows);
    CHECK(quantised_shape({}) == rows);
    CHECK(quantised_shape({1, 3, 1, 1}) == ov::Shape{2, 3, 12, 20});
}

TEST_CASE("OpenVINO is always told the precision") {
    const auto bundle = Bundle::load(models() / "single");
    const LogCallback quiet = [](LogLevel, std::string_view) {};
    const std::vector<std::string> unlike{"int8", "f32"};
    CHECK(resolve_precisions(*bundle, "", unlike, quiet) == unlike);
    CHECK(resolve_precisions(*bundle, "f32", unlike, quiet) == std::vector<std::string>{"f32", "f32"});
    CHECK(has(refusal([&] { resolve_precisions(*bundle, "fp16", {"f32"}, quiet); }), "usage: precision 'fp16'"));
    const auto abilities = bundle->core().get_property("CPU", ov::device::capabilities);
    const bool bf16 = std::find(abilities.begin(), abilities.end(), "BF16") != abilities.end();
    std::string warning;
    const LogCallback keep = [&](LogLevel level, std::string_view text) {
        warning = (level == LogLevel::warning ? "warning: " : "info: ") + std::string(text);
    };
    const std::vector<std::string> expected{"int8", bf16 ? "bf16" : "f32"};
    CHECK(resolve_precisions(*bundle, "", {"int8", "bf16"}, keep) == expected);
    CHECK(warning.empty() == bf16);
    if (!bf16) {
        CHECK(has(warning, "warning: " + bundle->source() + " is tuned for bf16"));
        CHECK(has(refusal([&] { resolve_precisions(*bundle, "bf16", {"f32"}, quiet); }), "model: precision 'bf16'"));
    }
}

TEST_CASE("settings of another processor give way to safe ones, with a warning") {
    const Copy copy("single");
    json values = json::parse(read(copy.root / "deploy.json"));
    values["latency"]["threads"] = 1;
    std::string warning;
    const LogCallback keep = [&](LogLevel, std::string_view text) { warning = text; };
    const auto threads = [&](const char* cpu, const char* version) {
        values["cpu"] = cpu;
        values["versions"] = {{"openvino", version}};
        write(copy.root / "deploy.json", values.dump());
        warning.clear();
        return settings_here(*Bundle::load(copy.root), keep).latency.threads;
    };
    CHECK(threads("", "") == 1);
    CHECK(warning.empty());
    CHECK_FALSE(threads("an abacus", ""));
    CHECK(has(warning, "measured on 'an abacus'"));
    CHECK(threads("", "2019.3.1") == 1);
    CHECK(has(warning, "measured with OpenVINO 2019.3, this is "));
}

TEST_CASE("settings of another number of cores leave none idle") {
    const Copy copy("single");
    json values = json::parse(read(copy.root / "deploy.json"));
    values["throughput"] = {{"streams", 1}, {"threads", 1}, {"batch", 4}};
    values["cpu"] = "";
    std::string warning;
    const LogCallback keep = [&](LogLevel, std::string_view text) { warning = text; };
    const auto settings = [&](int cores) {
        values["cores"] = cores;
        write(copy.root / "deploy.json", values.dump());
        warning.clear();
        return settings_here(*Bundle::load(copy.root), keep).throughput;
    };
    CHECK(settings(usable_cores()).streams == 1);
    CHECK(warning.empty());
    const ThroughputSettings elsewhere = settings(usable_cores() + 1);
    CHECK_FALSE(elsewhere.streams);
    CHECK_FALSE(elsewhere.threads);
    CHECK(elsewhere.batch == 4);
    CHECK(has(warning, "measured on " + std::to_string(usable_cores() + 1) + " cores"));
}

TEST_CASE("there is at least one core to use, and no more than the machine has") {
    CHECK(usable_cores() >= 1);
    CHECK(usable_cores() <= static_cast<int>(std::thread::hardware_concurrency()));
}

TEST_CASE("a file is read whole or named") {
    const Copy copy("single");
    CHECK(read_text_file(copy.root / "labels.txt", 1000) == "red\ngreen\nvery blue\n");
    CHECK(has(refusal([&] { read_text_file(copy.root / "labels.txt", 5); }), "labels.txt: cannot be read (20 bytes"));
    CHECK(has(refusal([&] { read_text_file(copy.root, 5); }), "not a file"));
    CHECK(has(refusal([&] { read_text_file(copy.root / "none", 5); }), "No such file"));
}
