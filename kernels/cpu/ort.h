// The part of ONNX Runtime's C interface that an operator library needs, declared here: no package of ONNX Runtime for
// Python brings its header. The interface only ever grows at its end, so that numbers of places stay what they are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rtx::ort {

struct Session;
struct SessionOptions;
struct Status;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct Op;

// Version 1.21 of ONNX Runtime: the youngest that has all of it.
constexpr uint32_t kVersion = 21;

struct ApiBase {
  const void* const* (*GetApi)(uint32_t version);  // NULL if the library is older
  const char* (*GetVersionString)();
};

// Functions by their place in the table.
class Api {
 public:
  explicit Api(const void* const* table) : table_(table) {}

  Status* CreateStatus(int code, const char* message) const { return at<Status*(int, const char*)>(0)(code, message); }
  Status* CreateCustomOpDomain(const char* name, Domain** domain) const {
    return at<Status*(const char*, Domain**)>(26)(name, domain);
  }
  Status* CustomOpDomain_Add(Domain* domain, const Op* op) const {
    return at<Status*(Domain*, const Op*)>(27)(domain, op);
  }
  Status* AddCustomOpDomain(SessionOptions* options, Domain* domain) const {
    return at<Status*(SessionOptions*, Domain*)>(28)(options, domain);
  }
  Status* GetTensorMutableData(Value* value, void** data) const { return at<Status*(Value*, void**)>(51)(value, data); }
  Status* GetDimensionsCount(const TensorInfo* info, size_t* count) const {
    return at<Status*(const TensorInfo*, size_t*)>(61)(info, count);
  }
  Status* GetDimensions(const TensorInfo* info, int64_t* dimensions, size_t count) const {
    return at<Status*(const TensorInfo*, int64_t*, size_t)>(62)(info, dimensions, count);
  }
  Status* GetTensorTypeAndShape(const Value* value, TensorInfo** info) const {
    return at<Status*(const Value*, TensorInfo**)>(65)(value, info);
  }
  Status* KernelInfoGetAttribute_float(const KernelInfo* info, const char* name, float* out) const {
    return at<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, out);
  }
  Status* KernelInfoGetAttribute_int64(const KernelInfo* info, const char* name, int64_t* out) const {
    return at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* KernelInfoGetAttribute_string(const KernelInfo* info, const char* name, char* out, size_t* size) const {
    return at<Status*(const KernelInfo*, const char*, char*, size_t*)>(87)(info, name, out, size);
  }
  Status* KernelContext_GetInput(const KernelContext* context, size_t index, const Value** value) const {
    return at<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* KernelContext_GetOutput(KernelContext* context, size_t index, const int64_t* dimensions, size_t count,
                                  Value** value) const {
    return at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, dimensions, count,
                                                                                    value);
  }
  void ReleaseStatus(Status* status) const { at<void(Status*)>(93)(status); }
  void ReleaseTensorTypeAndShapeInfo(TensorInfo* info) const { at<void(TensorInfo*)>(99)(info); }
  Status* KernelInfoGetConstantInput_tensor(const KernelInfo* info, size_t index, int* is_constant,
                                            const Value** value) const {
    return at<Status*(const KernelInfo*, size_t, int*, const Value**)>(249)(info, index, is_constant, value);
  }
  Status* KernelContext_ParallelFor(const KernelContext* context, void (*fn)(void*, size_t), size_t total,
                                    size_t batches, void* data) const {
    return at<Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(context, fn, total,
                                                                                                  batches, data);
  }

 private:
  template <class Function>
  Function* at(size_t place) const {
    return reinterpret_cast<Function*>(const_cast<void*>(table_[place]));
  }

  const void* const* table_;
};

enum ElementType { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };
enum Characteristic { kRequired = 0, kOptional = 1 };

// What ONNX Runtime asks of an operator. Functions that are not there are NULL.
struct Op {
  uint32_t version;
  void* (*CreateKernel)(const Op*, const void* const* api, const KernelInfo*);
  const char* (*GetName)(const Op*);
  const char* (*GetExecutionProviderType)(const Op*);
  int (*GetInputType)(const Op*, size_t index);
  size_t (*GetInputTypeCount)(const Op*);
  int (*GetOutputType)(const Op*, size_t index);
  size_t (*GetOutputTypeCount)(const Op*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const Op*, size_t index);
  int (*GetOutputCharacteristic)(const Op*, size_t index);
  int (*GetInputMemoryType)(const Op*, size_t index);
  int (*GetVariadicInputMinArity)(const Op*);
  int (*GetVariadicInputHomogeneity)(const Op*);
  int (*GetVariadicOutputMinArity)(const Op*);
  int (*GetVariadicOutputHomogeneity)(const Op*);
  Status* (*CreateKernelV2)(const Op*, const void* const* api, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const Op*, void*);
  int (*GetStartVersion)(const Op*);
  int (*GetEndVersion)(const Op*);
  size_t (*GetMayInplace)(int** input, int** output);
  void (*ReleaseMayInplace)(int* input, int* output);
  size_t (*GetAliasMap)(int** input, int** output);
  void (*ReleaseAliasMap)(int* input, int* output);
};

}  // namespace rtx::ort
