// The operators for ONNX Runtime, in the domain "rtx". All that is not said to be constant or an attribute is computed.
//
// PackRows(mask, rows_0[, rows_1][, rows_2]; first) -> offsets, positions, packed_0[, packed_1][, packed_2]
//   mask and rows [batch, tokens] int64; offsets [batch + 1] int64; positions and packed [1, kept] int64.
// Int8Linear(x, values, scale, column_sum[, bias][, split][, residual][, norm_weight][, norm_bias];
//            in_features, activation, gated, norm, norm_at, epsilon) -> y[, y_1][, y_2]
//   x [..., in_features] float32. Constant: values int8 [panels, depth / 4, 16, 4], not one of them -128; scale,
//   column_sum, bias [out] float32; split int64, columns of each output, or of the two halves if gated; norm_weight,
//   norm_bias float32. activation "", "gelu", "gelu_tanh" or "silu"; norm "", "layer" or "rms", at the "input" or the
//   "output". residual as y. y [..., its columns] float32: see rtx/kernels/int8_linear.py.
// Int8Embedding(values, scale, ids[, added][, norm_weight][, norm_bias]; norm, epsilon) -> y
//   values [rows, width] int8 and scale [rows, 1] float32 constant; ids [...] int64; added as y; y [..., width]
//   float32.
// RMSNorm(x, weight; epsilon) -> y
//   x, y [..., width] float32; weight [width] float32.
// RotaryEmbedding(x, cos, sin; heads) -> y
//   x, y [..., heads * width], cos and sin [..., width] float32.
// PackedAttention(query, key, value, offsets; heads, key_heads, scale, causal, window, bfloat16) -> y
//   query [..., heads * width], key and value [..., key_heads * width] float32; offsets [sequences + 1] int64;
//   y as query.
// PackedPool(x, offsets[, pooled]; mode) -> y
//   x [..., width] float32; offsets [sequences + 1] int64; pooled [...] int64; y [sequences, width] float32.
// MaxSim(query, documents, offsets) -> scores
//   query and documents [..., dim] float32; offsets [documents + 1] int64; scores [documents] float32.
#include <memory>

#include "embedding.h"
#include "int8_linear.h"
#include "maxsim.h"
#include "norm.h"
#include "ort_operator.h"
#include "packed_attention.h"
#include "packed_pool.h"
#include "rotary_embedding.h"

#if defined(_WIN32)
#define RTX_EXPORT extern "C" __declspec(dllexport)
#else
#define RTX_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace rtx {
namespace {

Activation activation_of(const std::string& name) {
  if (name.empty()) return Activation::kNone;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  throw std::invalid_argument("activation: expected gelu, gelu_tanh or silu, got " + name);
}

Pooling pooling_of(const std::string& name) {
  const char* const names[] = {"cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"};
  for (int at = 0; at < 6; ++at)
    if (name == names[at]) return Pooling(at);
  throw std::invalid_argument("mode: expected cls, max, mean, mean_sqrt_len_tokens, weightedmean or lasttoken, got " +
                              name);
}

int64_t int_attribute(const Checked& check, const ort::KernelInfo* info, const char* name) {
  int64_t found = 0;
  check(check.api.KernelInfoGetAttribute_int64(info, name, &found));
  return found;
}

float float_attribute(const Checked& check, const ort::KernelInfo* info, const char* name) {
  float found = 0.0f;
  check(check.api.KernelInfoGetAttribute_float(info, name, &found));
  return found;
}

// `count` numbers that are constant, or null where they may be absent and are.
const float* numbers_of(const Checked& check, const ort::KernelInfo* info, size_t index, const char* name,
                        int64_t count, bool optional = false) {
  if (optional && optional_constant(check, info, index) == nullptr) return nullptr;
  const ort::Value* value = constant(check, info, index);
  if (count_of(shape_of(check, value)) != count)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(count) + " numbers");
  return data_of<float>(check, value);
}

// By the attributes `norm` and `epsilon`, and two inputs from `first` on, which are constant.
Norm norm_of(const Checked& check, const ort::KernelInfo* info, size_t first, int64_t width) {
  const std::string kind = text_attribute(check, info, "norm");
  if (kind.empty()) return {};
  if (kind != "layer" && kind != "rms") throw std::invalid_argument("norm: expected layer or rms, got " + kind);
  return {kind == "layer" ? NormKind::kLayer : NormKind::kRms, float_attribute(check, info, "epsilon"),
          numbers_of(check, info, first, "norm_weight", width),
          numbers_of(check, info, first + 1, "norm_bias", width, true)};
}

void check_offsets(const int64_t* offsets, const std::vector<int64_t>& shape, int64_t tokens) {
  bool rising = shape.size() == 1 && shape[0] >= 1 && offsets[0] == 0 && offsets[shape[0] - 1] == tokens;
  for (int64_t at = 0; rising && at + 1 < shape[0]; ++at) rising = offsets[at] <= offsets[at + 1];
  if (!rising) throw std::invalid_argument("offsets: expected to rise from 0 to the number of tokens");
}

int64_t tokens_of(const std::vector<int64_t>& shape) {
  return count_of(std::vector<int64_t>(shape.begin(), shape.end() - 1));
}

class PackRows {
 public:
  PackRows(const void* const* table, const ort::KernelInfo* info) : check(table) {
    first_ = int_attribute(check, info, "first");
  }

  void compute(ort::KernelContext* context) {
    const std::vector<int64_t> shape = shape_of(check, input_of(check, context, 0));
    if (shape.size() != 2) throw std::invalid_argument("mask: expected [batch, tokens]");
    const int64_t* mask = data_of<int64_t>(check, input_of(check, context, 0));
    const int64_t* rows[3] = {nullptr, nullptr, nullptr};
    for (size_t index = 0; index < 3; ++index) {
      const ort::Value* value = input_of(check, context, 1 + index);
      if (value == nullptr) continue;
      if (shape_of(check, value) != shape) throw std::invalid_argument("rows: expected the shape of the mask");
      rows[index] = data_of<int64_t>(check, value);
    }
    int64_t* const offsets = output(context, 0, {shape[0] + 1});
    int64_t kept = offsets[0] = 0;
    for (int64_t row = 0; row < shape[0]; ++row) {
      for (int64_t at = 0; at < shape[1]; ++at) kept += mask[row * shape[1] + at] != 0;
      offsets[row + 1] = kept;
    }
    int64_t* positions = output(context, 1, {1, kept});
    for (int64_t row = 0; row < shape[0]; ++row)
      for (int64_t token = offsets[row]; token < offsets[row + 1]; ++token)
        *positions++ = first_ + token - offsets[row];
    for (size_t index = 0; index < 3; ++index) {
      if (rows[index] == nullptr) continue;
      int64_t* packed = output(context, 2 + index, {1, kept});
      for (int64_t at = 0; at < shape[0] * shape[1]; ++at)
        if (mask[at] != 0) *packed++ = rows[index][at];
    }
  }

  const Checked check;

  static constexpr const char* kName = "PackRows";
  static constexpr size_t kInputs = 4, kOutputs = 5;
  static int input_type(size_t) { return ort::kInt64; }
  static int output_type(size_t) { return ort::kInt64; }
  static int input_characteristic(size_t index) { return index >= 2 ? ort::kOptional : ort::kRequired; }

 private:
  int64_t* output(ort::KernelContext* context, size_t index, const std::vector<int64_t>& shape) const {
    ort::Value* value = nullptr;
    check(check.api.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
    return data_of<int64_t>(check, value);
  }

  int64_t first_;
};

class Int8Linear {
 public:
  Int8Linear(const void* const* table, const ort::KernelInfo* info) : check(table) {
    around_.activation = activation_of(text_attribute(check, info, "activation"));
    around_.gated = int_attribute(check, info, "gated") != 0;
    const std::string at = text_attribute(check, info, "norm_at");
    if (at != "input" && at != "output") throw std::invalid_argument("norm_at: expected input or output, got " + at);
    around_.norm_of_output = at == "output";
    const int64_t in = int_attribute(check, info, "in_features");
    if (in < 1 || in > kMostInputs)
      throw std::invalid_argument("in_features: expected 1 to " + std::to_string(kMostInputs));
    const ort::Value* values = constant(check, info, 1);
    const int64_t out = count_of(shape_of(check, constant(check, info, 2)));
    const std::vector<int64_t> parts = split_of(info, out);
    outputs_ = around_.gated ? 1 : parts.size();
    if (outputs_ > kOutputs || (around_.gated && (parts.size() != 2 || parts[0] != parts[1])))
      throw std::invalid_argument("split: expected at most 3 outputs, or two equal halves if gated");
    const int64_t size = packed_size(in, parts);
    if (count_of(shape_of(check, values)) != size)
      throw std::invalid_argument("values: expected " + std::to_string(size) + " of them for " + std::to_string(in) +
                                  " in_features and " + std::to_string(out) + " outputs");
    // A magnitude of 128 has no opposite in 8 bits.
    const int8_t* first = data_of<int8_t>(check, values);
    if (std::memchr(first, 0x80, size_t(size)) != nullptr)
      throw std::invalid_argument("values: expected integers from -127 to 127");
    around_.norm = norm_of(check, info, 7, around_.norm_of_output ? parts[0] : in);
    if (outputs_ > 1 && around_.norm_of_output && around_.norm.kind != NormKind::kNone)
      throw std::invalid_argument("norm: expected one output where it is that of the output");
    weight_ = std::make_unique<PackedWeight>(first, numbers_of(check, info, 2, "scale", out),
                                             numbers_of(check, info, 3, "column_sum", out),
                                             numbers_of(check, info, 4, "bias", out, true), in, parts);
  }

  void compute(ort::KernelContext* context) {
    const ort::Value *input = input_of(check, context, 0), *residual = input_of(check, context, 6);
    std::vector<int64_t> shape = shape_of(check, input);
    if (shape.empty() || shape.back() != weight_->in)
      throw std::invalid_argument("x: expected a last dimension of " + std::to_string(weight_->in));
    const int64_t tokens = tokens_of(shape);
    float* y[kOutputs] = {};
    for (size_t index = 0; index < outputs_; ++index) {
      shape.back() = weight_->parts[index];
      ort::Value* output = nullptr;
      check(check.api.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &output));
      y[index] = data_of<float>(check, output);
    }
    if (residual != nullptr && (outputs_ > 1 || count_of(shape_of(check, residual)) != count_of(shape)))
      throw std::invalid_argument("residual: expected as many numbers as the one output has");
    if (tokens == 0) return;
    int8_linear(data_of<float>(check, input), *weight_, around_,
                residual == nullptr ? nullptr : data_of<float>(check, residual), tokens, y, current_isa(),
                in_pool(check, context));
  }

  const Checked check;

  static constexpr const char* kName = "Int8Linear";
  static constexpr size_t kInputs = 9, kOutputs = 3;
  static int input_type(size_t index) { return index == 1 ? ort::kInt8 : index == 5 ? ort::kInt64 : ort::kFloat; }
  static int output_type(size_t) { return ort::kFloat; }
  static int input_characteristic(size_t index) { return index >= 4 ? ort::kOptional : ort::kRequired; }

 private:
  std::vector<int64_t> split_of(const ort::KernelInfo* info, int64_t columns) const {
    if (optional_constant(check, info, 5) == nullptr) return {columns};
    const ort::Value* value = constant(check, info, 5);
    const int64_t* sizes = data_of<int64_t>(check, value);
    const std::vector<int64_t> found(sizes, sizes + count_of(shape_of(check, value)));
    bool whole = !found.empty() && std::accumulate(found.begin(), found.end(), int64_t(0)) == columns;
    for (const int64_t size : found) whole = whole && size > 0;
    if (!whole) throw std::invalid_argument("split: expected parts that make up " + std::to_string(columns));
    return found;
  }

  Around around_;
  size_t outputs_ = 1;
  std::unique_ptr<PackedWeight> weight_;
};

class Int8Embedding {
 public:
  Int8Embedding(const void* const* table, const ort::KernelInfo* info) : check(table) {
    const ort::Value* values = constant(check, info, 0);
    const std::vector<int64_t> shape = shape_of(check, values);
    if (shape.size() != 2) throw std::invalid_argument("values: expected a matrix [rows, width]");
    values_ = data_of<int8_t>(check, values);
    rows_ = shape[0];
    width_ = shape[1];
    scale_ = numbers_of(check, info, 1, "scale", rows_);
    norm_ = norm_of(check, info, 4, width_);
  }

  void compute(ort::KernelContext* context) {
    const ort::Value *input = input_of(check, context, 2), *added = input_of(check, context, 3);
    std::vector<int64_t> shape = shape_of(check, input);
    const int64_t tokens = count_of(shape);
    const int64_t* ids = data_of<int64_t>(check, input);
    for (int64_t at = 0; at < tokens; ++at)
      if (ids[at] < 0 || ids[at] >= rows_)
        throw std::invalid_argument("ids: expected 0 to " + std::to_string(rows_ - 1) + ", got " +
                                    std::to_string(ids[at]));
    shape.push_back(width_);
    if (added != nullptr && count_of(shape_of(check, added)) != tokens * width_)
      throw std::invalid_argument("added: expected " + std::to_string(width_) + " numbers for each token");
    ort::Value* output = nullptr;
    check(check.api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &output));
    int8_embedding(values_, scale_, width_, ids, added == nullptr ? nullptr : data_of<float>(check, added), tokens,
                   norm_, data_of<float>(check, output), current_isa(), in_pool(check, context));
  }

  const Checked check;

  static constexpr const char* kName = "Int8Embedding";
  static constexpr size_t kInputs = 6, kOutputs = 1;
  static int input_type(size_t index) { return index == 0 ? ort::kInt8 : index == 2 ? ort::kInt64 : ort::kFloat; }
  static int output_type(size_t) { return ort::kFloat; }
  static int input_characteristic(size_t index) { return index >= 3 ? ort::kOptional : ort::kRequired; }

 private:
  const int8_t* values_;
  const float* scale_;
  int64_t rows_, width_;
  Norm norm_;
};

class RmsNorm {
 public:
  RmsNorm(const void* const* table, const ort::KernelInfo* info) : check(table) {
    epsilon_ = float_attribute(check, info, "epsilon");
  }

  void compute(ort::KernelContext* context) {
    const ort::Value *input = input_of(check, context, 0), *weight = input_of(check, context, 1);
    const std::vector<int64_t> shape = shape_of(check, input);
    if (shape.empty() || count_of(shape_of(check, weight)) != shape.back())
      throw std::invalid_argument("weight: expected as many numbers as a row of x has");
    ort::Value* output = nullptr;
    check(check.api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &output));
    const Norm norm{NormKind::kRms, epsilon_, data_of<float>(check, weight), nullptr};
    normalize(data_of<float>(check, input), tokens_of(shape), shape.back(), norm, data_of<float>(check, output),
              current_isa(), in_pool(check, context));
  }

  const Checked check;

  static constexpr const char* kName = "RMSNorm";
  static constexpr size_t kInputs = 2, kOutputs = 1;
  static int input_type(size_t) { return ort::kFloat; }
  static int output_type(size_t) { return ort::kFloat; }
  static int input_characteristic(size_t) { return ort::kRequired; }

 private:
  float epsilon_;
};

class RotaryEmbedding {
 public:
  RotaryEmbedding(const void* const* table, const ort::KernelInfo* info) : check(table) {
    heads_ = int_attribute(check, info, "heads");
    if (heads_ < 1) throw std::invalid_argument("heads: expected at least one");
  }

  void compute(ort::KernelContext* context) {
    const ort::Value *input = input_of(check, context, 0), *cos = input_of(check, context, 1);
    const ort::Value* sin = input_of(check, context, 2);
    const std::vector<int64_t> shape = shape_of(check, input), turns = shape_of(check, cos);
    if (shape.empty() || turns.empty() || turns != shape_of(check, sin) || turns.back() * heads_ != shape.back() ||
        turns.back() % 2 != 0 || tokens_of(turns) != tokens_of(shape))
      throw std::invalid_argument("expected x [..., heads * width], cos and sin [..., width], width even");
    ort::Value* output = nullptr;
    check(check.api.KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &output));
    rotary_embedding(data_of<float>(check, input), data_of<float>(check, cos), data_of<float>(check, sin),
                     tokens_of(shape), heads_, turns.back(), data_of<float>(check, output), current_isa(),
                     in_pool(check, context));
  }

  const Checked check;

  static constexpr const char* kName = "RotaryEmbedding";
  static constexpr size_t kInputs = 3, kOutputs = 1;
  static int input_type(size_t) { return ort::kFloat; }
  static int output_type(size_t) { return ort::kFloat; }
  static int input_characteristic(size_t) { return ort::kRequired; }

 private:
  int64_t heads_;
};

class PackedAttention {
 public:
  PackedAttention(const void* const* table, const ort::KernelInfo* info) : check(table) {
    shape_.heads = int_attribute(check, info, "heads");
    shape_.key_heads = int_attribute(check, info, "key_heads");
    shape_.scale = float_attribute(check, info, "scale");
    shape_.causal = int_attribute(check, info, "causal") != 0;
    shape_.window = int_attribute(check, info, "window");
    shape_.bfloat16 = int_attribute(check, info, "bfloat16") != 0;
    if (shape_.key_heads < 1 || shape_.heads < 1 || shape_.heads % shape_.key_heads != 0)
      throw std::invalid_argument("heads: expected a multiple of key_heads");
  }

  void compute(ort::KernelContext* context) {
    const ort::Value* inputs[4];
    std::vector<int64_t> shapes[4];
    for (size_t index = 0; index < 4; ++index) {
      inputs[index] = input_of(check, context, index);
      shapes[index] = shape_of(check, inputs[index]);
    }
    AttentionShape shape = shape_;
    const std::vector<int64_t>&query = shapes[0], &key = shapes[1];
    if (query.empty() || key.empty() || key != shapes[2] || query.back() % shape.heads != 0 ||
        key.back() * shape.heads != query.back() * shape.key_heads || tokens_of(query) != tokens_of(key))
      throw std::invalid_argument("expected query [..., heads * width], key and value [..., key_heads * width]");
    shape.width = query.back() / shape.heads;
    ort::Value* output = nullptr;
    check(check.api.KernelContext_GetOutput(context, 0, query.data(), query.size(), &output));
    const int64_t* offsets = data_of<int64_t>(check, inputs[3]);
    check_offsets(offsets, shapes[3], tokens_of(query));
    packed_attention(data_of<float>(check, inputs[0]), data_of<float>(check, inputs[1]),
                     data_of<float>(check, inputs[2]), offsets, shapes[3][0] - 1, shape, data_of<float>(check, output),
                     current_isa(), in_pool(check, context));
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

class PackedPool {
 public:
  PackedPool(const void* const* table, const ort::KernelInfo* info) : check(table) {
    pooling_ = pooling_of(text_attribute(check, info, "mode"));
  }

  void compute(ort::KernelContext* context) {
    const ort::Value *input = input_of(check, context, 0), *pooled = input_of(check, context, 2);
    const std::vector<int64_t> shape = shape_of(check, input), ends = shape_of(check, input_of(check, context, 1));
    if (shape.empty()) throw std::invalid_argument("x: expected [..., width]");
    const int64_t* offsets = data_of<int64_t>(check, input_of(check, context, 1));
    check_offsets(offsets, ends, tokens_of(shape));
    if (pooled != nullptr && count_of(shape_of(check, pooled)) != tokens_of(shape))
      throw std::invalid_argument("pooled: expected one number for each token");
    const std::vector<int64_t> rows{ends[0] - 1, shape.back()};
    ort::Value* output = nullptr;
    check(check.api.KernelContext_GetOutput(context, 0, rows.data(), rows.size(), &output));
    packed_pool(data_of<float>(check, input), shape.back(), offsets, rows[0],
                pooled == nullptr ? nullptr : data_of<int64_t>(check, pooled), pooling_, data_of<float>(check, output),
                in_pool(check, context));
  }

  const Checked check;

  static constexpr const char* kName = "PackedPool";
  static constexpr size_t kInputs = 3, kOutputs = 1;
  static int input_type(size_t index) { return index == 0 ? ort::kFloat : ort::kInt64; }
  static int output_type(size_t) { return ort::kFloat; }
  static int input_characteristic(size_t index) { return index == 2 ? ort::kOptional : ort::kRequired; }

 private:
  Pooling pooling_;
};

class MaxSim {
 public:
  MaxSim(const void* const* table, const ort::KernelInfo*) : check(table) {}

  void compute(ort::KernelContext* context) {
    const ort::Value *query = input_of(check, context, 0), *documents = input_of(check, context, 1);
    const ort::Value* ends = input_of(check, context, 2);
    const std::vector<int64_t> asked = shape_of(check, query), found = shape_of(check, documents);
    const std::vector<int64_t> count = shape_of(check, ends);
    if (asked.empty() || found.empty() || asked.back() != found.back())
      throw std::invalid_argument("expected query and documents [..., dim]");
    const int64_t* offsets = data_of<int64_t>(check, ends);
    check_offsets(offsets, count, tokens_of(found));
    const int64_t scores = count[0] - 1;
    ort::Value* output = nullptr;
    check(check.api.KernelContext_GetOutput(context, 0, &scores, 1, &output));
    maxsim(data_of<float>(check, query), tokens_of(asked), data_of<float>(check, documents), offsets, scores,
           found.back(), data_of<float>(check, output), current_isa(), in_pool(check, context));
  }

  const Checked check;

  static constexpr const char* kName = "MaxSim";
  static constexpr size_t kInputs = 3, kOutputs = 1;
  static int input_type(size_t index) { return index == 2 ? ort::kInt64 : ort::kFloat; }
  static int output_type(size_t) { return ort::kFloat; }
  static int input_characteristic(size_t) { return ort::kRequired; }
};

ort::Status* make_domain(const ort::Api& api, ort::Domain** domain) {
  if (ort::Status* failed = api.CreateCustomOpDomain("rtx", domain)) return failed;
  for (const ort::Op* one : {op<PackRows>(), op<Int8Embedding>(), op<Int8Linear>(), op<RmsNorm>(),
                             op<RotaryEmbedding>(), op<PackedAttention>(), op<PackedPool>(), op<MaxSim>()})
    if (ort::Status* failed = api.CustomOpDomain_Add(*domain, one)) return failed;
  return nullptr;
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
  static ort::Status* failed = make_domain(api, &domain);
  if (failed != nullptr) return api.CreateStatus(ort::kFail, "the operators of rtx could not be registered");
  return api.AddCustomOpDomain(options, domain);
}
