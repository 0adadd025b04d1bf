// A deployable model: deploy.json, the IR files that it names, and what each IR says about itself.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <edgedistill/image.hpp>
#include <edgedistill/options.hpp>

#include "deploy.hpp"
#include "metadata.hpp"

namespace ov {
class Core;
class Model;
}  // namespace ov

namespace edgedistill::detail {

// A checked deployable. Every file is read once: what was hashed is what OpenVINO gets. Any thread may use it.
class Bundle {
public:
    // An openvino/ folder (or the run's folder above it), a deploy.json, or a single model.xml.
    // Throws Error: artifact when files are missing, changed or hostile, model when the IR is no classifier.
    static std::shared_ptr<const Bundle> load(const std::filesystem::path& path);
    // A single IR that is in memory; the bytes are copied.
    static std::shared_ptr<const Bundle> from_memory(Bytes xml, Bytes weights, const std::string& name = "<memory>");
    ~Bundle();

    const std::string& source() const noexcept { return source_; }  // folder or file, for messages
    const DeployConfig& config() const noexcept { return config_; }
    const std::vector<ModelMetadata>& metadata() const noexcept { return metadata_; }  // one per stage
    const std::vector<std::string>& labels() const noexcept { return metadata_[0].labels; }
    bool multi_label() const noexcept { return metadata_[0].multi_label; }
    const std::vector<double>& thresholds() const noexcept { return metadata_[0].thresholds; }
    const std::vector<Head>& heads() const noexcept { return metadata_[0].heads; }
    // From which probability the label of that output applies; nothing where there is no such stage or label.
    std::optional<double> threshold(int stage, int output) const noexcept;

    // The IR for that precision, at the stage's resolution; the caller's own. Throws Error (model, usage).
    std::shared_ptr<ov::Model> read_model(std::size_t stage, const std::string& precision) const;
    // Gives the files' memory back: for when every network is compiled. read_model throws afterwards.
    void forget_models() const;

    ov::Core& core() const noexcept;

    struct Impl;

private:
    Bundle();
    void load_config(const std::filesystem::path& path);
    void load_single(const std::filesystem::path& path);
    void describe_single(const std::string& model);
    void load_stage(const std::filesystem::path& root, const Stage& stage);
    void check_stages_agree(const std::filesystem::path& path) const;

    std::string source_;
    DeployConfig config_;
    std::vector<ModelMetadata> metadata_;
    std::unique_ptr<Impl> impl_;
};

// `model` at that size. Throws Error (model) when the network cannot take it.
void reshape_model(ov::Model& model, const ModelMetadata& metadata, const InputSpec& spec, int batch,
                   const std::string& name);

}  // namespace edgedistill::detail
