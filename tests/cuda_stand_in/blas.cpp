// cuBLAS: products of matrices, which are stored column by column. cuBLASLt is there and refuses everything.

#include <cstdint>

#include "stand_in.h"

namespace {

struct Handle {
  void* stream = nullptr;
  int math_mode = 0;
};

constexpr int kTf32 = 3;  // CUBLAS_TF32_TENSOR_OP_MATH
enum DataType { kFloat = 0, kHalf = 2 };  // cudaDataType_t
enum ComputeType { kCompute16 = 64, kCompute16Pedantic = 65 };  // cublasComputeType_t
constexpr int kNotSupported = 15;  // CUBLAS_STATUS_NOT_SUPPORTED

struct Product {  // target = alpha * left * right + beta * target, (rows, inner) x (inner, columns)
  int left_is_transposed, right_is_transposed, rows, columns, inner;
  float alpha, beta;
  const void *left, *right;
  void* target;
  int64_t left_stride, right_stride, target_stride;
  bool by_tf32 = false;
};

// To 11 bits, to nearest, as tensor cores take their factors.
float to_tf32(float value) {
  float wide = value * 8193;
  return wide - (wide - value);
}

template <typename T>
void multiply(const Product& p, int64_t index, int64_t left_step, int64_t right_step, int64_t target_step) {
  const T *left = at<T>(p.left) + index * left_step, *right = at<T>(p.right) + index * right_step;
  T* target = at<T>(p.target) + index * target_step;
  for (int column = 0; column < p.columns; column++)
    for (int row = 0; row < p.rows; row++) {
      float sum = 0;
      for (int i = 0; i < p.inner; i++) {
        int64_t from_left = p.left_is_transposed ? i + row * p.left_stride : row + i * p.left_stride;
        int64_t from_right = p.right_is_transposed ? column + i * p.right_stride : i + column * p.right_stride;
        auto a = static_cast<float>(left[from_left]), b = static_cast<float>(right[from_right]);
        sum += p.by_tf32 ? to_tf32(a) * to_tf32(b) : a * b;
      }
      T& out = target[row + column * p.target_stride];
      out = static_cast<T>(p.alpha * sum + (p.beta == 0 ? 0 : p.beta * static_cast<float>(out)));
    }
}

float scalar(const void* address, bool is_half) {
  return is_half ? static_cast<float>(*static_cast<const Half*>(address)) : *static_cast<const float*>(address);
}

}  // namespace

extern "C" {

int cublasCreate_v2(Handle** handle) {
  *handle = new Handle;
  return 0;
}

int cublasDestroy_v2(Handle* handle) {
  wait_for_all();
  delete handle;
  return 0;
}

int cublasSetStream_v2(Handle* handle, void* stream) {
  handle->stream = stream;
  return 0;
}

int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return 0;
}

int cublasSetMathMode(Handle* handle, int mode) {
  handle->math_mode = mode;
  return 0;
}

const char* cublasGetStatusName(int) { return "CUBLAS_STATUS"; }
const char* cublasGetStatusString(int) { return "of the stand-in"; }

int cublasSgemmStridedBatched(Handle* handle, int left_is_transposed, int right_is_transposed, int rows, int columns,
                              int inner, const float* alpha, const float* left, int left_stride, long long left_step,
                              const float* right, int right_stride, long long right_step, const float* beta,
                              float* target, int target_stride, long long target_step, int count) {
  Product product{left_is_transposed, right_is_transposed, rows,  columns,     inner,        *alpha,       *beta, left,
                  right,              target,              left_stride, right_stride, target_stride,
                  handle->math_mode == kTf32};
  enqueue(handle->stream, [=] {
    for (int i = 0; i < count; i++) multiply<float>(product, i, left_step, right_step, target_step);
  });
  return 0;
}

int cublasSgemm_v2(Handle* handle, int left_is_transposed, int right_is_transposed, int rows, int columns, int inner,
                   const float* alpha, const float* left, int left_stride, const float* right, int right_stride,
                   const float* beta, float* target, int target_stride) {
  return cublasSgemmStridedBatched(handle, left_is_transposed, right_is_transposed, rows, columns, inner, alpha, left,
                                   left_stride, 0, right, right_stride, 0, beta, target, target_stride, 0, 1);
}

int cublasGemmStridedBatchedEx(Handle* handle, int left_is_transposed, int right_is_transposed, int rows, int columns,
                               int inner, const void* alpha, const void* left, int left_type, int left_stride,
                               long long left_step, const void* right, int, int right_stride, long long right_step,
                               const void* beta, void* target, int, int target_stride, long long target_step, int count,
                               int compute_type, int) {
  bool by_half = compute_type == kCompute16 || compute_type == kCompute16Pedantic;
  Product product{left_is_transposed,     right_is_transposed,   rows, columns, inner,
                  scalar(alpha, by_half), scalar(beta, by_half), left, right,   target,
                  left_stride,            right_stride,          target_stride};
  enqueue(handle->stream, [=] {
    for (int i = 0; i < count; i++) {
      if (left_type == kHalf) {
        multiply<Half>(product, i, left_step, right_step, target_step);
      } else {
        multiply<float>(product, i, left_step, right_step, target_step);
      }
    }
  });
  return 0;
}

int cublasGemmEx(Handle* handle, int left_is_transposed, int right_is_transposed, int rows, int columns, int inner,
                 const void* alpha, const void* left, int left_type, int left_stride, const void* right, int right_type,
                 int right_stride, const void* beta, void* target, int target_type, int target_stride, int compute_type,
                 int algorithm) {
  return cublasGemmStridedBatchedEx(handle, left_is_transposed, right_is_transposed, rows, columns, inner, alpha, left,
                                    left_type, left_stride, 0, right, right_type, right_stride, 0, beta, target,
                                    target_type, target_stride, 0, 1, compute_type, algorithm);
}

// target = left, or its transpose; what else could be added, the provider does not ask for.
int cublasSgeam(Handle* handle, int is_transposed, int, int rows, int columns, const float*, const float* left,
                int left_stride, const float*, const float*, int, float* target, int target_stride) {
  enqueue(handle->stream, [=] {
    for (int64_t column = 0; column < columns; column++)
      for (int64_t row = 0; row < rows; row++)
        at<float>(target)[row + column * target_stride] =
            at<float>(left)[is_transposed ? column + row * left_stride : row + column * left_stride];
  });
  return 0;
}

#define REFUSE(name) \
  int name() { return kNotSupported; }

REFUSE(cublasDcopy_v2)
REFUSE(cublasDgeam)
REFUSE(cublasDgemmBatched)
REFUSE(cublasDgemmStridedBatched)
REFUSE(cublasDgemm_v2)
REFUSE(cublasDgetrfBatched)
REFUSE(cublasDgetriBatched)
REFUSE(cublasGemmBatchedEx)
REFUSE(cublasScopy_v2)
REFUSE(cublasSgemmBatched)
REFUSE(cublasSgetrfBatched)
REFUSE(cublasSgetriBatched)
REFUSE(cublasSscal_v2)

int cublasLtCreate(Handle** handle) { return cublasCreate_v2(handle); }
int cublasLtDestroy(Handle* handle) { return cublasDestroy_v2(handle); }
REFUSE(cublasLtMatmul)
REFUSE(cublasLtMatmulAlgoConfigSetAttribute)
REFUSE(cublasLtMatmulAlgoGetHeuristic)
REFUSE(cublasLtMatmulAlgoInit)
REFUSE(cublasLtMatmulDescCreate)
REFUSE(cublasLtMatmulDescDestroy)
REFUSE(cublasLtMatmulDescSetAttribute)
REFUSE(cublasLtMatmulPreferenceCreate)
REFUSE(cublasLtMatmulPreferenceDestroy)
REFUSE(cublasLtMatmulPreferenceSetAttribute)
REFUSE(cublasLtMatrixLayoutCreate)
REFUSE(cublasLtMatrixLayoutDestroy)
REFUSE(cublasLtMatrixLayoutSetAttribute)
REFUSE(cublasLtMatrixTransform)
REFUSE(cublasLtMatrixTransformDescCreate)
REFUSE(cublasLtMatrixTransformDescDestroy)

}  // extern "C"
