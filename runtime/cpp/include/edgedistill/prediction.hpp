// Answers.
#pragma once

#include <string>
#include <vector>

#include <edgedistill/export.hpp>

namespace edgedistill {

struct Score {
    int index = -1;
    std::string label;
    float probability = 0.0F;
};

// The answer for one image.
//
// Single-label: `index` and `label` are the likeliest class, `probabilities` [C] sum to 1. Below the deployable's
// `reject_below`, `index` is -1 and `label` "unknown". Multi-label: `probabilities` [C] are independent, `accepted`
// holds the classes at or above the model's confidence threshold in ascending order, `index` the likeliest class.
struct EDGEDISTILL_API Prediction {
    std::string label;
    int index = -1;
    float probability = 0.0F;  // the confidence: the largest of `probabilities`
    std::vector<float> probabilities;
    std::vector<int> accepted;  // multi-label only
    std::string name;           // the path, or the name that came with the image
    int stage = 0;              // which network of a cascade answered
    std::string error;          // why the image could not be read; empty when it was

    bool ok() const noexcept { return error.empty(); }
    // The k likeliest classes, likeliest first, ties by index. `labels`: of the classifier. Fewer where there are
    // fewer.
    std::vector<Score> top_k(int k, const std::vector<std::string>& labels) const;
};

}  // namespace edgedistill
