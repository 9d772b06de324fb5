// What all operators share: how they ask ONNX Runtime for what they need, and how one is made of a class.
#pragma once

#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"
#include "ort.h"

namespace rtx {

// A call that failed, as an exception.
class Checked {
 public:
  explicit Checked(const void* const* table) : api(table) {}

  void operator()(ort::Status* status) const {
    if (status == nullptr) return;
    api.ReleaseStatus(status);
    throw std::runtime_error("ONNX Runtime refused what the operator asked for");
  }

  const ort::Api api;
};

inline std::vector<int64_t> shape_of(const Checked& check, const ort::Value* value) {
  ort::TensorInfo* info = nullptr;
  check(check.api.GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  ort::Status* status = check.api.GetDimensionsCount(info, &rank);
  std::vector<int64_t> shape(rank);
  if (status == nullptr) status = check.api.GetDimensions(info, shape.data(), rank);
  check.api.ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  return shape;
}

template <class T>
T* data_of(const Checked& check, const ort::Value* value) {
  void* data = nullptr;
  check(check.api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
  return static_cast<T*>(data);
}

inline const ort::Value* constant(const Checked& check, const ort::KernelInfo* info, size_t index) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(check.api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (!is_constant || value == nullptr)
    throw std::invalid_argument("input " + std::to_string(index) + ": expected a constant");
  return value;
}

inline std::string text_attribute(const Checked& check, const ort::KernelInfo* info, const char* name) {
  size_t size = 0;
  // A first call tells the size; without the attribute it fails.
  ort::Status* status = check.api.KernelInfoGetAttribute_string(info, name, nullptr, &size);
  if (status != nullptr) check.api.ReleaseStatus(status);
  if (size == 0) return "";
  std::string found(size, '\0');
  check(check.api.KernelInfoGetAttribute_string(info, name, found.data(), &size));
  found.resize(std::strlen(found.c_str()));
  return found;
}

// An input that may be absent: null then.
inline const ort::Value* input_of(const Checked& check, const ort::KernelContext* context, size_t index) {
  const ort::Value* value = nullptr;
  check(check.api.KernelContext_GetInput(context, index, &value));
  return value;
}

// As `constant`, or null where the input is absent.
inline const ort::Value* optional_constant(const Checked& check, const ort::KernelInfo* info, size_t index) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  ort::Status* status = check.api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value);
  if (status != nullptr) check.api.ReleaseStatus(status);
  return status == nullptr && is_constant ? value : nullptr;
}

inline int64_t count_of(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>());
}

// ONNX Runtime's own threads.
inline Parallel in_pool(const Checked& check, const ort::KernelContext* context) {
  return [&check, context](int64_t count, const std::function<void(int64_t)>& fn) {
    if (count <= 0) return;
    if (count == 1) return fn(0);
    const auto call = [](void* data, size_t index) {
      (*static_cast<const std::function<void(int64_t)>*>(data))(int64_t(index));
    };
    check(check.api.KernelContext_ParallelFor(context, call, size_t(count), 0,
                                              const_cast<std::function<void(int64_t)>*>(&fn)));
  };
}

// A kernel has: a constructor from the table of functions and the node; compute(context); `check`; kName, kInputs,
// kOutputs; input_type and output_type of a place, and input_characteristic. Its first output is always there.
template <class Kernel>
const ort::Op* op() {
  static const ort::Op made = [] {
    ort::Op op{};
    op.version = ort::kVersion;
    op.GetName = [](const ort::Op*) { return Kernel::kName; };
    op.GetExecutionProviderType = [](const ort::Op*) -> const char* { return nullptr; };
    op.GetInputTypeCount = [](const ort::Op*) { return Kernel::kInputs; };
    op.GetInputType = [](const ort::Op*, size_t index) { return Kernel::input_type(index); };
    op.GetInputCharacteristic = [](const ort::Op*, size_t index) { return Kernel::input_characteristic(index); };
    op.GetOutputTypeCount = [](const ort::Op*) { return Kernel::kOutputs; };
    op.GetOutputType = [](const ort::Op*, size_t index) { return Kernel::output_type(index); };
    op.GetOutputCharacteristic = [](const ort::Op*, size_t index) {
      return index == 0 ? int(ort::kRequired) : int(ort::kOptional);
    };
    op.GetInputMemoryType = [](const ort::Op*, size_t) { return 0; };
    op.GetVariadicInputMinArity = op.GetVariadicInputHomogeneity = [](const ort::Op*) { return 1; };
    op.GetVariadicOutputMinArity = op.GetVariadicOutputHomogeneity = [](const ort::Op*) { return 1; };
    op.GetStartVersion = [](const ort::Op*) { return 1; };
    op.GetEndVersion = [](const ort::Op*) { return 2147483647; };
    op.CreateKernelV2 = [](const ort::Op*, const void* const* table, const ort::KernelInfo* info,
                           void** kernel) -> ort::Status* {
      try {
        *kernel = new Kernel(table, info);
        return nullptr;
      } catch (const std::exception& wrong) {
        const std::string message = std::string(Kernel::kName) + ": " + wrong.what();
        return ort::Api(table).CreateStatus(ort::kInvalidArgument, message.c_str());
      }
    };
    op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) -> ort::Status* {
      Kernel* const made = static_cast<Kernel*>(kernel);
      try {
        made->compute(context);
        return nullptr;
      } catch (const std::exception& wrong) {
        const std::string message = std::string(Kernel::kName) + ": " + wrong.what();
        return made->check.api.CreateStatus(ort::kFail, message.c_str());
      }
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
  }();
  return &made;
}

}  // namespace rtx
