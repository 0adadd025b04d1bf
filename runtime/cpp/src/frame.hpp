// One image on its way: what Classifier and Engine hand to a Worker.
#pragma once

#include <filesystem>
#include <string>
#include <variant>

#include <edgedistill/image.hpp>

namespace edgedistill::detail {

// The memory behind Bytes and ImageView belongs to whoever made the frame. `name` is for messages and answers.
struct Frame {
    std::string name;
    std::variant<std::filesystem::path, Bytes, ImageView> data;
};

}  // namespace edgedistill::detail
