#include <edgedistill/edgedistill.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <edgedistill/classifier.hpp>
#include <edgedistill/version.hpp>
#include <exception>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine_core.hpp"

using edgedistill::Bytes;
using edgedistill::Error;
using edgedistill::ErrorKind;
using edgedistill::Prediction;
using edgedistill::detail::Bundle;
using edgedistill::detail::EngineCore;
using edgedistill::detail::Submission;

struct edgedistill_classifier {
    edgedistill::Classifier classifier;
};

struct edgedistill_engine {
    EngineCore core;
};

namespace {

// The caller's room for a message.
struct Report {
    char* text;
    std::size_t size;

    void write(const char* message) const noexcept {
        if (text == nullptr || size == 0) return;
        std::size_t length = std::strlen(message);
        if (length >= size) {
            length = size - 1;
            // Not in the middle of a character of UTF-8.
            while (length > 0 && (static_cast<unsigned char>(message[length]) & 0xC0U) == 0x80U) --length;
        }
        std::memcpy(text, message, length);
        text[length] = '\0';
    }
};

edgedistill_status status_of(ErrorKind kind) noexcept {
    switch (kind) {
        case ErrorKind::usage:
            return EDGEDISTILL_USAGE;
        case ErrorKind::image:
            return EDGEDISTILL_IMAGE;
        case ErrorKind::artifact:
            return EDGEDISTILL_ARTIFACT;
        case ErrorKind::model:
            return EDGEDISTILL_MODEL;
        case ErrorKind::closed:
            return EDGEDISTILL_CLOSED;
    }
    return EDGEDISTILL_INTERNAL;
}

// The one way from C into C++: nothing that `call` throws gets out.
template <class Call>
edgedistill_status guarded(const Report& report, const Call& call) noexcept {
    report.write("");
    try {
        return call();
    } catch (const Error& error) {
        report.write(error.what());
        return status_of(error.kind());
    } catch (const std::bad_alloc&) {
        report.write("out of memory");
    } catch (const std::exception& error) {
        report.write(error.what());
    } catch (...) {
        report.write("unknown error");
    }
    return EDGEDISTILL_INTERNAL;
}

void need(const void* pointer, const char* name) {
    if (pointer == nullptr) throw Error(ErrorKind::usage, std::string(name) + " is NULL, expected a pointer");
}

void need_room(const float* probabilities, std::size_t count, std::size_t classes) {
    if (probabilities == nullptr || count >= classes) return;
    throw Error(ErrorKind::usage, "room for " + std::to_string(count) + " probabilities, expected " +
                                      std::to_string(classes) + " or more: one per class");
}

Bytes bytes_of(const std::uint8_t* data, std::size_t size, const char* name) {
    if (size > 0) need(data, name);
    return Bytes{data, size};
}

edgedistill::ImageView view_of(const edgedistill_image* image) {
    need(image, "image");
    need(image->data, "image data");
    // As bytes: a value that is none of the enumeration's must not be read as one.
    unsigned int format = 0;
    static_assert(sizeof format == sizeof image->format, "C enumerations are as wide as int");
    std::memcpy(&format, &image->format, sizeof format);
    if (format > EDGEDISTILL_I420) {
        throw Error(ErrorKind::usage, "image format " + std::to_string(format) + ", expected 0 to 6");
    }
    return {image->data, image->height, image->width, image->row_bytes, static_cast<edgedistill::PixelFormat>(format)};
}

// ---- options ----

edgedistill_options default_options() noexcept {
    edgedistill_options options{};
    options.struct_size = sizeof options;
    options.decode = -1;
    options.use_cache = 1;
    options.max_pixels = edgedistill::Options().max_pixels;
    return options;
}

// A caller built with older headers has a shorter struct: what it lacks keeps its default. One built with newer headers
// has a longer one: fine, as long as it does not ask for what this library does not know.
edgedistill_options read_options(const edgedistill_options* given) {
    edgedistill_options options = default_options();
    if (given == nullptr) return options;
    std::size_t size = 0;
    std::memcpy(&size, given, sizeof size);
    if (size < offsetof(edgedistill_options, threads) || size > 65536) {
        throw Error(ErrorKind::usage,
                    "options: struct_size " + std::to_string(size) + "; fill them with edgedistill_default_options");
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(given);
    const auto take = [&](auto& field) {
        const auto start = static_cast<std::size_t>(reinterpret_cast<const unsigned char*>(&field) -
                                                    reinterpret_cast<const unsigned char*>(&options));
        if (start + sizeof field <= size) std::memcpy(&field, bytes + start, sizeof field);
    };
    take(options.precision);
    take(options.threads);
    take(options.streams);
    take(options.batch);
    take(options.queue_size);
    take(options.drop_oldest);
    take(options.decode);
    take(options.use_cache);
    take(options.cache_folder);
    take(options.max_pixels);
    take(options.log);
    take(options.log_context);
    if (size > sizeof options && std::any_of(bytes + sizeof options, bytes + size, [](auto byte) { return byte; })) {
        throw Error(ErrorKind::usage, std::string("options: a field that version ") + edgedistill::version() +
                                          " of the library does not know; use a newer library");
    }
    return options;
}

std::optional<int> count_of(const char* name, std::int32_t value) {
    if (value < 0)
        throw Error(ErrorKind::usage, std::string(name) + ' ' + std::to_string(value) + ", expected 0 or more");
    return value == 0 ? std::nullopt : std::optional<int>(value);
}

std::optional<edgedistill::Decode> decode_of(std::int32_t value) {
    switch (value) {
        case -1:
            return std::nullopt;
        case 0:
            return edgedistill::Decode::full;
        case 1:
            return edgedistill::Decode::reduced;
        default:
            throw Error(ErrorKind::usage, "decode " + std::to_string(value) + ", expected -1, 0 or 1");
    }
}

edgedistill::EngineOptions options_of(const edgedistill_options* given) {
    const edgedistill_options values = read_options(given);
    edgedistill::EngineOptions options;
    if (values.precision != nullptr) options.precision = values.precision;
    options.threads = count_of("threads", values.threads);
    options.streams = count_of("streams", values.streams);
    options.batch = count_of("batch", values.batch);
    options.queue_size = count_of("queue_size", values.queue_size);
    options.policy = values.drop_oldest != 0 ? edgedistill::Policy::drop_oldest : edgedistill::Policy::block;
    options.decode = decode_of(values.decode);
    options.cache.enabled = values.use_cache != 0;
    if (values.cache_folder != nullptr) options.cache.folder = values.cache_folder;
    options.max_pixels = values.max_pixels;
    if (values.log != nullptr) {
        options.log = [log = values.log, context = values.log_context](edgedistill::LogLevel level,
                                                                       std::string_view message) {
            log(context, level == edgedistill::LogLevel::warning ? 1 : 0, std::string(message).c_str());
        };
    }
    return options;
}

// ---- answers ----

void write_answer(const Prediction& answer, const std::vector<std::string>& labels, edgedistill_prediction* out,
                  float* probabilities) {
    out->index = answer.index;
    out->probability = answer.probability;
    out->stage = answer.stage;
    if (answer.index >= 0 && static_cast<std::size_t>(answer.index) < labels.size()) {
        out->label = labels[static_cast<std::size_t>(answer.index)].c_str();
    } else {
        out->label = answer.ok() ? "unknown" : "";
    }
    if (probabilities != nullptr) {
        const std::size_t count = std::min(answer.probabilities.size(), labels.size());
        std::copy_n(answer.probabilities.begin(), count, probabilities);
    }
}

// Memory that is used again, per thread: several may be inside the same handle.
Prediction& scratch() {
    thread_local Prediction prediction;
    return prediction;
}

template <class Ask>
edgedistill_status classify(edgedistill_classifier* handle, edgedistill_prediction* out, float* probabilities,
                            std::size_t count, const Report& report, const Ask& ask) noexcept {
    return guarded(report, [&] {
        need(handle, "classifier");
        need(out, "out");
        need_room(probabilities, count, handle->classifier.labels().size());
        *out = {-1, "", 0.0F, 0};
        Prediction& answer = scratch();
        ask(handle->classifier, answer);
        write_answer(answer, handle->classifier.labels(), out, probabilities);
        return EDGEDISTILL_OK;
    });
}

template <class Handle, class Make>
edgedistill_status open(Handle** out, const Report& report, const Make& make) noexcept {
    if (out != nullptr) *out = nullptr;
    return guarded(report, [&] {
        need(out, "out");
        *out = make();
        return EDGEDISTILL_OK;
    });
}

const char* label_at(const std::vector<std::string>& labels, std::int32_t index) noexcept {
    if (index < 0 || static_cast<std::size_t>(index) >= labels.size()) return nullptr;
    return labels[static_cast<std::size_t>(index)].c_str();
}

edgedistill_status head_at(const std::vector<edgedistill::Head>& heads, std::int32_t index,
                           edgedistill_head* out) noexcept {
    if (out == nullptr || index < 0 || static_cast<std::size_t>(index) >= heads.size()) return EDGEDISTILL_USAGE;
    const edgedistill::Head& head = heads[static_cast<std::size_t>(index)];
    *out = {head.name.c_str(), static_cast<edgedistill_head_kind>(head.kind), static_cast<std::int32_t>(head.first),
            static_cast<std::int32_t>(head.width()), static_cast<float>(head.threshold)};
    return EDGEDISTILL_OK;
}

// ---- handing images over ----

std::size_t bytes_per_pixel(edgedistill::PixelFormat format) noexcept {
    switch (format) {
        case edgedistill::PixelFormat::bgr:
        case edgedistill::PixelFormat::rgb:
            return 3;
        case edgedistill::PixelFormat::bgra:
        case edgedistill::PixelFormat::rgba:
            return 4;
        default:
            return 1;
    }
}

// Copies rows without their gaps. `from` is moved on by `stride` for each.
void append_rows(std::vector<std::uint8_t>& memory, const std::uint8_t*& from, std::size_t rows, std::size_t used,
                 std::size_t stride) {
    if (used == stride) {
        memory.insert(memory.end(), from, from + rows * used);
        from += rows * stride;
        return;
    }
    for (std::size_t row = 0; row < rows; ++row, from += stride) memory.insert(memory.end(), from, from + used);
}

// What cannot be a picture is refused here, for nobody could say how much to copy. `used`: bytes of a row's pixels.
void check_geometry(const edgedistill::ImageView& view, std::size_t used, std::size_t stride) {
    const bool planes = view.format == edgedistill::PixelFormat::nv12 || view.format == edgedistill::PixelFormat::i420;
    const bool even = view.height % 2 == 0 && view.width % 2 == 0 &&
                      (view.format == edgedistill::PixelFormat::nv12 || stride % 2 == 0);
    constexpr std::size_t most = std::numeric_limits<std::ptrdiff_t>::max() / 2;
    if (view.height >= 1 && view.width >= 1 && stride >= used &&
        stride <= most / static_cast<std::size_t>(view.height) && (even || !planes)) {
        return;
    }
    throw Error(ErrorKind::image, "image of " + std::to_string(view.width) + 'x' + std::to_string(view.height) +
                                      " pixels, row_bytes " + std::to_string(view.row_bytes) +
                                      "; expected at least 1x1 pixels (even sizes for NV12 and I420) and rows as long "
                                      "as their pixels");
}

// The same picture in `memory`.
edgedistill::ImageView copied(const edgedistill::ImageView& view, std::vector<std::uint8_t>& memory) {
    const auto height = static_cast<std::size_t>(std::max(view.height, 0));
    const std::size_t used = static_cast<std::size_t>(std::max(view.width, 0)) * bytes_per_pixel(view.format);
    const std::size_t stride = view.row_bytes == 0 ? used : view.row_bytes;
    check_geometry(view, used, stride);
    memory.reserve(used * height + used * height / 2);
    const std::uint8_t* from = view.data;
    append_rows(memory, from, height, used, stride);
    if (view.format == edgedistill::PixelFormat::nv12) append_rows(memory, from, height / 2, used, stride);
    if (view.format == edgedistill::PixelFormat::i420) append_rows(memory, from, height, used / 2, stride / 2);
    return {memory.data(), view.height, view.width, 0, view.format};
}

template <class Fill>
edgedistill_status submit(edgedistill_engine* engine, std::uint64_t user, std::int32_t timeout_ms, const Report& report,
                          const Fill& fill) noexcept {
    return guarded(report, [&] {
        need(engine, "engine");
        Submission image;
        image.name = std::to_string(user);  // for messages
        fill(image);
        image.user = user;
        edgedistill::Engine::Timeout timeout;
        if (timeout_ms >= 0) timeout = std::chrono::milliseconds(timeout_ms);
        if (engine->core.pool()->submit(image, timeout)) return EDGEDISTILL_OK;
        report.write("the engine was still full after the timeout");
        return EDGEDISTILL_FULL;
    });
}

}  // namespace

extern "C" {

const char* edgedistill_version(void) {
    return edgedistill::version();
}

void edgedistill_default_options_sized(edgedistill_options* options, size_t struct_size) {
    if (options == nullptr) return;
    const edgedistill_options defaults = default_options();
    std::memset(static_cast<void*>(options), 0, struct_size);
    std::memcpy(static_cast<void*>(options), &defaults, std::min(struct_size, sizeof defaults));
    if (struct_size >= sizeof struct_size) options->struct_size = struct_size;
}

edgedistill_status edgedistill_classifier_open(const char* path, const edgedistill_options* options,
                                               edgedistill_classifier** out, char* error, size_t error_size) {
    return open(out, {error, error_size}, [&] {
        need(path, "path");
        return new edgedistill_classifier{edgedistill::Classifier(std::filesystem::path(path), options_of(options))};
    });
}

edgedistill_status edgedistill_classifier_open_memory(const uint8_t* xml, size_t xml_size, const uint8_t* weights,
                                                      size_t weights_size, const edgedistill_options* options,
                                                      edgedistill_classifier** out, char* error, size_t error_size) {
    return open(out, {error, error_size}, [&] {
        need(xml, "xml");
        return new edgedistill_classifier{edgedistill::Classifier::from_memory(
            bytes_of(xml, xml_size, "xml"), bytes_of(weights, weights_size, "weights"), options_of(options))};
    });
}

void edgedistill_classifier_free(edgedistill_classifier* classifier) {
    delete classifier;
}

int32_t edgedistill_classifier_class_count(const edgedistill_classifier* classifier) {
    return classifier == nullptr ? 0 : static_cast<int32_t>(classifier->classifier.labels().size());
}

const char* edgedistill_classifier_label(const edgedistill_classifier* classifier, int32_t index) {
    return classifier == nullptr ? nullptr : label_at(classifier->classifier.labels(), index);
}

int32_t edgedistill_classifier_head_count(const edgedistill_classifier* classifier) {
    return classifier == nullptr ? 0 : static_cast<int32_t>(classifier->classifier.heads().size());
}

edgedistill_status edgedistill_classifier_head(const edgedistill_classifier* classifier, int32_t index,
                                               edgedistill_head* out) {
    return classifier == nullptr ? EDGEDISTILL_USAGE : head_at(classifier->classifier.heads(), index, out);
}

float edgedistill_classifier_threshold(const edgedistill_classifier* classifier, int32_t index) {
    return edgedistill_classifier_stage_threshold(classifier, 0, index);
}

float edgedistill_classifier_stage_threshold(const edgedistill_classifier* classifier, int32_t stage, int32_t index) {
    if (classifier == nullptr) return -1.0F;
    return static_cast<float>(classifier->classifier.threshold(stage, index).value_or(-1.0));
}

edgedistill_status edgedistill_classify_pixels(edgedistill_classifier* classifier, const edgedistill_image* image,
                                               edgedistill_prediction* out, float* probabilities,
                                               size_t probability_count, char* error, size_t error_size) {
    return classify(classifier, out, probabilities, probability_count, {error, error_size},
                    [&](auto& with, Prediction& answer) { with.classify(view_of(image), answer); });
}

edgedistill_status edgedistill_classify_bytes(edgedistill_classifier* classifier, const uint8_t* encoded, size_t size,
                                              edgedistill_prediction* out, float* probabilities,
                                              size_t probability_count, char* error, size_t error_size) {
    return classify(classifier, out, probabilities, probability_count, {error, error_size},
                    [&](auto& with, Prediction& answer) {
                        need(encoded, "encoded");
                        with.classify(Bytes{encoded, size}, answer);
                    });
}

edgedistill_status edgedistill_classify_file(edgedistill_classifier* classifier, const char* path,
                                             edgedistill_prediction* out, float* probabilities,
                                             size_t probability_count, char* error, size_t error_size) {
    return classify(classifier, out, probabilities, probability_count, {error, error_size},
                    [&](auto& with, Prediction& answer) {
                        need(path, "path");
                        with.classify_file(std::filesystem::path(path), answer);
                    });
}

edgedistill_status edgedistill_engine_open(const char* path, const edgedistill_options* options,
                                           edgedistill_engine** out, char* error, size_t error_size) {
    return open(out, {error, error_size}, [&] {
        need(path, "path");
        const auto chosen = options_of(options);
        return new edgedistill_engine{EngineCore(Bundle::load(std::filesystem::path(path)), chosen, {})};
    });
}

void edgedistill_engine_free(edgedistill_engine* engine) {
    delete engine;
}

edgedistill_status edgedistill_engine_wait_until_ready(edgedistill_engine* engine, char* error, size_t error_size) {
    return guarded({error, error_size}, [&] {
        need(engine, "engine");
        const auto pool = engine->core.pool();
        pool->wait_until_ready();
        return EDGEDISTILL_OK;
    });
}

int32_t edgedistill_engine_class_count(const edgedistill_engine* engine) {
    return engine == nullptr ? 0 : static_cast<int32_t>(engine->core.bundle()->labels().size());
}

const char* edgedistill_engine_label(const edgedistill_engine* engine, int32_t index) {
    return engine == nullptr ? nullptr : label_at(engine->core.bundle()->labels(), index);
}

int32_t edgedistill_engine_head_count(const edgedistill_engine* engine) {
    return engine == nullptr ? 0 : static_cast<int32_t>(engine->core.bundle()->heads().size());
}

edgedistill_status edgedistill_engine_head(const edgedistill_engine* engine, int32_t index, edgedistill_head* out) {
    return engine == nullptr ? EDGEDISTILL_USAGE : head_at(engine->core.bundle()->heads(), index, out);
}

float edgedistill_engine_threshold(const edgedistill_engine* engine, int32_t index) {
    return edgedistill_engine_stage_threshold(engine, 0, index);
}

float edgedistill_engine_stage_threshold(const edgedistill_engine* engine, int32_t stage, int32_t index) {
    if (engine == nullptr) return -1.0F;
    return static_cast<float>(engine->core.bundle()->threshold(stage, index).value_or(-1.0));
}

edgedistill_status edgedistill_engine_submit_file(edgedistill_engine* engine, const char* path, uint64_t user,
                                                  int32_t timeout_ms, char* error, size_t error_size) {
    return submit(engine, user, timeout_ms, {error, error_size}, [&](Submission& image) {
        need(path, "path");
        image.data = std::filesystem::path(path);
    });
}

edgedistill_status edgedistill_engine_submit_bytes(edgedistill_engine* engine, const uint8_t* encoded, size_t size,
                                                   uint64_t user, int32_t timeout_ms, char* error, size_t error_size) {
    return submit(engine, user, timeout_ms, {error, error_size}, [&](Submission& image) {
        need(encoded, "encoded");
        image.owned.assign(encoded, encoded + size);
        image.data = Bytes{image.owned.data(), size};
    });
}

edgedistill_status edgedistill_engine_submit_pixels(edgedistill_engine* engine, const edgedistill_image* image,
                                                    uint64_t user, int32_t timeout_ms, char* error, size_t error_size) {
    return submit(engine, user, timeout_ms, {error, error_size},
                  [&](Submission& copy) { copy.data = copied(view_of(image), copy.owned); });
}

edgedistill_status edgedistill_engine_next(edgedistill_engine* engine, uint64_t* user, edgedistill_prediction* out,
                                           float* probabilities, size_t probability_count, char* error,
                                           size_t error_size) {
    const Report report{error, error_size};
    return guarded(report, [&] {
        need(engine, "engine");
        need(out, "out");
        // Held, for the engine may be freed by another thread while this one waits.
        const auto pool = engine->core.pool();
        const auto bundle = engine->core.bundle();
        need_room(probabilities, probability_count, bundle->labels().size());
        *out = {-1, "", 0.0F, 0};
        Prediction& answer = scratch();
        if (!pool->next(answer, user)) return EDGEDISTILL_END;
        write_answer(answer, bundle->labels(), out, probabilities);
        if (answer.ok()) return EDGEDISTILL_OK;
        report.write(answer.error.c_str());
        return EDGEDISTILL_IMAGE;
    });
}

void edgedistill_engine_finish(edgedistill_engine* engine) {
    guarded({nullptr, 0}, [&] {
        if (engine != nullptr) engine->core.pool()->finish();
        return EDGEDISTILL_OK;
    });
}

uint64_t edgedistill_engine_dropped(const edgedistill_engine* engine) {
    return engine == nullptr ? 0 : engine->core.pool()->dropped();
}

}  // extern "C"
