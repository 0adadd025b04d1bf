// One image at a time, as fast as one can be answered.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <edgedistill/error.hpp>
#include <edgedistill/export.hpp>
#include <edgedistill/image.hpp>
#include <edgedistill/options.hpp>
#include <edgedistill/prediction.hpp>

namespace edgedistill {

// Answers for single images in OpenVINO's latency mode: every core works on the one image. For throughput use Engine.
//
// Threads: any number may call classify on one Classifier; they are answered one after the other. Construction,
// moving and destruction belong to one thread, when nobody is inside a call.
//
// Memory: the overloads with `out` reuse what `out` holds; after the first images of the largest size, frames, BMP,
// baseline JPEG and plain PNG (8 bits, grey, RGB or RGBA, not interlaced) allocate nothing any more outside OpenVINO's
// own infer call. Other files are decoded by libraries that allocate.
class EDGEDISTILL_API Classifier {
public:
    // `model`: an openvino/ folder, the run's folder above it, a deploy.json or a model.xml.
    // Throws Error (artifact, model, usage).
    explicit Classifier(const std::filesystem::path& model, const Options& options = {});
    // The bytes of model.xml and model.bin; they are copied. For INT8 give those of model-int8.xml and leave precision.
    static Classifier from_memory(Bytes xml, Bytes weights, const Options& options = {});
    ~Classifier();
    Classifier(Classifier&&) noexcept;
    Classifier& operator=(Classifier&&) noexcept;
    Classifier(const Classifier&) = delete;
    Classifier& operator=(const Classifier&) = delete;

    // Throws Error (image) when the picture cannot be read.
    Prediction classify(const ImageView& pixels);
    Prediction classify(Bytes encoded);  // JPEG, PNG, WebP or BMP
    Prediction classify_file(const std::filesystem::path& path);

    void classify(const ImageView& pixels, Prediction& out);
    void classify(Bytes encoded, Prediction& out);
    void classify_file(const std::filesystem::path& path, Prediction& out);

    const std::vector<std::string>& labels() const noexcept;
    const InputSpec& spec() const noexcept;  // of the first stage
    bool multi_label() const noexcept;
    // Multi-label: of each class, the probability from which it is accepted; else empty. Of the first stage.
    const std::vector<double>& thresholds() const noexcept;
    // Of a network with several heads, with the first stage's thresholds; else empty.
    const std::vector<Head>& heads() const noexcept;
    // Of any stage and output, the probability from which its label applies; nothing where there is no such label.
    std::optional<double> threshold(int stage, int output) const noexcept;
    double temperature() const noexcept;            // of the first stage
    const std::string& precision() const noexcept;  // "int8+f32" where the stages of a cascade differ
    int threads() const;                            // OpenVINO's inference threads

private:
    struct Impl;
    explicit Classifier(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

}  // namespace edgedistill
