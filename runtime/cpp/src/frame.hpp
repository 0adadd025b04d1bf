// One image on its way: what Classifier and Engine hand to a Worker.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <variant>
#include <vector>

#include <edgedistill/image.hpp>
#include <edgedistill/prediction.hpp>

namespace edgedistill::detail {

// The memory behind Bytes and ImageView belongs to whoever made the frame. `name` is for messages and answers.
struct Frame {
    std::string name;
    std::variant<std::filesystem::path, Bytes, ImageView> data;
};

// One image in a worker's hands, at one stage of a cascade.
struct Task {
    const Frame* frame = nullptr;
    Prediction* answer = nullptr;
    std::vector<std::uint8_t> pixels;  // what the stage that it was passed on to sees: uint8 [height, width, 3] BGR
    bool passed_on = false;            // to the next stage; else `answer` stands
};

}  // namespace edgedistill::detail
