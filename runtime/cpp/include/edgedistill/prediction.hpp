// Answers.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include <edgedistill/export.hpp>

namespace edgedistill {

struct Score {
    int index = -1;
    std::string label;
    float probability = 0.0F;
};

// One question that a network with several heads answers. Its outputs are [first, first + width) of `probabilities`.
enum class HeadKind { softmax = 0, sigmoid = 1, regression = 2 };

struct Head {
    std::string name;
    HeadKind kind = HeadKind::softmax;
    std::vector<std::string> classes;  // empty for regression
    double mean = 0.0;                 // regression: of the training images' values, and their standard deviation
    double std = 1.0;
    double threshold = 0.5;          // sigmoid: the smallest of `thresholds`
    std::vector<double> thresholds;  // sigmoid: of each label, the probability from which it applies
    std::size_t first = 0;

    std::size_t width() const noexcept { return classes.empty() ? 1 : classes.size(); }
};

// What one head of several says of an image.
//
// Softmax: `label`, its `index` among the head's classes, `probability`. Sigmoid: `accepted`, the labels that apply,
// ascending; `label` "a|b" or "none", `index` and `probability` of the likeliest. Regression: `value`, `index` -1.
struct HeadPrediction {
    std::string name;
    HeadKind kind = HeadKind::softmax;
    std::string label;
    int index = -1;
    float probability = 0.0F;
    float value = 0.0F;
    std::vector<int> accepted;
};

// The answer for one image.
//
// Single-label: `index` and `label` are the likeliest class, `probabilities` [C] sum to 1. Below the deployable's
// `reject_below`, `index` is -1 and `label` "unknown". Multi-label: `probabilities` [C] are independent, `accepted`
// holds the classes at or above their thresholds in ascending order, `index` the likeliest class.
// Several heads: `heads` has the answer of each, `label` theirs with commas between, `index` is the first head's place
// among all outputs, `probability` the smallest over the heads of classes; `probabilities` lie side by side, a
// regression head's value among them.
struct EDGEDISTILL_API Prediction {
    std::string label;
    int index = -1;
    float probability = 0.0F;  // the confidence: the largest of `probabilities`
    std::vector<float> probabilities;
    std::vector<int> accepted;          // multi-label only
    std::string name;                   // the path, or the name that came with the image
    int stage = 0;                      // which network of a cascade answered
    std::string error;                  // why the image could not be read; empty when it was
    std::vector<HeadPrediction> heads;  // of a network with several heads

    bool ok() const noexcept { return error.empty(); }
    // The k likeliest classes, likeliest first, ties by index. `labels`: of the classifier. Fewer where there are
    // fewer.
    std::vector<Score> top_k(int k, const std::vector<std::string>& labels) const;
};

}  // namespace edgedistill
