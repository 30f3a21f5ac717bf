// onnxruntime's own kernels, as far as the graphs of fully connected and convolutional bundles need them, those with
// normalisation in groups and attention too: what each computes for its arguments, in the order of its declaration in onnxruntime's sources.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "stand_in.h"

namespace {

struct Divisor {  // onnxruntime::cuda::DivMod<int>
  int value;
  uint32_t magic, shift;
};

template <typename T, int capacity>
struct List {  // onnxruntime::cuda::TArray
  int32_t size;
  T items[capacity];
};

class Arguments {
 public:
  explicit Arguments(void** arguments) : arguments_(arguments) {}
  template <typename T>
  T get(int index) const {
    return *static_cast<T*>(arguments_[index]);
  }
  void* address(int index) const { return get<void*>(index); }

 private:
  void** arguments_;
};

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

float relu(float x) { return x > 0 ? x : x == x ? 0 : x; }
float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }
float hyperbolic_tangent(float x) { return std::tanh(x); }
float same(float x) { return x; }

template <typename From, typename To>
Work unary(float (*function)(float), Arguments given, bool counts_by_int) {
  void *in = given.address(0), *out = given.address(1);
  int64_t count = counts_by_int ? given.get<int>(3) : given.get<int64_t>(3);
  return [=] {
    for (int64_t i = 0; i < count; i++) at<To>(out)[i] = static_cast<To>(function(static_cast<float>(at<From>(in)[i])));
  };
}

Work unary(const std::string& name, Arguments given) {
  float (*function)(float) = has(name, "OP_Relu<")      ? relu
                             : has(name, "OP_Sigmoid<") ? sigmoid
                             : has(name, "OP_Tanh<")    ? hyperbolic_tangent
                             : has(name, "OP_Cast<")    ? same
                                                        : nullptr;
  if (function == nullptr) return nullptr;
  bool by_int = has(name, ", int)");
  if (has(name, "<float, float")) return unary<float, float>(function, given, by_int);
  if (has(name, "<float, __half")) return unary<float, Half>(function, given, by_int);
  if (has(name, "<__half, float")) return unary<Half, float>(function, given, by_int);
  if (has(name, "<__half, __half")) return unary<Half, Half>(function, given, by_int);
  return nullptr;
}

using Operator = float (*)(float, float);

Operator operator_of(const std::string& name) {
  if (has(name, "OP_Add<")) return [](float a, float b) { return a + b; };
  if (has(name, "OP_Sub<")) return [](float a, float b) { return a - b; };
  if (has(name, "OP_Mul<")) return [](float a, float b) { return a * b; };
  if (has(name, "OP_Div<")) return [](float a, float b) { return a / b; };
  return nullptr;
}

// Element i of the result comes of element left(i) and right(i).
template <typename T, typename Left, typename Right>
Work binary(Operator apply, const void* a, const void* b, const void* out, int count, Left left, Right right) {
  return [=] {
    for (int i = 0; i < count; i++) {
      auto first = static_cast<float>(at<T>(a)[left(i)]), second = static_cast<float>(at<T>(b)[right(i)]);
      at<T>(out)[i] = static_cast<T>(apply(first, second));
    }
  };
}

template <typename T>
Work binary(const std::string& name, Arguments given) {
  Operator apply = operator_of(name);
  if (apply == nullptr) return nullptr;
  auto itself = [](int i) { return i; };
  void *left = given.address(0), *right = given.address(1);
  if (has(name, "_BinaryElementWiseSimple<")) {
    int moves_left = has(name, "<true, "), moves_right = has(name, ", true, ");
    auto from_left = [=](int i) { return moves_left * i; };
    auto from_right = [=](int i) { return moves_right * i; };
    return binary<T>(apply, left, right, given.address(2), given.get<int>(4), from_left, from_right);
  }
  if (has(name, "_BinaryElementWiseRhsPerChannelBatch1<")) {
    int plane = given.get<Divisor>(2).value;
    auto channel = [=](int i) { return i / plane; };
    return binary<T>(apply, left, right, given.address(3), given.get<int>(5), itself, channel);
  }
  if (has(name, "_BinaryElementWiseRhsPerChannelBatchN<")) {
    int plane = given.get<Divisor>(2).value, channels = given.get<Divisor>(3).value;
    auto channel = [=](int i) { return i / plane % channels; };
    return binary<T>(apply, left, right, given.address(4), given.get<int>(6), itself, channel);
  }
  return nullptr;
}

template <typename T>
Work quick_gelu(Arguments given) {  // x * sigmoid(alpha * x)
  void *in = given.address(0), *out = given.address(1);
  auto alpha = given.get<float>(2);
  auto count = given.get<int64_t>(3);
  return [=] {
    for (int64_t i = 0; i < count; i++) {
      auto x = static_cast<float>(at<T>(in)[i]);
      at<T>(out)[i] = static_cast<T>(x * sigmoid(alpha * x));
    }
  };
}

template <typename T>
Work instance_norm(Arguments given) {  // with the mean and the unbiased variance of each channel of each example
  void *in = given.address(0), *scale = given.address(1), *bias = given.address(2), *out = given.address(9);
  void *mean = given.address(3), *variance = given.address(4);
  auto correction = given.get<double>(5), epsilon = given.get<double>(6);
  int plane = given.get<Divisor>(7).value, channels = given.get<Divisor>(8).value, count = given.get<int>(10);
  return [=] {
    for (int i = 0; i < count; i++) {
      int each = i / plane, channel = each % channels;
      double deviation = std::sqrt(at<float>(variance)[each] * correction + epsilon);
      double value = (static_cast<float>(at<T>(in)[i]) - at<float>(mean)[each]) / deviation;
      at<T>(out)[i] = static_cast<T>(value * static_cast<float>(at<T>(scale)[channel]) +
                                     static_cast<float>(at<T>(bias)[channel]));
    }
  };
}

template <typename T>
Work softmax(Arguments given) {
  void *out = given.address(0), *in = given.address(1);
  int rows = given.get<int>(2), stride = given.get<int>(3), columns = given.get<int>(4);
  return [=] {
    for (int row = 0; row < rows; row++) {
      const T* from = at<T>(in) + int64_t{row} * stride;
      float most = -INFINITY, sum = 0;
      for (int i = 0; i < columns; i++) most = std::max(most, static_cast<float>(from[i]));
      for (int i = 0; i < columns; i++) sum += std::exp(static_cast<float>(from[i]) - most);
      for (int i = 0; i < columns; i++)
        at<T>(out)[int64_t{row} * stride + i] = static_cast<T>(std::exp(static_cast<float>(from[i]) - most) / sum);
    }
  };
}

template <typename T>
Work clip(Arguments given) {
  void *in = given.address(0), *out = given.address(1), *least = given.address(2), *most = given.address(3);
  T low = given.get<T>(4), high = given.get<T>(5);
  auto count = given.get<size_t>(6);
  return [=] {
    T from = least ? *at<T>(least) : low, to = most ? *at<T>(most) : high;
    for (size_t i = 0; i < count; i++) at<T>(out)[i] = std::min(std::max(at<T>(in)[i], from), to);
  };
}

template <typename T>
Work fill(Arguments given, bool counts_by_int) {
  void* out = given.address(0);
  T value = given.get<T>(1);
  int64_t count = counts_by_int ? given.get<int>(2) : given.get<int64_t>(2);
  return [=] { std::fill_n(at<T>(out), count, value); };
}

Work expand_rows(Arguments given) {  // of 4 bytes an element
  int count = given.get<int>(0), row_stride = given.get<int>(4), column_stride = given.get<int>(5);
  void *in = given.address(1), *out = given.address(2);
  int columns = given.get<Divisor>(3).value;
  return [=] {
    for (int i = 0; i < count; i++)
      at<int32_t>(out)[i] = at<int32_t>(in)[i / columns * row_stride + i % columns * column_stride];
  };
}

Work expand(Arguments given) {  // the same of any rank
  int rank = given.get<int>(0), count = given.get<int>(1);
  void *in = given.address(2), *out = given.address(3);
  auto divisors = given.get<List<Divisor, 8>>(4);
  auto strides = given.get<List<int64_t, 8>>(5);
  return [=] {
    for (int i = 0; i < count; i++) {
      int64_t from = 0;
      for (int dim = 0, rest = i; dim < rank; rest %= divisors.items[dim].value, dim++)
        from += strides.items[dim] * (rest / divisors.items[dim].value);
      at<int32_t>(out)[i] = at<int32_t>(in)[from];
    }
  };
}

template <typename T>
Work broadcast_bias(Arguments given) {
  void *bias = given.address(0), *out = given.address(1);
  auto count = given.get<int64_t>(2);
  int columns = given.get<Divisor>(3).value, row_stride = given.get<int>(4), column_stride = given.get<int>(5);
  auto scale = static_cast<float>(given.get<T>(6));
  return [=] {
    for (int64_t i = 0; i < count; i++) {
      int64_t from = i / columns * row_stride + i % columns * column_stride;
      at<T>(out)[i] = static_cast<T>(scale * static_cast<float>(at<T>(bias)[from]));
    }
  };
}

Work split(Arguments given, int64_t unit) {  // unit: bytes of what one thread moves
  auto sizes = given.get<List<int64_t, 4>>(0);
  void* in = given.address(1);
  auto outs = given.get<List<void*, 4>>(2);
  auto row = given.get<int64_t>(3);
  int64_t rows = given.get<int>(4) * unit / row;
  return [=] {
    int64_t start = 0;
    for (int part = 0; part < sizes.size; start += sizes.items[part++])
      for (int64_t i = 0; i < rows; i++)
        memcpy(at<char>(outs.items[part]) + i * sizes.items[part], at<char>(in) + i * row + start,
               static_cast<size_t>(sizes.items[part]));
  };
}

class Parts {  // equal ones of an axis, between them and the whole: where the whole's element i is
 public:
  explicit Parts(Arguments given)
      : block_(given.get<Divisor>(0).value), inner_(given.get<Divisor>(1).value), part_(given.get<Divisor>(2).value) {}
  int number(int i) const { return along(i) / part_; }
  int offset(int i) const { return (i / block_ * part_ + along(i) % part_) * inner_ + i % inner_; }

 private:
  int along(int i) const { return i % block_ / inner_; }
  int block_, inner_, part_;
};

template <typename T>
Work split_evenly(Arguments given) {
  Parts parts(given);
  void* in = given.address(4);
  auto outs = given.get<List<void*, 32>>(5);
  int count = given.get<int>(6);
  return [=] {
    for (int i = 0; i < count; i++) at<T>(outs.items[parts.number(i)])[parts.offset(i)] = at<T>(in)[i];
  };
}

template <typename T>
Work join(Arguments given) {
  Parts parts(given);
  void* out = given.address(3);
  auto ins = given.get<List<void*, 32>>(4);
  int count = given.get<int>(5);
  return [=] {
    for (int i = 0; i < count; i++) at<T>(out)[i] = at<T>(ins.items[parts.number(i)])[parts.offset(i)];
  };
}

template <typename T>
Work transpose(Arguments given) {
  int rank = given.get<int>(0), count = given.get<int>(5);
  auto in_strides = given.get<List<int64_t, 8>>(1);
  auto out_strides = given.get<List<Divisor, 8>>(3);
  void *in = given.address(2), *out = given.address(4);
  return [=] {
    for (int i = 0; i < count; i++) {
      int rest = i;
      int64_t from = 0;
      for (int axis = 0; axis < rank; axis++) {
        from += rest / out_strides.items[axis].value * in_strides.items[axis];
        rest %= out_strides.items[axis].value;
      }
      at<T>(out)[i] = at<T>(in)[from];
    }
  };
}

template <typename T>
Work transpose_planes(Arguments given, int64_t planes) {
  auto rows = given.get<int64_t>(0), columns = given.get<int64_t>(1);
  void *in = given.address(3), *out = given.address(4);
  return [=] {
    for (int64_t plane = 0; plane < planes; plane++)
      for (int64_t row = 0; row < rows; row++)
        for (int64_t column = 0; column < columns; column++)
          at<T>(out)[(plane * columns + column) * rows + row] = at<T>(in)[(plane * rows + row) * columns + column];
  };
}

struct Nearest {  // onnxruntime::cuda::NearestMappingInfo
  int origin, is_outside;
};

Work nearest_mapping(Arguments given) {
  int in_height = given.get<int>(0), in_width = given.get<int>(1);
  int out_height = given.get<int>(2), out_width = given.get<int>(3);
  float scale_down = given.get<float>(4), scale_across = given.get<float>(5);
  void* mapping = given.address(13);
  return [=] {
    auto* entry = at<Nearest>(mapping);
    for (int y = 0; y < out_height; y++)
      *entry++ = {std::min(static_cast<int>(static_cast<float>(y) / scale_down), in_height - 1), 0};
    for (int x = 0; x < out_width; x++)
      *entry++ = {std::min(static_cast<int>(static_cast<float>(x) / scale_across), in_width - 1), 0};
  };
}

template <typename T>
Work nearest(Arguments given) {
  auto out_height = given.get<int64_t>(0), image_stride = given.get<int64_t>(2);
  int row_stride = given.get<int>(3), image = given.get<Divisor>(4).value, row = given.get<Divisor>(5).value;
  void *in = given.address(6), *out = given.address(7), *mapping = given.address(10);
  auto count = given.get<int64_t>(8);
  return [=] {
    for (int64_t i = 0; i < count; i++) {
      int64_t y = i % image / row, x = i % image % row;
      int64_t from = i / image * image_stride + int64_t{at<Nearest>(mapping)[y].origin} * row_stride;
      at<T>(out)[i] = at<T>(in)[from + at<Nearest>(mapping)[out_height + x].origin];
    }
  };
}

}  // namespace

Work find_kernel(const std::string& name, void** arguments, unsigned grid_depth) {
  Arguments given(arguments);
  bool is_half = has(name, "<__half") || has(name, "<short");
  if (has(name, "OP_QuickGelu<")) return is_half ? quick_gelu<Half>(given) : quick_gelu<float>(given);
  if (has(name, "_UnaryElementWise<")) return unary(name, given);
  if (has(name, "_BinaryElementWise") && has(name, "__half, __half, __half, ")) return binary<Half>(name, given);
  if (has(name, "_BinaryElementWise") && has(name, "float, float, float, ")) return binary<float>(name, given);
  if (has(name, "_InstanceNormKernel<")) return is_half ? instance_norm<Half>(given) : instance_norm<float>(given);
  if (has(name, "softmax_warp_forward<float, float, float, ") && has(name, ", false>")) return softmax<float>(given);
  if (has(name, "softmax_warp_forward<__half, __half, float, ") && has(name, ", false>")) return softmax<Half>(given);
  if (has(name, "_Clip<")) return is_half ? clip<Half>(given) : clip<float>(given);
  if (has(name, "::_Fill<float,")) return fill<float>(given, has(name, ", int)"));
  if (has(name, "::_Fill<__half,")) return fill<Half>(given, has(name, ", int)"));
  if (has(name, "::ExpandKernel2D<int>")) return expand_rows(given);
  if (has(name, "::ExpandKernel<unsigned int, ")) return expand(given);
  if (has(name, "BroadcastBiasKernel<")) return is_half ? broadcast_bias<Half>(given) : broadcast_bias<float>(given);
  for (auto [type, bytes] : {std::pair{"<char>", 1}, {"<short>", 2}, {"<int>", 4}, {"<long>", 8}, {"<int4>", 16}})
    if (has(name, ("_SplitSmallInnerKernel" + std::string(type)).c_str())) return split(given, bytes);
  if (has(name, "_SplitKernelSameSplitDim<int, onnxruntime::cuda::TArray<void*, 32>")) return split_evenly<int32_t>(given);
  if (has(name, "_SplitKernelSameSplitDim<short, onnxruntime::cuda::TArray<void*, 32>")) {
    return split_evenly<int16_t>(given);
  }
  if (has(name, "_ConcatKernelSameConcatDim<int, onnxruntime::cuda::TArray<void const*, 32>")) {
    return join<int32_t>(given);
  }
  if (has(name, "::TransposeKernel<")) return is_half ? transpose<int16_t>(given) : transpose<int32_t>(given);
  if (has(name, "Transpose3DKernel<")) {
    return is_half ? transpose_planes<int16_t>(given, grid_depth) : transpose_planes<int32_t>(given, grid_depth);
  }
  if (has(name, "_ResizeNearestMappingKernel2D<") && has(name, ", onnxruntime::cuda::TransformCoordinate_ASYMMETRIC, ") &&
      has(name, "NearestPixel_FLOOR")) {
    return nearest_mapping(given);
  }
  if (has(name, "_ResizeNearestKernel2D<")) return is_half ? nearest<Half>(given) : nearest<float>(given);
  return nullptr;
}
