// The C++ engine as a Python module: what edgedistill.runtime.CppEngine is made of.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <edgedistill/edgedistill.hpp>

#include "bundle.hpp"
#include "desk.hpp"
#include "engine_core.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace edgedistill::python {

namespace {

using detail::Bundle;
using detail::EngineCore;
using detail::Submission;
using Memory = std::pair<nb::bytes, nb::bytes>;
using Placed = std::optional<std::pair<std::uint64_t, std::optional<std::uint64_t>>>;

// ---- memory of Python's ----

struct Lent {
    Py_buffer view{};
    Lent* next = nullptr;
};

// What the engine reads no more. A worker must not wait for Python's lock, so it leaves the memory here for the next
// call that has the lock.
class Returned {
public:
    void push(Lent* lent) noexcept {
        lent->next = top_.load(std::memory_order_relaxed);
        while (!top_.compare_exchange_weak(lent->next, lent, std::memory_order_release, std::memory_order_relaxed)) {
        }
    }

    // With Python's lock.
    void release() noexcept {
        for (Lent* lent = top_.exchange(nullptr, std::memory_order_acquire); lent != nullptr;) {
            const std::unique_ptr<Lent> owned(lent);
            lent = lent->next;
            PyBuffer_Release(&owned->view);
        }
    }

private:
    std::atomic<Lent*> top_{nullptr};
};

// Throws BufferError for what has no such memory.
std::shared_ptr<Lent> borrow(nb::handle object, int flags, const std::shared_ptr<Returned>& returned) {
    auto lent = std::make_unique<Lent>();
    if (PyObject_GetBuffer(object.ptr(), &lent->view, flags) != 0) {
        PyErr_Clear();
        throw nb::buffer_error("no memory that can be borrowed; give a contiguous copy");
    }
    return {lent.release(), [returned](Lent* done) { returned->push(done); }};
}

// Throws BufferError for what is not uint8 pixels [h, w], [h, w, 1], [h, w, 3] BGR or [h, w, 4] BGRA in rows without
// gaps between pixels.
ImageView view_of(const Py_buffer& buffer) {
    constexpr Py_ssize_t most = std::numeric_limits<int>::max();
    const bool grey = buffer.ndim == 2;
    const Py_ssize_t channels = grey ? 1 : buffer.ndim == 3 ? buffer.shape[2] : 0;
    const bool bytes = buffer.itemsize == 1 && buffer.format != nullptr && std::string_view(buffer.format) == "B";
    const bool pixels = bytes && (channels == 1 || channels == 3 || channels == 4) && buffer.shape[0] > 0 &&
                        buffer.shape[1] > 0 && buffer.shape[0] <= most && buffer.shape[1] <= most / 4;
    const bool rows = pixels && buffer.strides[buffer.ndim - 1] == 1 && buffer.strides[1] == channels &&
                      buffer.strides[0] >= buffer.shape[1] * channels;
    if (!rows) throw nb::buffer_error("not uint8 pixels whose rows can be borrowed");
    ImageView view;
    view.data = static_cast<const std::uint8_t*>(buffer.buf);
    view.height = static_cast<int>(buffer.shape[0]);
    view.width = static_cast<int>(buffer.shape[1]);
    view.row_bytes = static_cast<std::size_t>(buffer.strides[0]);
    view.format = channels == 1 ? PixelFormat::gray : channels == 3 ? PixelFormat::bgr : PixelFormat::bgra;
    return view;
}

// ---- values ----

Bytes bytes_of(const nb::bytes& bytes) {
    return {static_cast<const std::uint8_t*>(bytes.data()), bytes.size()};
}

std::string text_of(const nb::bytes& bytes) {
    return {bytes.c_str(), bytes.size()};
}

// Messages name files, whose names may be no UTF-8: Python's own way to keep such bytes.
nb::object message_of(const std::string& text) {
    return nb::steal(PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape"));
}

const char* name_of(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::usage:
            return "usage";
        case ErrorKind::image:
            return "image";
        case ErrorKind::artifact:
            return "artifact";
        case ErrorKind::model:
            return "model";
        case ErrorKind::closed:
            return "closed";
    }
    return "model";
}

const char* name_of(HeadKind kind) {
    switch (kind) {
        case HeadKind::softmax:
            return "softmax";
        case HeadKind::sigmoid:
            return "sigmoid";
        case HeadKind::regression:
            return "regression";
    }
    return "softmax";
}

template <class Values>
nb::tuple tuple_of(const Values& values) {
    nb::list list;
    for (const auto& value : values) list.append(value);
    return nb::tuple(list);
}

nb::dict describe(const InputSpec& spec) {
    nb::dict values;
    values["height"] = spec.height;
    values["width"] = spec.width;
    values["resize"] = spec.center_crop ? "center-crop" : "squash";
    values["crop_fraction"] = spec.crop_fraction;
    values["color_order"] = "RGB";
    values["mean"] = tuple_of(spec.mean);
    values["std"] = tuple_of(spec.std);
    return values;
}

nb::dict describe(const Head& head) {
    nb::dict values;
    values["name"] = head.name;
    values["kind"] = name_of(head.kind);
    values["classes"] = tuple_of(head.classes);
    values["mean"] = head.mean;
    values["std"] = head.std;
    // One number where all labels have the same, as Python's Head has it.
    const std::vector<double>& thresholds = head.thresholds;
    const auto is_other = [&](double threshold) { return threshold != head.threshold; };
    if (std::any_of(thresholds.begin(), thresholds.end(), is_other)) {
        values["threshold"] = tuple_of(thresholds);
    } else {
        values["threshold"] = head.threshold;
    }
    return values;
}

// ---- the engine ----

std::shared_ptr<const Bundle> load(const std::string& path, const std::optional<std::pair<Bytes, Bytes>>& memory) {
    return memory ? Bundle::from_memory(memory->first, memory->second) : Bundle::load(path);
}

class PyEngine {
public:
    PyEngine(const nb::bytes& path, const std::optional<Memory>& memory, std::string precision,
             std::optional<int> threads, std::optional<int> streams, std::optional<int> batch,
             std::optional<int> queue_size, bool drop_oldest, std::optional<bool> reduced, bool use_cache,
             const nb::bytes& cache_folder) {
        EngineOptions options;
        options.precision = std::move(precision);
        options.threads = threads;
        options.streams = streams;
        options.batch = batch;
        options.queue_size = queue_size;
        options.policy = drop_oldest ? Policy::drop_oldest : Policy::block;
        if (reduced) options.decode = *reduced ? Decode::reduced : Decode::full;
        options.cache.enabled = use_cache;
        options.cache.folder = text_of(cache_folder);
        // Only the constructor has something to say; Python says it once it has its lock again.
        options.log = [this](LogLevel, std::string_view message) { warnings_.emplace_back(message); };
        std::optional<std::pair<Bytes, Bytes>> bytes;
        if (memory) bytes.emplace(bytes_of(memory->first), bytes_of(memory->second));
        const std::string model = text_of(path);
        const nb::gil_scoped_release released;
        core_ = std::make_unique<EngineCore>(load(model, bytes), options, Engine::Callback());
        desk_ = std::make_unique<Desk>(core_->pool());
    }

    ~PyEngine() { close(); }

    Placed submit_file(const nb::bytes& path, int timeout_ms) {
        Submission image;
        image.data = std::filesystem::path(text_of(path));
        return submit(image, timeout_ms);
    }

    Placed submit_bytes(nb::handle encoded, const nb::bytes& name, int timeout_ms) {
        auto lent = borrow(encoded, PyBUF_SIMPLE, returned_);
        Submission image;
        image.data = Bytes{static_cast<const std::uint8_t*>(lent->view.buf), static_cast<std::size_t>(lent->view.len)};
        image.keep_alive = std::move(lent);
        image.name = text_of(name);
        return submit(image, timeout_ms);
    }

    Placed submit_pixels(nb::handle pixels, int timeout_ms) {
        auto lent = borrow(pixels, PyBUF_RECORDS_RO, returned_);
        Submission image;
        image.data = view_of(lent->view);
        image.keep_alive = std::move(lent);
        return submit(image, timeout_ms);
    }

    std::optional<Prediction> take(std::uint64_t number, int timeout_ms) {
        return outside([&] { return desk_->take(number, deadline(timeout_ms)); });
    }

    void forget(const std::vector<std::uint64_t>& numbers) {
        outside([&] {
            for (const std::uint64_t number : numbers) desk_->forget(number);
        });
    }

    void close() {
        outside([&] { desk_->close(); });
    }

    void wait_until_ready() {
        outside([&] { desk_->wait_until_ready(); });
    }

    std::uint64_t dropped() const noexcept { return desk_->dropped(); }
    nb::tuple labels() const { return tuple_of(core_->bundle()->labels()); }
    nb::dict spec() const { return describe(core_->bundle()->config().stages[0].input_spec); }
    nb::list heads() const {
        nb::list heads;
        for (const Head& head : core_->bundle()->heads()) heads.append(describe(head));
        return heads;
    }
    bool multi_label() const noexcept { return core_->bundle()->multi_label(); }
    const std::string& precision() const noexcept { return core_->precision(); }
    int streams() const noexcept { return core_->streams(); }
    int batch() const noexcept { return core_->batch(); }
    int later_batch() const noexcept { return core_->later_batch(); }
    int queue_size() const noexcept { return core_->queue_size(); }
    nb::list warnings() const {
        nb::list messages;
        for (const std::string& message : warnings_) messages.append(message_of(message));
        return messages;
    }

private:
    static Deadline deadline(int timeout_ms) {
        return std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    }

    // Without Python's lock; afterwards, with it, what came back meanwhile is let go.
    template <class Call>
    std::invoke_result_t<Call> outside(const Call& call) {
        const Release release{*returned_};
        const nb::gil_scoped_release released;
        return call();
    }

    struct Release {
        Returned& returned;
        ~Release() { returned.release(); }
    };

    Placed submit(Submission& image, int timeout_ms) {
        const auto submitted = outside([&] {
            const auto found = desk_->submit(image, deadline(timeout_ms));
            image = Submission();  // what a dropped image held
            return found;
        });
        if (!submitted) return std::nullopt;
        return std::make_pair(submitted->number, submitted->dropped);
    }

    const std::shared_ptr<Returned> returned_ = std::make_shared<Returned>();
    std::vector<std::string> warnings_;
    std::unique_ptr<EngineCore> core_;
    std::unique_ptr<Desk> desk_;
};

// ---- the module ----

void raise_as(const std::exception_ptr& thrown, void* type) {
    try {
        std::rethrow_exception(thrown);
    } catch (const Error& error) {
        PyErr_SetObject(static_cast<PyObject*>(type),
                        nb::make_tuple(name_of(error.kind()), message_of(error.what())).ptr());
    }
}

using Floats = nb::ndarray<nb::numpy, float, nb::ndim<1>>;

// The memory belongs to `answer`, which the array keeps.
Floats probabilities_of(nb::handle_t<Prediction> answer) {
    auto& values = nb::cast<Prediction&>(answer).probabilities;
    return Floats(values.data(), {values.size()}, answer);
}

void define_answers(nb::module_& module) {
    nb::class_<HeadPrediction>(module, "HeadAnswer")
        .def_ro("name", &HeadPrediction::name)
        .def_prop_ro("kind", [](const HeadPrediction& head) { return name_of(head.kind); })
        .def_ro("label", &HeadPrediction::label)
        .def_ro("index", &HeadPrediction::index)
        .def_ro("probability", &HeadPrediction::probability)
        .def_ro("value", &HeadPrediction::value)
        .def_prop_ro("accepted", [](const HeadPrediction& head) { return tuple_of(head.accepted); });
    nb::class_<Prediction>(module, "Answer")
        .def_ro("label", &Prediction::label)
        .def_ro("index", &Prediction::index)
        .def_ro("probability", &Prediction::probability)
        .def_prop_ro("probabilities", &probabilities_of)
        .def_ro("stage", &Prediction::stage)
        .def_prop_ro("error", [](const Prediction& answer) { return message_of(answer.error); })
        .def_prop_ro("accepted", [](const Prediction& answer) { return tuple_of(answer.accepted); })
        .def_ro("heads", &Prediction::heads);
}

void define_engine(nb::module_& module) {
    nb::class_<PyEngine>(module, "Engine")
        .def(nb::init<const nb::bytes&, const std::optional<Memory>&, std::string, std::optional<int>,
                      std::optional<int>, std::optional<int>, std::optional<int>, bool, std::optional<bool>, bool,
                      const nb::bytes&>(),
             "path"_a, "memory"_a, nb::kw_only(), "precision"_a, "threads"_a, "streams"_a, "batch"_a, "queue_size"_a,
             "drop_oldest"_a, "reduced"_a, "use_cache"_a, "cache_folder"_a)
        .def("submit_file", &PyEngine::submit_file, "path"_a, "timeout_ms"_a)
        .def("submit_bytes", &PyEngine::submit_bytes, "encoded"_a, "name"_a, "timeout_ms"_a)
        .def("submit_pixels", &PyEngine::submit_pixels, "pixels"_a, "timeout_ms"_a)
        .def("take", &PyEngine::take, "number"_a, "timeout_ms"_a)
        .def("forget", &PyEngine::forget, "numbers"_a)
        .def("close", &PyEngine::close)
        .def("wait_until_ready", &PyEngine::wait_until_ready)
        .def_prop_ro("dropped", &PyEngine::dropped)
        .def_prop_ro("labels", &PyEngine::labels)
        .def_prop_ro("spec", &PyEngine::spec)
        .def_prop_ro("heads", &PyEngine::heads)
        .def_prop_ro("multi_label", &PyEngine::multi_label)
        .def_prop_ro("precision", &PyEngine::precision)
        .def_prop_ro("streams", &PyEngine::streams)
        .def_prop_ro("batch", &PyEngine::batch)
        .def_prop_ro("later_batch", &PyEngine::later_batch)
        .def_prop_ro("queue_size", &PyEngine::queue_size)
        .def_prop_ro("warnings", &PyEngine::warnings);
}

}  // namespace

void define(nb::module_& module) {
    module.doc() = "The engine of edgedistill's C++ runtime; use it through edgedistill.runtime.CppEngine.";
    module.attr("__version__") = version();
    // Whoever leaves Python with an engine open closes it on the way; nothing that is left behind matters.
    nb::set_leak_warnings(false);
    nb::object type = nb::steal(PyErr_NewException("edgedistill_cpp.Error", nullptr, nullptr));
    module.attr("Error") = type;
    nb::register_exception_translator(raise_as, type.release().ptr());
    define_answers(module);
    define_engine(module);
}

}  // namespace edgedistill::python

NB_MODULE(edgedistill_cpp, module) {
    edgedistill::python::define(module);
}
