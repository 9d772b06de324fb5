// The operators for ONNX Runtime, in the domain "rtx", and plain functions by which tests reach the same kernels.
//
// Int8Linear(x, values, scale, column_sum[, bias]; activation) -> y
//   x [..., in] float32; values [in, out] uint8 with zero point 128; scale, column_sum, bias [out] float32, all but x
//   constant; activation "", "gelu", "gelu_tanh" or "silu"; y [..., out] float32.
// PackedAttention(query, key, value, offsets; scale, causal, window) -> y
//   query [tokens, heads, width], key and value [tokens, key_heads, width] float32; offsets [sequences + 1] int64;
//   y as query.
#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "int8_linear.h"
#include "ort.h"
#include "packed_attention.h"
#include "simd.h"

#if defined(_WIN32)
#define RTX_EXPORT extern "C" __declspec(dllexport)
#else
#define RTX_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace rtx {
namespace {

std::atomic<int> isa_in_use{-1};

Isa current_isa() {
  int found = isa_in_use.load(std::memory_order_relaxed);
  if (found < 0) isa_in_use = found = int(detect_isa());
  return Isa(found);
}

Activation activation_of(const std::string& name) {
  if (name.empty()) return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  throw std::invalid_argument("activation: expected gelu, gelu_tanh or silu, got " + name);
}

void serially(int64_t count, const std::function<void(int64_t)>& fn) {
  for (int64_t index = 0; index < count; ++index) fn(index);
}

// ---- what all operators share ----

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

std::vector<int64_t> shape_of(const Checked& check, const ort::Value* value) {
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

const ort::Value* constant(const Checked& check, const ort::KernelInfo* info, size_t index) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(check.api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (!is_constant || value == nullptr)
    throw std::invalid_argument("input " + std::to_string(index) + ": expected a constant");
  return value;
}

std::string text_attribute(const Checked& check, const ort::KernelInfo* info, const char* name) {
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

// ONNX Runtime's own threads.
Parallel in_pool(const Checked& check, const ort::KernelContext* context) {
  return [&check, context](int64_t count, const std::function<void(int64_t)>& fn) {
    if (count == 1) return fn(0);
    const auto call = [](void* data, size_t index) {
      (*static_cast<const std::function<void(int64_t)>*>(data))(int64_t(index));
    };
    check(check.api.KernelContext_ParallelFor(context, call, size_t(count), 0,
                                              const_cast<std::function<void(int64_t)>*>(&fn)));
  };
}

// ---- Int8Linear ----

class Int8Linear {
 public:
  Int8Linear(const void* const* table, const ort::KernelInfo* info) : check(table) {
    activation_ = activation_of(text_attribute(check, info, "activation"));
    const ort::Value* values = constant(check, info, 1);
    const std::vector<int64_t> shape = shape_of(check, values);
    if (shape.size() != 2) throw std::invalid_argument("values: expected a matrix [in, out]");
    if (shape[0] > kMostInputs)
      throw std::invalid_argument("values: expected at most " + std::to_string(kMostInputs) + " rows");
    // A magnitude of 128 has no opposite in 8 bits.
    const uint8_t* first = data_of<uint8_t>(check, values);
    if (std::memchr(first, 0, size_t(shape[0] * shape[1])) != nullptr)
      throw std::invalid_argument("values: expected bytes from 1 to 255, which are 127 to either side of 128");
    const float* numbers[3] = {nullptr, nullptr, nullptr};
    for (size_t index = 0; index < 3; ++index) {
      if (index == 2 && !has_bias(info)) break;
      const ort::Value* value = constant(check, info, 2 + index);
      if (shape_of(check, value) != std::vector<int64_t>{shape[1]})
        throw std::invalid_argument("scale, column_sum and bias: expected one number for each of " +
                                    std::to_string(shape[1]) + " columns");
      numbers[index] = data_of<float>(check, value);
    }
    weight_ = std::make_unique<PackedWeight>(data_of<uint8_t>(check, values), numbers[0], numbers[1], numbers[2],
                                             shape[0], shape[1]);
  }

  void compute(ort::KernelContext* context) {
    const ort::Value* input = nullptr;
    check(check.api.KernelContext_GetInput(context, 0, &input));
    std::vector<int64_t> shape = shape_of(check, input);
    if (shape.empty() || shape.back() != weight_->in)
      throw std::invalid_argument("x: expected a last dimension of " + std::to_string(weight_->in));
    int64_t tokens = 1;
    for (size_t axis = 0; axis + 1 < shape.size(); ++axis) tokens *= shape[axis];
    shape.back() = weight_->out;
    ort::Value* output = nullptr;
    check(check.api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &output));
    if (tokens == 0) return;
    int8_linear(data_of<float>(check, input), *weight_, activation_, tokens, data_of<float>(check, output),
                current_isa(), in_pool(check, context));
  }

  const Checked check;

  static constexpr const char* kName = "Int8Linear";
  static constexpr size_t kInputs = 5, kOutputs = 1;
  static int input_type(size_t index) { return index == 1 ? ort::kUint8 : ort::kFloat; }
  static int output_type(size_t) { return ort::kFloat; }
  static int input_characteristic(size_t index) { return index == 4 ? ort::kOptional : ort::kRequired; }

 private:
  bool has_bias(const ort::KernelInfo* info) const {
    int is_constant = 0;
    const ort::Value* value = nullptr;
    ort::Status* status = check.api.KernelInfoGetConstantInput_tensor(info, 4, &is_constant, &value);
    if (status != nullptr) check.api.ReleaseStatus(status);
    return status == nullptr && is_constant && value != nullptr;
  }

  Activation activation_;
  std::unique_ptr<PackedWeight> weight_;
};

// ---- PackedAttention ----

void check_offsets(const int64_t* offsets, int64_t sequences, int64_t tokens) {
  bool rising = sequences >= 0 && offsets[0] == 0 && offsets[sequences] == tokens;
  for (int64_t at = 0; at < sequences && rising; ++at) rising = offsets[at] <= offsets[at + 1];
  if (!rising) throw std::invalid_argument("offsets: expected to rise from 0 to the number of tokens");
}

class PackedAttention {
 public:
  PackedAttention(const void* const* table, const ort::KernelInfo* info) : check(table) {
    int64_t causal = 0;
    check(check.api.KernelInfoGetAttribute_float(info, "scale", &shape_.scale));
    check(check.api.KernelInfoGetAttribute_int64(info, "causal", &causal));
    check(check.api.KernelInfoGetAttribute_int64(info, "window", &shape_.window));
    shape_.causal = causal != 0;
  }

  void compute(ort::KernelContext* context) {
    const ort::Value* inputs[4];
    std::vector<int64_t> shapes[4];
    for (size_t index = 0; index < 4; ++index) {
      check(check.api.KernelContext_GetInput(context, index, &inputs[index]));
      shapes[index] = shape_of(check, inputs[index]);
    }
    const std::vector<int64_t>&query = shapes[0], &key = shapes[1];
    if (query.size() != 3 || key.size() != 3 || key != shapes[2] || key[0] != query[0] || key[2] != query[2] ||
        key[1] < 1 || query[1] % key[1] != 0 || shapes[3].size() != 1 || shapes[3][0] < 1)
      throw std::invalid_argument("expected query [tokens, heads, width], key and value [tokens, key_heads, width], "
                                  "heads a multiple of key_heads, and offsets [sequences + 1]");
    ort::Value* output = nullptr;
    check(check.api.KernelContext_GetOutput(context, 0, query.data(), query.size(), &output));
    const int64_t* offsets = data_of<int64_t>(check, inputs[3]);
    check_offsets(offsets, shapes[3][0] - 1, query[0]);
    AttentionShape shape = shape_;
    shape.heads = query[1];
    shape.key_heads = key[1];
    shape.width = query[2];
    packed_attention(data_of<float>(check, inputs[0]), data_of<float>(check, inputs[1]),
                     data_of<float>(check, inputs[2]), offsets, shapes[3][0] - 1, shape,
                     data_of<float>(check, output), current_isa(), in_pool(check, context));
  }

  const Checked check;

  static constexpr const char* kName = "PackedAttention";
  static constexpr size_t kInputs = 4, kOutputs = 1;
  static int input_type(size_t index) { return index == 3 ? ort::kInt64 : ort::kFloat; }
  static int output_type(size_t) { return ort::kFloat; }
  static int input_characteristic(size_t) { return ort::kRequired; }

 private:
  AttentionShape shape_{};
};

// ---- registration ----

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
    op.GetOutputCharacteristic = [](const ort::Op*, size_t) { return int(ort::kRequired); };
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

}  // namespace
}  // namespace rtx

using namespace rtx;

// What ONNX Runtime calls when the library is registered with the options of a session.
RTX_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const void* const* table = base->GetApi(ort::kVersion);
  // Who registers has looked at the version. Without a table not even an error can be made.
  if (table == nullptr) return nullptr;
  const ort::Api api(table);
  // One for the process: sessions refer to it for as long as they live.
  static ort::Domain* domain = nullptr;
  static ort::Status* failed = [&] {
    ort::Status* status = api.CreateCustomOpDomain("rtx", &domain);
    if (status == nullptr) status = api.CustomOpDomain_Add(domain, op<Int8Linear>());
    if (status == nullptr) status = api.CustomOpDomain_Add(domain, op<PackedAttention>());
    return status;
  }();
  if (failed != nullptr) return api.CreateStatus(ort::kFail, "the operators of rtx could not be registered");
  return api.AddCustomOpDomain(options, domain);
}

// The instruction set in use: 0 portable, 1 AVX2, 2 AVX-VNNI, 3 AVX-512 VNNI.
RTX_EXPORT int rtx_isa() { return int(current_isa()); }

// The best that this machine has.
RTX_EXPORT int rtx_best_isa() { return int(detect_isa()); }

// Use another one, for tests and benchmarks. 0 if this machine has it, else 1 and nothing changes.
RTX_EXPORT int rtx_use_isa(int isa) {
  const int best = int(detect_isa());
  // AVX-512 machines need not have the 256-bit form of VNNI.
  const bool known = isa == 0 || isa == best || (isa == int(Isa::kAvx2) && best > 0) ||
                     (isa == int(Isa::kAvxVnni) && has_avx_vnni());
  if (!known) return 1;
  isa_in_use = isa;
  return 0;
}

// The kernel by itself, in one thread. bias may be NULL; activation counts as in Activation.
RTX_EXPORT void rtx_int8_linear(const float* x, const uint8_t* values, const float* scale, const float* column_sum,
                                const float* bias, int activation, int64_t tokens, int64_t in, int64_t out, float* y) {
  const PackedWeight weight(values, scale, column_sum, bias, in, out);
  int8_linear(x, weight, Activation(activation), tokens, y, current_isa(), serially);
}

RTX_EXPORT void rtx_packed_attention(const float* query, const float* key, const float* value, const int64_t* offsets,
                                     int64_t sequences, int64_t heads, int64_t key_heads, int64_t width, float scale,
                                     int causal, int64_t window, float* y) {
  packed_attention(query, key, value, offsets, sequences,
                   AttentionShape{heads, key_heads, width, scale, causal != 0, window}, y, current_isa(), serially);
}

// Functions of vectors, for tests: 0 e^x, 1 erf, 2 gelu, 3 gelu_tanh, 4 silu; count a multiple of 4.
RTX_EXPORT void rtx_map(int function, const float* x, int64_t count, float* y) {
  for (int64_t at = 0; at < count; at += 4) {
    const Floats4 values = load<Floats4>(x + at);
    switch (function) {
      case 0: store(y + at, exponential(values)); break;
      case 1: store(y + at, error_function(values)); break;
      case 2: store(y + at, gelu(values)); break;
      case 3: store(y + at, gelu_tanh(values)); break;
      default: store(y + at, silu(values)); break;
    }
  }
}
