// cuDNN's graph interface: convolutions, with bias and activation if they are fused, in any layout of memory.
//
// Numbers are those of cudnn_graph_v9.h. A descriptor keeps whatever it is told, and a plan is looked through when it is
// executed. There is one engine, which needs no workspace.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "stand_in.h"

namespace {

struct Handle {
  void* stream = nullptr;
};

enum Type { kBoolean = 2, kInt64 = 3, kDouble = 5, kPointer = 6, kDescriptor = 15, kInt32 = 23, kChar = 24 };
enum DescriptorType { kEngine = 2, kForward = 10, kBackwardData = 12 };
enum PointwiseMode { kAdd = 0, kRelu = 100, kTanh = 101, kSigmoid = 102 };
enum Name {
  kPointwiseMode = 0,
  kDilations = 102,
  kStrides = 103,
  kPadding = 105,
  kHeuristicGraph = 201,
  kHeuristicResults = 202,
  kConfigEngine = 300,
  kConfigWorkspace = 303,
  kConfigSharedMemory = 304,
  kPlanConfig = 401,
  kPlanWorkspace = 402,
  kForwardConvolution = 702,
  kForwardFilter = 703,
  kForwardInput = 704,
  kForwardOutput = 705,
  kBackwardConvolution = 708,
  kBackwardFilter = 709,
  kBackwardOutput = 710,
  kBackwardInput = 711,
  kPointwise = 750,
  kPointwiseInput = 751,
  kPointwiseOther = 752,
  kPointwiseOutput = 753,
  kGraphOperations = 801,
  kTensorType = 901,
  kTensorSides = 902,
  kTensorStrides = 903,
  kTensorId = 906,
  kPackIds = 1000,
  kPackPointers = 1001,
  kEngineGraph = 1300,
};
constexpr int kHalfType = 2;          // CUDNN_DATA_HALF
constexpr int kNotSupported = 3000;  // CUDNN_STATUS_NOT_SUPPORTED

size_t size_of(int type) {
  if (type == kBoolean || type == kChar) return 1;
  return type == kInt64 || type == kDouble || type == kPointer || type == 0 ? 8 : 4;
}

struct Descriptor {
  int type;
  std::map<int, std::vector<char>> values;
  std::map<int, std::vector<Descriptor*>> parts;

  template <typename T>
  std::vector<T> list(int name) const {
    auto found = values.find(name);
    if (found == values.end()) return {};
    const auto& bytes = found->second;
    return std::vector<T>(reinterpret_cast<const T*>(bytes.data()),
                          reinterpret_cast<const T*>(bytes.data() + bytes.size()));
  }
  template <typename T>
  T value(int name) const {
    return list<T>(name).at(0);
  }
  Descriptor* part(int name) const {
    auto found = parts.find(name);
    return found == parts.end() || found->second.empty() ? nullptr : found->second[0];
  }
};

// A tensor of up to 5 axes in the GPU's memory or, between two fused operations, in memory of its own.
struct Tensor {
  std::vector<int64_t> sides, strides;
  bool is_half;
  void* address;
  std::shared_ptr<std::vector<float>> own;

  int64_t count() const {
    int64_t product = 1;
    for (int64_t side : sides) product *= side;
    return product;
  }
  float get(int64_t offset) const {
    if (own) return (*own)[static_cast<size_t>(offset)];
    return is_half ? static_cast<float>(at<Half>(address)[offset]) : at<float>(address)[offset];
  }
  void set(int64_t offset, float value) const {
    if (own) {
      (*own)[static_cast<size_t>(offset)] = value;
    } else if (is_half) {
      at<Half>(address)[offset] = static_cast<Half>(value);
    } else {
      at<float>(address)[offset] = value;
    }
  }
};

class Execution {
 public:
  explicit Execution(const Descriptor& pack) {
    auto ids = pack.list<int64_t>(kPackIds);
    auto addresses = pack.list<void*>(kPackPointers);
    for (size_t i = 0; i < ids.size(); i++) addresses_[ids[i]] = addresses[i];
  }

  Tensor tensor(const Descriptor& from) {
    Tensor found{from.list<int64_t>(kTensorSides), from.list<int64_t>(kTensorStrides),
                 from.value<int>(kTensorType) == kHalfType, nullptr, nullptr};
    auto id = from.value<int64_t>(kTensorId);
    auto given = addresses_.find(id);
    if (given != addresses_.end()) {
      found.address = given->second;
    } else {
      int64_t last = 0;
      for (size_t axis = 0; axis < found.sides.size(); axis++) last += (found.sides[axis] - 1) * found.strides[axis];
      auto& own = between_[id];
      if (!own) own = std::make_shared<std::vector<float>>(last + 1);
      found.own = own;
    }
    return found;
  }

 private:
  std::map<int64_t, void*> addresses_;
  std::map<int64_t, std::shared_ptr<std::vector<float>>> between_;
};

// wide: the input of a forward convolution, or the output of its gradient, a transposed convolution. narrow: the other.
Work convolution(const Tensor& wide, const Tensor& filter, const Tensor& narrow, const Descriptor& settings,
                 bool is_forward) {
  auto padding = settings.list<int64_t>(kPadding), strides = settings.list<int64_t>(kStrides),
       dilations = settings.list<int64_t>(kDilations);
  if (wide.sides.size() != 4) {
    say("convolution over %zu axes", wide.sides.size());
    return [] {};
  }
  return [=] {
    int64_t channels = filter.sides[1], groups = wide.sides[1] / channels, per_group = filter.sides[0] / groups;
    std::vector<float> sums(static_cast<size_t>(wide.count()), 0);
    auto offset = [](const Tensor& t, int64_t n, int64_t c, int64_t y, int64_t x) {
      return n * t.strides[0] + c * t.strides[1] + y * t.strides[2] + x * t.strides[3];
    };
    auto sum_at = [&](int64_t n, int64_t c, int64_t y, int64_t x) -> float& {
      return sums[static_cast<size_t>(((n * wide.sides[1] + c) * wide.sides[2] + y) * wide.sides[3] + x)];
    };
    for (int64_t n = 0; n < narrow.sides[0]; n++)
      for (int64_t k = 0; k < narrow.sides[1]; k++)
        for (int64_t i = 0; i < narrow.sides[2]; i++)
          for (int64_t j = 0; j < narrow.sides[3]; j++) {
            int64_t here = offset(narrow, n, k, i, j), first = k / per_group * channels;
            float sum = 0, given = is_forward ? 0 : narrow.get(here);
            for (int64_t r = 0; r < filter.sides[2]; r++)
              for (int64_t s = 0; s < filter.sides[3]; s++) {
                int64_t y = i * strides[0] - padding[0] + r * dilations[0];
                int64_t x = j * strides[1] - padding[1] + s * dilations[1];
                if (y < 0 || y >= wide.sides[2] || x < 0 || x >= wide.sides[3]) continue;
                for (int64_t c = 0; c < channels; c++) {
                  float weight = filter.get(offset(filter, k, c, r, s));
                  if (is_forward) {
                    sum += weight * wide.get(offset(wide, n, first + c, y, x));
                  } else {
                    sum_at(n, first + c, y, x) += weight * given;
                  }
                }
              }
            if (is_forward) narrow.set(here, sum);
          }
    if (is_forward) return;
    for (int64_t n = 0; n < wide.sides[0]; n++)
      for (int64_t c = 0; c < wide.sides[1]; c++)
        for (int64_t y = 0; y < wide.sides[2]; y++)
          for (int64_t x = 0; x < wide.sides[3]; x++) wide.set(offset(wide, n, c, y, x), sum_at(n, c, y, x));
  };
}

float apply(int mode, float value, float other) {
  switch (mode) {
    case kAdd: return value + other;
    case kRelu: return value > 0 ? value : value == value ? 0 : value;
    case kTanh: return std::tanh(value);
    case kSigmoid: return 1 / (1 + std::exp(-value));
    default: return NAN;
  }
}

Work pointwise(const Tensor& in, const Tensor* other, const Tensor& out, int mode) {
  if (mode != kAdd && (mode < kRelu || mode > kSigmoid)) say("pointwise mode %d, whose outputs are NaN", mode);
  bool has_other = other != nullptr;
  Tensor second = has_other ? *other : in;
  return [=] {
    for (int64_t i = 0; i < out.count(); i++) {
      int64_t rest = i, from = 0, from_second = 0, to = 0;
      for (size_t axis = out.sides.size(); axis-- > 0; rest /= out.sides[axis]) {
        int64_t place = rest % out.sides[axis];
        to += place * out.strides[axis];
        if (in.sides[axis] != 1) from += place * in.strides[axis];
        if (second.sides[axis] != 1) from_second += place * second.strides[axis];
      }
      out.set(to, apply(mode, in.get(from), has_other ? second.get(from_second) : 0));
    }
  };
}

void copy_into(void* list, const Descriptor* from) {  // the caller made the descriptor that is to be filled
  auto* target = *static_cast<Descriptor**>(list);
  target->values = from->values;
  target->parts = from->parts;
}

}  // namespace

extern "C" {

int cudnnCreate(Handle** handle) {
  *handle = new Handle;
  return 0;
}

int cudnnDestroy(Handle* handle) {
  delete handle;
  return 0;
}

int cudnnSetStream(Handle* handle, void* stream) {
  handle->stream = stream;
  return 0;
}

int cudnnGetStream(Handle* handle, void** stream) {
  *stream = handle->stream;
  return 0;
}

size_t cudnnGetVersion() { return 91400; }
const char* cudnnGetErrorString(int) { return "of the stand-in"; }
void cudnnGetLastErrorString(char* text, size_t size) {
  if (size > 0) *text = '\0';
}

int cudnnBackendCreateDescriptor(int type, Descriptor** descriptor) {
  *descriptor = new Descriptor{type, {}, {}};
  return 0;
}

// Never freed: a plan is executed long after the descriptors that it was made of are destroyed.
int cudnnBackendDestroyDescriptor(Descriptor*) { return 0; }
int cudnnBackendFinalize(Descriptor*) { return 0; }

int cudnnBackendSetAttribute(Descriptor* descriptor, int name, int type, int64_t count, const void* list) {
  if (type == kDescriptor) {
    auto* first = static_cast<Descriptor* const*>(list);
    descriptor->parts[name].assign(first, first + count);
  } else {
    auto* first = static_cast<const char*>(list);
    descriptor->values[name].assign(first, first + static_cast<size_t>(count) * size_of(type));
  }
  return 0;
}

int cudnnBackendGetAttribute(Descriptor* descriptor, int name, int type, int64_t room, int64_t* count, void* list) {
  int64_t ignored = 0;
  int64_t& found = count ? *count : ignored;
  found = 1;
  bool is_wanted = list != nullptr && room > 0;
  switch (name) {
    case kHeuristicResults:
      if (is_wanted) {
        auto* engine = new Descriptor{kEngine, {}, {}};
        engine->parts[kEngineGraph] = {descriptor->part(kHeuristicGraph)};
        (*static_cast<Descriptor**>(list))->parts[kConfigEngine] = {engine};
      }
      return 0;
    case kConfigEngine:
    case kPlanConfig:
      if (is_wanted && descriptor->part(name)) copy_into(list, descriptor->part(name));
      return 0;
    case kPlanWorkspace:
    case kConfigWorkspace:
    case kConfigSharedMemory:
      if (is_wanted) memset(list, 0, size_of(type));
      return 0;
    default:
      auto bytes = descriptor->values.find(name);
      found = bytes == descriptor->values.end() ? 0 : static_cast<int64_t>(bytes->second.size() / size_of(type));
      if (found > 0 && is_wanted)
        memcpy(list, bytes->second.data(), static_cast<size_t>(std::min(found, room)) * size_of(type));
      return 0;
  }
}

int cudnnBackendExecute(Handle* handle, Descriptor* plan, Descriptor* pack) {
  Execution execution(*pack);
  auto tensor = [&](const Descriptor* operation, int name) { return execution.tensor(*operation->part(name)); };
  for (Descriptor* operation : plan->part(kPlanConfig)->part(kConfigEngine)->part(kEngineGraph)->parts[kGraphOperations]) {
    if (operation->type == kForward) {
      enqueue(handle->stream, convolution(tensor(operation, kForwardInput), tensor(operation, kForwardFilter),
                                          tensor(operation, kForwardOutput), *operation->part(kForwardConvolution), true));
    } else if (operation->type == kBackwardData) {
      enqueue(handle->stream,
              convolution(tensor(operation, kBackwardOutput), tensor(operation, kBackwardFilter),
                          tensor(operation, kBackwardInput), *operation->part(kBackwardConvolution), false));
    } else if (operation->part(kPointwise)) {
      int mode = operation->part(kPointwise)->value<int>(kPointwiseMode);
      Tensor in = tensor(operation, kPointwiseInput), out = tensor(operation, kPointwiseOutput);
      if (operation->part(kPointwiseOther)) {
        Tensor other = tensor(operation, kPointwiseOther);
        enqueue(handle->stream, pointwise(in, &other, out, mode));
      } else {
        enqueue(handle->stream, pointwise(in, nullptr, out, mode));
      }
    } else {
      say("operation of type %d is not known", operation->type);
    }
  }
  return 0;
}

// --- the older interface, of which the provider adds biases with; every function is looked up ---

int cudnnCreateTensorDescriptor(Tensor** tensor) {
  *tensor = new Tensor;
  return 0;
}

int cudnnDestroyTensorDescriptor(Tensor* tensor) {
  delete tensor;
  return 0;
}

int cudnnSetTensorNdDescriptor(Tensor* tensor, int type, int axes, const int* sides, const int* strides) {
  *tensor = {{sides, sides + axes}, {strides, strides + axes}, type == kHalfType, nullptr, nullptr};
  return 0;
}

// target = target + given; both factors are 1 wherever the provider calls it.
int cudnnAddTensor(Handle* handle, const void*, const Tensor* given, const void* given_address, const void*,
                   const Tensor* target, void* target_address) {
  Tensor bias = *given, out = *target;
  bias.address = const_cast<void*>(given_address);
  out.address = target_address;
  enqueue(handle->stream, pointwise(out, &bias, out, kAdd));
  return 0;
}

#define CREATE(name)                 \
  int name(void** descriptor) {      \
    static char anything;            \
    *descriptor = &anything;         \
    return 0;                        \
  }
#define ACCEPT(name) \
  int name() { return 0; }
#define REFUSE(name) \
  int name() { return kNotSupported; }

CREATE(cudnnCreateActivationDescriptor)
CREATE(cudnnCreateConvolutionDescriptor)
CREATE(cudnnCreateDropoutDescriptor)
CREATE(cudnnCreateFilterDescriptor)
CREATE(cudnnCreateLRNDescriptor)
CREATE(cudnnCreatePoolingDescriptor)
CREATE(cudnnCreateRNNDataDescriptor)
CREATE(cudnnCreateRNNDescriptor)
CREATE(cudnnCreateReduceTensorDescriptor)
ACCEPT(cudnnDestroyActivationDescriptor)
ACCEPT(cudnnDestroyConvolutionDescriptor)
ACCEPT(cudnnDestroyDropoutDescriptor)
ACCEPT(cudnnDestroyFilterDescriptor)
ACCEPT(cudnnDestroyLRNDescriptor)
ACCEPT(cudnnDestroyPoolingDescriptor)
ACCEPT(cudnnDestroyRNNDataDescriptor)
ACCEPT(cudnnDestroyRNNDescriptor)
ACCEPT(cudnnDestroyReduceTensorDescriptor)

ACCEPT(cudnnSetActivationDescriptor)
ACCEPT(cudnnSetConvolutionGroupCount)
ACCEPT(cudnnSetConvolutionMathType)
ACCEPT(cudnnSetConvolutionNdDescriptor)
ACCEPT(cudnnSetDropoutDescriptor)
ACCEPT(cudnnSetFilterNdDescriptor)
ACCEPT(cudnnSetLRNDescriptor)
ACCEPT(cudnnSetPoolingNdDescriptor)
ACCEPT(cudnnSetRNNDataDescriptor)
ACCEPT(cudnnSetReduceTensorDescriptor)

REFUSE(cudnnActivationForward)
REFUSE(cudnnBatchNormalizationForwardInference)
REFUSE(cudnnBatchNormalizationForwardTraining)
REFUSE(cudnnConvolutionBiasActivationForward)
REFUSE(cudnnConvolutionForward)
REFUSE(cudnnDeriveBNTensorDescriptor)
REFUSE(cudnnDropoutGetStatesSize)
REFUSE(cudnnFindConvolutionForwardAlgorithmEx)
REFUSE(cudnnGetConvolutionForwardWorkspaceSize)
REFUSE(cudnnGetRNNTempSpaceSizes)
REFUSE(cudnnGetRNNWeightParams)
REFUSE(cudnnGetReductionIndicesSize)
REFUSE(cudnnGetReductionWorkspaceSize)
REFUSE(cudnnGetTensorNdDescriptor)
REFUSE(cudnnLRNCrossChannelForward)
REFUSE(cudnnPoolingForward)
REFUSE(cudnnRNNForward)
REFUSE(cudnnReduceTensor)
REFUSE(cudnnSoftmaxForward)

}  // extern "C"
