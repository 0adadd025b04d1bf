// What an IR says about itself.
#pragma once

#include <string>
#include <vector>

#include <edgedistill/options.hpp>
#include <edgedistill/prediction.hpp>

namespace ov {
class Model;
}

namespace edgedistill::detail {

struct ModelMetadata {
    std::vector<std::string> labels;
    InputSpec input_spec;
    double temperature = 1.0;
    bool multi_label = false;          // every class for itself (sigmoid) instead of one of them (softmax)
    std::vector<double> thresholds;    // multi-label: of each class, the probability from which it is accepted
    bool bgr = false;                  // it wants BGR planes
    bool nhwc = false;                 // the layout of its input
    bool gives_probabilities = false;  // it ends in a softmax, or a sigmoid where it is multi-label
    std::vector<Head> heads;           // of a network with several, whose outputs `labels` names
    bool own = true;                   // written by edgedistill; otherwise only Model API's section was there
};

// Throws Error: model for a network that is no image classifier, artifact for metadata that do not hold.
ModelMetadata read_metadata(const ov::Model& model, const std::string& name);

}  // namespace edgedistill::detail
