// The library as a candidate: Classifier for latency and Engine for throughput, as a user would make them.
#pragma once

#include <cstdint>
#include <edgedistill/edgedistill.hpp>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"
#include "frame.hpp"
#include "network.hpp"
#include "photos.hpp"
#include "processor.hpp"
#include "serve.hpp"

namespace edgedistill::programs {

// Engine's networks and workers without its queue: what benchmark_app measures. Beside the inference there is copying
// the pixels, 150 KB at 224 x 224, and the softmax.
class Lane {
public:
    Lane(const std::shared_ptr<const detail::Bundle>& bundle, const detail::CompileSettings& settings,
         const Photo& photo)
        : network_(bundle, settings),
          worker_(network_),
          frame_{"", photo.view()},
          frames_(static_cast<std::size_t>(worker_.batch()), &frame_),
          answers_(frames_.size()) {}
    Lane(const Lane&) = delete;
    Lane& operator=(const Lane&) = delete;

    void infer() { worker_.answer(frames_.data(), frames_.size(), answers_.data()); }

private:
    detail::Network network_;
    detail::Worker worker_;
    detail::Frame frame_;
    std::vector<const detail::Frame*> frames_;
    std::vector<Prediction> answers_;
};

// Scope `model` gives the network pixels of its own size, so that nothing is decoded or resized.
class Ours {
public:
    Ours(std::string model, EngineOptions options)
        : model_(std::move(model)), options_(std::move(options)), bundle_(detail::Bundle::load(model_)) {}

    Case prepare(const std::string& scope, const std::string& mode, const Photos& encoded) {
        const bool latency = mode == "latency";
        const InputSpec spec = latency ? classifier().spec() : engine().spec();
        const Photos sources = sources_for(scope, encoded, spec);
        if (scope == "model" && !latency) {
            return lanes_case(sources);
        }
        return latency ? latency_case(sources, scope == "files") : throughput_case(sources, scope == "files");
    }

private:
    Classifier& classifier() {
        if (!classifier_) {
            classifier_ = std::make_unique<Classifier>(model_, options_);
        }
        return *classifier_;
    }

    Engine& engine() {
        if (!engine_) {
            engine_ = std::make_unique<Engine>(model_, options_);
            engine_->wait_until_ready();
        }
        return *engine_;
    }

    Case latency_case(const Photos& sources, bool files) {
        auto answer = std::make_shared<Prediction>();
        const auto classify = [files, answer, &one = classifier()](const Photo& photo) {
            files ? one.classify(photo.bytes(), *answer) : one.classify(photo.view(), *answer);
        };
        Case made;
        classify(sources->front());
        made.answer = answer->probabilities;
        made.step = [classify, sources, next = std::size_t{0}]() mutable {
            classify((*sources)[next++ % sources->size()]);
        };
        made.precision = classifier().precision();
        made.settings = settings(1, classifier().threads(), 1);
        add_stage_precisions(made);
        return made;
    }

    // Feeds the engine until the time is up and waits for its last answer. Throws what a failed image says.
    Case throughput_case(const Photos& sources, bool files) {
        Case made;
        made.run = [this, sources, files](double seconds) {
            const Clock::time_point deadline = deadline_in(seconds);
            const auto ahead = static_cast<std::int64_t>(engine_->queue_size());
            std::int64_t submitted = 0;
            std::int64_t answered = 0;
            do {
                if (submitted - answered == ahead) {
                    take();
                    ++answered;
                }
                submit((*sources)[static_cast<std::size_t>(submitted) % sources->size()], files);
                ++submitted;
            } while (Clock::now() < deadline);
            for (; answered < submitted; ++answered) {
                take();
            }
            return submitted;
        };
        made.precision = engine().precision();
        made.settings = settings(engine().streams(), engine().threads(), engine().batch());
        made.settings["queue_size"] = engine().queue_size();
        add_stage_precisions(made);
        return made;
    }

    // A thread for each of the networks that the engine would have.
    Case lanes_case(const Photos& sources) {
        const int streams = engine().streams();
        detail::CompileSettings compile;
        compile.precisions = {engine().precision()};  // a single network
        compile.batch = engine().batch();
        compile.threads = engine().threads() / streams;
        const auto tuned = detail::settings_here(*bundle_, [](LogLevel, std::string_view) {});  // the engine warned
        compile.pinning = tuned.throughput.pinning.value_or(false);
        compile.cache = options_.cache;
        std::vector<std::function<void()>> steps;
        for (int number = 0; number < streams; ++number) {
            auto lane = std::make_shared<Lane>(bundle_, compile, sources->front());
            steps.push_back([lane, sources] { lane->infer(); });
        }
        Case made;
        made.run = [rounds = side_by_side(steps), batch = compile.batch](double seconds) {
            return rounds(seconds) * batch;
        };
        made.precision = engine().precision();
        made.settings = settings(streams, engine().threads(), compile.batch);
        return made;
    }

    void submit(const Photo& photo, bool files) {
        files ? engine_->submit(photo.bytes(), nullptr) : engine_->submit(photo.view(), nullptr);
    }

    void take() {
        if (!engine_->next(answer_)) {
            throw std::runtime_error("the engine ended early");
        }
        if (!answer_.ok()) {
            throw std::runtime_error(answer_.error);
        }
    }

    const char* decode() const {
        const Decode said = options_.decode.value_or(bundle_->config().decode);
        return said == Decode::full ? "full" : "reduced";
    }

    Json settings(int streams, int threads, int batch) const {
        return {
            {"threads", threads}, {"streams", streams}, {"requests", streams}, {"batch", batch}, {"decode", decode()}};
    }

    // Of a cascade: what each of its networks runs at.
    void add_stage_precisions(Case& made) const {
        const std::size_t stages = bundle_->config().stages.size();
        if (stages < 2) {
            return;
        }
        Json precisions = Json::array();
        std::istringstream names(made.precision);
        for (std::string name; std::getline(names, name, '+');) {
            precisions.push_back(name);
        }
        while (precisions.size() < stages) {
            precisions.push_back(precisions.front());
        }
        made.settings["stage_precisions"] = precisions;
    }

    std::string model_;
    EngineOptions options_;
    std::shared_ptr<const detail::Bundle> bundle_;
    std::unique_ptr<Classifier> classifier_;
    std::unique_ptr<Engine> engine_;
    Prediction answer_;
};

}  // namespace edgedistill::programs
