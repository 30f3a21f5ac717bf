// What the driver tells of a CUDA graph, with the driver's own types.

#include <cuda.h>

#include "stand_in.h"

extern "C" {

CUresult cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* count) {
  auto* graph = reinterpret_cast<Graph*>(handle);
  if (nodes && *count == 0) return CUDA_ERROR_INVALID_VALUE;
  *count = graph->size();
  if (nodes)
    for (Node& node : *graph) *nodes++ = reinterpret_cast<CUgraphNode>(&node);
  return CUDA_SUCCESS;
}

CUresult cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType* type) {
  *type = static_cast<CUgraphNodeType>(reinterpret_cast<Node*>(node)->kind);
  return CUDA_SUCCESS;
}

CUresult cuGraphMemcpyNodeGetParams(CUgraphNode handle, CUDA_MEMCPY3D* copy) {
  auto* node = reinterpret_cast<Node*>(handle);
  *copy = {};
  copy->srcMemoryType = copy->dstMemoryType = CU_MEMORYTYPE_UNIFIED;
  copy->srcDevice = reinterpret_cast<CUdeviceptr>(node->source);
  copy->dstDevice = reinterpret_cast<CUdeviceptr>(node->target);
  copy->WidthInBytes = node->size;
  copy->Height = copy->Depth = 1;
  if (!is_on_gpu(node->source)) {
    copy->srcMemoryType = CU_MEMORYTYPE_HOST;
    copy->srcHost = node->source;
  }
  return CUDA_SUCCESS;
}

CUresult cuGraphExecMemcpyNodeSetParams(CUgraphExec executable, CUgraphNode handle, const CUDA_MEMCPY3D* copy,
                                        CUcontext context) {
  auto* node = reinterpret_cast<Node*>(handle);
  auto* source = reinterpret_cast<const void*>(copy->srcDevice);
  auto* target = reinterpret_cast<const void*>(copy->dstDevice);
  bool is_same_kind = copy->srcMemoryType == CU_MEMORYTYPE_UNIFIED && copy->dstMemoryType == CU_MEMORYTYPE_UNIFIED;
  bool is_same_size = copy->WidthInBytes == node->size && copy->Height == 1 && copy->Depth == 1;
  if (!is_on_gpu(source) || !is_on_gpu(target) || !is_same_kind || !is_same_size || context == nullptr)
    return CUDA_ERROR_INVALID_VALUE;
  (*reinterpret_cast<Graph*>(executable))[node->index].work = copying(source, target, node->size);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* found, CUpointer_attribute attribute, CUdeviceptr address) {
  if (attribute != CU_POINTER_ATTRIBUTE_MEMORY_TYPE) return CUDA_ERROR_INVALID_VALUE;
  bool is_gpu = is_on_gpu(reinterpret_cast<const void*>(address));
  *static_cast<unsigned*>(found) = is_gpu ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  return CUDA_SUCCESS;
}

}  // extern "C"
