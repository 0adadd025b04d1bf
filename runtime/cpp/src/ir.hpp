// An OpenVINO IR from memory.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace ov {
class Core;
class Model;
class Tensor;
}  // namespace ov

namespace edgedistill::detail {

// Throws Error (model) for what is damaged or no IR. The model keeps a reference to `weights`.
std::shared_ptr<ov::Model> read_ir(ov::Core& core, const std::string& xml, const ov::Tensor& weights,
                                   const std::string& name);

// Why OpenVINO must not get this text, which it would not survive; empty: nothing was found. The same is refused in
// runtime/ir_check.py, which says of each what OpenVINO does.
std::string fault_of(std::string_view xml);

}  // namespace edgedistill::detail
