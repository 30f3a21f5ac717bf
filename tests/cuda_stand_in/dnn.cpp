// cuDNN's graph interface: convolutions, with bias and activation if they are fused, in any layout of memory.
//
// Numbers are those of cudnn_graph_v9.h. A descriptor keeps whatever it is told, and a plan is looked through when it is
// executed. There is one engine, which needs no workspace.

#include <algorithm>
#include <array>
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

// Calls `each` with the offset of every element in turn, axes in this order.
template <typename Each>
void for_each_offset(const Tensor& tensor, std::array<size_t, 4> axes, Each each) {
  for (int64_t i = 0; i < tensor.count(); i++) {
    int64_t rest = i, offset = 0;
    for (size_t place = axes.size(); place-- > 0; rest /= tensor.sides[axes[place]])
      offset += rest % tensor.sides[axes[place]] * tensor.strides[axes[place]];
    each(offset);
  }
}

std::vector<float> packed(const Tensor& tensor, std::array<size_t, 4> axes) {
  std::vector<float> values;
  values.reserve(static_cast<size_t>(tensor.count()));
  for_each_offset(tensor, axes, [&](int64_t offset) { values.push_back(tensor.get(offset)); });
  return values;
}

constexpr std::array<size_t, 4> kChannelsLast{0, 2, 3, 1};  // of N, C, H, W; of a filter, what goes in
constexpr std::array<size_t, 4> kFiltersLast{2, 3, 1, 0};   // of a filter: what comes out

void add_times(float* __restrict sums, float factor, const float* __restrict values, int64_t count) {
  for (int64_t i = 0; i < count; i++) sums[i] += factor * values[i];
}

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
    const Tensor &given = is_forward ? wide : narrow, &target = is_forward ? narrow : wide;
    std::vector<float> weights = packed(filter, is_forward ? kFiltersLast : kChannelsLast);
    std::vector<float> inside = packed(given, kChannelsLast), sums(static_cast<size_t>(target.count()), 0);
    int64_t height = wide.sides[2], width = wide.sides[3], filters = filter.sides[0], across = filter.sides[3];
    int64_t area = filter.sides[2] * across;
    for (int64_t spot = 0; spot < narrow.count() / filters; spot++) {
      int64_t n = spot / narrow.sides[3] / narrow.sides[2], i = spot / narrow.sides[3] % narrow.sides[2];
      int64_t j = spot % narrow.sides[3];
      for (int64_t tap = 0; tap < area; tap++) {
        int64_t y = i * strides[0] - padding[0] + tap / across * dilations[0];
        int64_t x = j * strides[1] - padding[1] + tap % across * dilations[1];
        if (y < 0 || y >= height || x < 0 || x >= width) continue;
        int64_t there = ((n * height + y) * width + x) * wide.sides[1];
        for (int64_t group = 0; group < groups; group++) {
          int64_t outer = spot * filters + group * per_group, inner = there + group * channels;  // of narrow, of wide
          if (is_forward) {
            for (int64_t c = 0; c < channels; c++)
              add_times(&sums[outer], inside[inner + c], &weights[(tap * channels + c) * filters + group * per_group],
                        per_group);
          } else {
            for (int64_t k = 0; k < per_group; k++)
              add_times(&sums[inner], inside[outer + k], &weights[((group * per_group + k) * area + tap) * channels],
                        channels);
          }
        }
      }
    }
    auto next = sums.begin();
    for_each_offset(target, kChannelsLast, [&](int64_t offset) { target.set(offset, *next++); });
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
  wait_for_all();
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

int cudnnDeriveBNTensorDescriptor(Tensor* target, const Tensor* given, int) {  // of the scales and biases
  *target = {{1, given->sides[1], 1, 1}, {given->sides[1], 1, 1, 1}, false, nullptr, nullptr};
  return 0;
}

// Each channel of the batch with a mean of 0 and a variance of 1, times a scale, plus a bias.
int cudnnBatchNormalizationForwardTraining(Handle* handle, int, const void*, const void*, const Tensor* given,
                                           const void* address, const Tensor*, void* target_address, const Tensor*,
                                           const void* scale, const void* bias, double share, void* running_mean,
                                           void* running_variance, double epsilon, void*, void*) {
  Tensor in = *given, out = *given;
  in.address = const_cast<void*>(address);
  out.address = target_address;
  enqueue(handle->stream, [=] {
    int64_t channels = in.sides[1], planes = in.count() / in.sides[0] / channels, size = in.sides[0] * planes;
    for (int64_t c = 0; c < channels; c++) {
      auto place = [&](int64_t i) { return (i / planes * channels + c) * planes + i % planes; };  // NCHW
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < size; i++) sum += in.get(place(i));
      double mean = sum / static_cast<double>(size);
      for (int64_t i = 0; i < size; i++) squares += (in.get(place(i)) - mean) * (in.get(place(i)) - mean);
      double inverse = 1 / std::sqrt(squares / static_cast<double>(size) + epsilon);
      double unbiased = squares / static_cast<double>(std::max<int64_t>(size - 1, 1));
      for (int64_t i = 0; i < size; i++)
        out.set(place(i), static_cast<float>((in.get(place(i)) - mean) * inverse * at<float>(scale)[c] + at<float>(bias)[c]));
      for (auto [running, found] : {std::pair{running_mean, mean}, {running_variance, unbiased}})
        if (running) at<float>(running)[c] = static_cast<float>((1 - share) * at<float>(running)[c] + share * found);
    }
  });
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
REFUSE(cudnnConvolutionBiasActivationForward)
REFUSE(cudnnConvolutionForward)
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
