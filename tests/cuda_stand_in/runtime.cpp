// CUDA's runtime and driver: memory, copies, streams, events and graphs, for one GPU that there is not.
//
// Work is done as late as CUDA allows: when something waits for its stream. A result that is read too early, or memory
// that is used again too early, therefore shows; with CUDA_STAND_IN_EARLY set it is done at once, which shows what is
// written too late. The GPU's memory cannot be touched by the host, and is full of NaN.

#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "stand_in.h"

namespace {

constexpr const char* kName = "CUDA stand-in (no GPU)";
constexpr int kMultiprocessors = 132, kMajor = 9, kMinor = 0, kVersion = 13000;

std::recursive_mutex mutex;  // one call at a time: nothing here is made to be fast
using Lock = std::lock_guard<std::recursive_mutex>;

struct Block {  // the same memory twice: `shown` to the host, which may not touch it, and `real`
  char *shown, *real;
  size_t size;
};
std::map<const char*, Block> blocks;
std::map<const char*, size_t> pinned;
std::set<const void*> mapped;  // those of `pinned` that kernels may use
size_t used = 0;

size_t capacity() {
  const char* given = getenv("CUDA_STAND_IN_BYTES");
  return given ? strtoull(given, nullptr, 10) : size_t{80} << 30;
}

const Block* block_of(const void* address) {
  auto after = blocks.upper_bound(static_cast<const char*>(address));
  if (after == blocks.begin()) return nullptr;
  const Block& block = std::prev(after)->second;
  return address < block.shown + block.size ? &block : nullptr;
}

bool is_pinned(const void* address) {
  auto after = pinned.upper_bound(static_cast<const char*>(address));
  return after != pinned.begin() && address < std::prev(after)->first + std::prev(after)->second;
}

struct Stream {
  std::deque<Work> waiting;
  std::vector<Node> captured;
  bool is_capturing = false, is_spoilt = false;
  int mode = cudaStreamCaptureModeGlobal;  // of the capture
  std::thread::id capturer;
  bool is_blocking = true;  // waits for the default stream, and it for this one
  int device = 0;
};
Stream default_stream;
std::set<Stream*> streams;

struct Event {
  Stream* recorded_on = nullptr;
};

Stream* stream_of(const void* handle) {
  bool is_default = handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_default ? &default_stream : static_cast<Stream*>(const_cast<void*>(handle));
}

void finish(Stream* stream) {
  while (!stream->waiting.empty()) {
    Work work = std::move(stream->waiting.front());
    stream->waiting.pop_front();
    work();
  }
}

void finish_default() {
  finish(&default_stream);
  for (Stream* stream : streams)
    if (stream->is_blocking) finish(stream);
}

void finish_all() {
  finish(&default_stream);
  for (Stream* stream : streams) finish(stream);
}

thread_local int thread_mode = cudaStreamCaptureModeGlobal;

// What may not be done beside a capture, unless it is relaxed: in its own thread, and, while both the capture's mode and
// that of this thread are global, in any. It fails, and so will the capture.
bool is_prohibited(const char* what) {
  bool is_any = false;
  for (Stream* stream : streams) {
    if (!stream->is_capturing || stream->mode == cudaStreamCaptureModeRelaxed) continue;
    bool is_mine = stream->capturer == std::this_thread::get_id();
    bool is_global = stream->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (!is_mine && !is_global) continue;
    say("not allowed while a graph is captured: %s", what);
    is_any = stream->is_spoilt = true;
  }
  return is_any;
}

bool spoils_a_capture() {
  bool is_any = false;
  for (Stream* stream : streams)
    if (stream->is_capturing) is_any = stream->is_spoilt = true;
  return is_any;
}

void copy(void* target, const void* source, size_t size) { memmove(at<void>(target), at<void>(source), size); }

cudaError_t allocate(void** address, size_t size) {
  *address = nullptr;
  if (size == 0) return cudaSuccess;
  size = (size + 4095) / 4096 * 4096;
  if (used + size > capacity()) return cudaErrorMemoryAllocation;
  int file = memfd_create("cuda", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(size)) != 0) return cudaErrorMemoryAllocation;
  void* real = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  void* shown = mmap(nullptr, size, PROT_NONE, MAP_SHARED, file, 0);
  close(file);
  if (real == MAP_FAILED || shown == MAP_FAILED) return cudaErrorMemoryAllocation;
  memset(real, 0xFF, std::min(size, size_t{1} << 28));
  blocks[static_cast<char*>(shown)] = {static_cast<char*>(shown), static_cast<char*>(real), size};
  used += size;
  *address = shown;
  return cudaSuccess;
}

std::map<const void*, std::string>& kernel_names() {
  static std::map<const void*, std::string> names;  // filled before any other static here may be
  return names;
}

const std::string& name_of(const void* kernel) {
  static std::map<const void*, std::string> demangled;
  auto found = demangled.find(kernel);
  if (found != demangled.end()) return found->second;
  const std::string& mangled = kernel_names()[kernel];
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = text ? text : mangled;
  free(text);
  return demangled[kernel] = name;
}

thread_local std::vector<void*> contexts;  // of the driver
int a_binary;

// Two GPUs, which are one in all but their numbers, and so show which one is a thread's own.
constexpr int kGpus = 2;
char contexts_of_gpus[kGpus];
thread_local int device_of_thread = 0;  // where the thread has no context
std::atomic<bool> is_used[kGpus];

std::atomic<int> lasting{0};

}  // namespace

void say(const char* format, ...) {
  static FILE* file = getenv("CUDA_STAND_IN_LOG") ? fopen(getenv("CUDA_STAND_IN_LOG"), "a") : stderr;
  va_list arguments;
  va_start(arguments, format);
  fputs("CUDA stand-in: ", file);
  vfprintf(file, format, arguments);
  fputc('\n', file);
  fflush(file);
  va_end(arguments);
}

Work copying(const void* source, const void* target, size_t size) {
  return [=] { copy(const_cast<void*>(target), source, size); };
}

bool is_on_gpu(const void* address) {
  Lock lock(mutex);
  return block_of(address) != nullptr;
}

void* host_address(const void* address) {
  Lock lock(mutex);
  const Block* block = block_of(address);
  return block ? block->real + (static_cast<const char*>(address) - block->shown) : const_cast<void*>(address);
}

void enqueue(void* handle, Node node) {
  Lock lock(mutex);
  Stream* stream = stream_of(handle);
  if (stream->is_capturing) {
    node.index = stream->captured.size();
    stream->captured.push_back(std::move(node));
    return;
  }
  if (stream == &default_stream) {
    finish_default();
  } else if (stream->is_blocking) {
    finish(&default_stream);
  }
  stream->waiting.push_back(std::move(node.work));
  static const bool is_early = getenv("CUDA_STAND_IN_EARLY") != nullptr;
  if (is_early) finish(stream);
}

extern "C" {

// --- memory ---

cudaError_t cudaMalloc(void** address, size_t size) {
  Lock lock(mutex);
  if (is_prohibited("cudaMalloc")) return cudaErrorStreamCaptureUnsupported;
  return allocate(address, size);
}

cudaError_t cudaMallocFromPoolAsync(void** address, size_t size, cudaMemPool_t, cudaStream_t) {
  Lock lock(mutex);
  return allocate(address, size);
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t) {
  Lock lock(mutex);
  if (address == nullptr) return cudaSuccess;
  finish_all();
  auto found = blocks.find(static_cast<char*>(address));
  if (found == blocks.end()) return cudaErrorInvalidValue;
  munmap(found->second.shown, found->second.size);
  munmap(found->second.real, found->second.size);
  used -= found->second.size;
  blocks.erase(found);
  return cudaSuccess;
}

cudaError_t cudaFree(void* address) {
  Lock lock(mutex);
  if (address != nullptr && is_prohibited("cudaFree")) return cudaErrorStreamCaptureUnsupported;
  return cudaFreeAsync(address, nullptr);
}

cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  Lock lock(mutex);
  if (is_prohibited("cudaHostAlloc")) return cudaErrorStreamCaptureUnsupported;
  *address = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  pinned[static_cast<char*>(*address)] = size;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** address, size_t size) { return cudaHostAlloc(address, size, 0); }

cudaError_t cudaFreeHost(void* address) {
  Lock lock(mutex);
  if (is_prohibited("cudaFreeHost")) return cudaErrorStreamCaptureUnsupported;
  finish_all();
  pinned.erase(static_cast<char*>(address));
  mapped.erase(address);
  free(address);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  Lock lock(mutex);
  if (lasting) return static_cast<cudaError_t>(lasting.load());
  *total = capacity();
  *available = capacity() - used;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Lock lock(mutex);
  *attributes = {};
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
  attributes->type = block_of(address)    ? cudaMemoryTypeDevice
                     : is_pinned(address) ? cudaMemoryTypeHost
                                          : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

// --- copies ---

cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) {
  Lock lock(mutex);
  if (is_prohibited("cudaMemcpy")) return cudaErrorStreamCaptureUnsupported;
  finish_default();
  copy(target, source, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t handle) {
  Lock lock(mutex);
  bool from_pageable = !block_of(source) && !is_pinned(source), to_pageable = !block_of(target) && !is_pinned(target);
  if (from_pageable) {  // read before the call returns
    std::string bytes(static_cast<const char*>(source), size);
    enqueue(handle, {[=] { memmove(at<void>(target), bytes.data(), size); }, Kind::kCopy, source, target, size});
    return cudaSuccess;
  }
  enqueue(handle, {copying(source, target, size), Kind::kCopy, source, target, size});
  if (to_pageable && !stream_of(handle)->is_capturing) finish(stream_of(handle));
  return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t handle) {
  enqueue(handle, [=] {
    for (size_t row = 0; row < height; row++)
      memmove(at<char>(target) + row * target_pitch, at<char>(source) + row * source_pitch, width);
  });
  return cudaSuccess;
}

cudaError_t cudaMemcpyFromSymbol(void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaErrorNotSupported; }

cudaError_t cudaMemset(void* target, int value, size_t size) {
  Lock lock(mutex);
  finish_default();
  memset(at<void>(target), value, size);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t handle) {
  enqueue(handle, [=] { memset(at<void>(target), value, size); }, Kind::kFill);
  return cudaSuccess;
}

// --- streams and events ---

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  Lock lock(mutex);
  auto* stream = new Stream;
  cudaGetDevice(&stream->device);
  stream->is_blocking = (flags & cudaStreamNonBlocking) == 0;
  streams.insert(stream);
  *handle = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithFlags(handle, cudaStreamDefault); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  Lock lock(mutex);
  finish(stream_of(handle));
  streams.erase(stream_of(handle));  // not freed: an event may still name it
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock(mutex);
  if (lasting) return static_cast<cudaError_t>(lasting.load());
  Stream* stream = stream_of(handle);
  if (stream->is_capturing) return cudaErrorStreamCaptureUnsupported;
  stream == &default_stream ? finish_default() : finish(stream);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  Lock lock(mutex);
  if (lasting) return static_cast<cudaError_t>(lasting.load());
  if (spoils_a_capture()) return cudaErrorStreamCaptureUnsupported;
  int mine;
  cudaGetDevice(&mine);
  finish(&default_stream);
  for (Stream* stream : streams) {
    if (stream->device == mine) finish(stream);
  }
  return cudaSuccess;
}

}  // extern "C"

void wait_for_all() { cudaDeviceSynchronize(); }

extern "C" {

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  Stream* other = reinterpret_cast<Event*>(event)->recorded_on;
  if (other) enqueue(handle, [=] { finish(other); }, Kind::kEvent);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  reinterpret_cast<Event*>(event)->recorded_on = stream_of(handle);
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t handle, unsigned) {
  return cudaEventRecord(event, handle);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Lock lock(mutex);
  Stream* stream = reinterpret_cast<Event*>(event)->recorded_on;
  if (stream) finish(stream);
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 0.01F;
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  enqueue(handle, [=] { function(data); }, Kind::kHost);
  return cudaSuccess;
}

// --- graphs of launches ---

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  finish(stream_of(handle));
  stream_of(handle)->is_capturing = true;
  stream_of(handle)->is_spoilt = false;
  stream_of(handle)->mode = mode;
  stream_of(handle)->capturer = std::this_thread::get_id();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Lock lock(mutex);
  Stream* stream = stream_of(handle);
  stream->is_capturing = false;
  *graph = nullptr;
  if (stream->is_spoilt) {
    stream->captured.clear();
    return cudaErrorStreamCaptureInvalidated;
  }
  *graph = reinterpret_cast<cudaGraph_t>(new Graph(std::move(stream->captured)));
  stream->captured.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  *status = stream_of(handle)->is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  auto* graph = reinterpret_cast<Graph*>(executable);
  enqueue(handle, [=] {
    for (Node& node : *graph) node.work();
  });
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  Lock lock(mutex);
  if (lasting) return static_cast<cudaError_t>(lasting.load());
  if (is_prohibited("cudaGraphExecDestroy")) return cudaErrorStreamCaptureUnsupported;
  finish_all();
  delete reinterpret_cast<Graph*>(executable);
  return cudaSuccess;
}

// --- kernels ---

void** __cudaRegisterFatBinary(void*) {
  static void* handle = &a_binary;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernel_names()[function] = name;
}

struct Launch {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Launch> launches;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  launches.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = launches.back().grid;
  *block = launches.back().block;
  *shared = launches.back().shared;
  *static_cast<void**>(stream) = launches.back().stream;
  launches.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3, void** arguments, size_t, cudaStream_t stream) {
  Lock lock(mutex);
  static std::set<std::string> told;
  const std::string& name = name_of(function);
  if (Work work = find_kernel(name, arguments, grid.z)) {
    enqueue(stream, work);
  } else if (told.insert(name).second) {
    say("unknown kernel, whose outputs stay NaN: %s", name.c_str());
  }
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t stream) {
  return cudaLaunchKernel(function, grid, block, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* launch, const void* function, void** arguments) {
  return cudaLaunchKernel(function, launch->gridDim, launch->blockDim, arguments, 0, launch->stream);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 10 * kMajor;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaLibraryLoadData(cudaLibrary_t*, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*,
                                void**, unsigned) {
  return cudaErrorNotSupported;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t*, cudaLibrary_t, const char*) { return cudaErrorNotSupported; }
cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }

// --- the device ---

// The driver's rule: the list of visible devices ends before the first number that is none.
cudaError_t cudaGetDeviceCount(int* count) {
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = !visible ? kGpus : visible[0] == '0';
  return *count ? cudaSuccess : cudaErrorNoDevice;
}

cudaError_t cudaGetDevice(int* device) {
  *device = contexts.empty() ? device_of_thread : static_cast<int>(static_cast<char*>(contexts.back()) - contexts_of_gpus);
  return cudaSuccess;
}

// As CUDA's runtime does: the context on top of the thread's stack gives way to the device's primary one.
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kGpus) return cudaErrorInvalidDevice;
  is_used[device] = true;
  if (contexts.empty()) {
    device_of_thread = device;
  } else {
    contexts.back() = &contexts_of_gpus[device];
  }
  return cudaSuccess;
}

// From now on the GPUs answer with this error, as after an illegal address; 0 ends it. For tests.
void cuda_stand_in_fail(int status) { lasting = status; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = kMajor; break;
    case cudaDevAttrComputeCapabilityMinor: *value = kMinor; break;
    case cudaDevAttrMultiProcessorCount: *value = kMultiprocessors; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    default: *value = 1;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  strcpy(properties->name, kName);
  properties->totalGlobalMem = capacity();
  properties->major = kMajor;
  properties->minor = kMinor;
  properties->multiProcessorCount = kMultiprocessors;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = properties->sharedMemPerBlockOptin = 48 << 10;
  properties->regsPerBlock = 65536;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : error == cudaSuccess ? "no error" : "an error";
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t*, const cudaMemPoolProps*) { return cudaErrorNotSupported; }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t) { return cudaSuccess; }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaErrorNotSupported; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaErrorNotSupported; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

// --- the driver, as far as vae_runtime calls it: nearly all of it only within a context ---

constexpr int kNoContext = 201;  // CUDA_ERROR_INVALID_CONTEXT

int cuInit(unsigned) {
  int count;
  return cudaGetDeviceCount(&count);
}
int cuDeviceGetCount(int* count) { return cudaGetDeviceCount(count); }
int cuDriverGetVersion(int* version) { return cudaDriverGetVersion(version); }
int cuGetErrorString(int, const char** text) {
  *text = nullptr;  // as of an error that it does not know
  return cudaErrorInvalidValue;
}
int cuTensorMapEncodeTiled() { return cudaErrorNotSupported; }

int cuDeviceGet(int* device, int index) {
  *device = index;
  return index >= 0 && index < kGpus ? 0 : cudaErrorInvalidDevice;
}

int cuDeviceGetName(char* name, int size, int) {
  snprintf(name, static_cast<size_t>(size), "%s", kName);
  return 0;
}

int cuDeviceTotalMem_v2(size_t* size, int) {
  *size = capacity();
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device);
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts_of_gpus[device];
  is_used[device] = true;
  return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = is_used[device];
  return 0;
}

int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(context);
  return 0;
}

int cuCtxPopCurrent_v2(void** context) {
  if (contexts.empty()) return kNoContext;
  *context = contexts.back();
  contexts.pop_back();
  return 0;
}

int cuCtxSynchronize() { return contexts.empty() ? kNoContext : cudaDeviceSynchronize(); }

int cuStreamCreate(cudaStream_t* stream, unsigned flags) {
  return contexts.empty() ? kNoContext : cudaStreamCreateWithFlags(stream, flags);
}

int cuStreamSynchronize(cudaStream_t stream) { return contexts.empty() ? kNoContext : cudaStreamSynchronize(stream); }

int cuMemGetInfo_v2(size_t* available, size_t* total) {
  return contexts.empty() ? kNoContext : cudaMemGetInfo(available, total);
}

int cuMemHostAlloc(void** address, size_t size, unsigned flags) {
  if (contexts.empty()) return kNoContext;
  int status = cudaHostAlloc(address, size, flags);
  Lock lock(mutex);
  if (flags & cudaHostAllocMapped) mapped.insert(*address);
  return status;
}

int cuMemHostRegister_v2(void* address, size_t size, unsigned) {
  Lock lock(mutex);
  if (contexts.empty()) return kNoContext;
  if (is_prohibited("cuMemHostRegister")) return cudaErrorStreamCaptureUnsupported;
  if (is_pinned(address)) return cudaErrorHostMemoryAlreadyRegistered;
  pinned[static_cast<char*>(address)] = size;
  return cudaSuccess;
}

int cuMemHostUnregister(void* address) {
  Lock lock(mutex);
  if (contexts.empty()) return kNoContext;
  if (is_prohibited("cuMemHostUnregister")) return cudaErrorStreamCaptureUnsupported;
  pinned.erase(static_cast<char*>(address));
  return cudaSuccess;
}

int cuMemFreeHost(void* address) { return contexts.empty() ? kNoContext : cudaFreeHost(address); }

int cuMemHostGetDevicePointer_v2(void** address, void* pinned_address, unsigned) {
  Lock lock(mutex);
  if (contexts.empty()) return kNoContext;
  if (mapped.count(pinned_address) == 0) return cudaErrorInvalidValue;
  *address = pinned_address;
  return 0;
}

int cuMemcpyHtoDAsync_v2(void* target, const void* source, size_t size, cudaStream_t stream) {
  return contexts.empty() ? kNoContext : cudaMemcpyAsync(target, source, size, cudaMemcpyHostToDevice, stream);
}

int cuMemcpyDtoHAsync_v2(void* target, const void* source, size_t size, cudaStream_t stream) {
  return contexts.empty() ? kNoContext : cudaMemcpyAsync(target, source, size, cudaMemcpyDeviceToHost, stream);
}

int cuMemcpyDtoDAsync_v2(void* target, const void* source, size_t size, cudaStream_t stream) {
  return contexts.empty() ? kNoContext : cudaMemcpyAsync(target, source, size, cudaMemcpyDeviceToDevice, stream);
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, thread_mode);
  return 0;
}

int cuStreamBeginCapture_v2(cudaStream_t stream, int mode) {
  return contexts.empty() ? kNoContext : cudaStreamBeginCapture(stream, static_cast<cudaStreamCaptureMode>(mode));
}

int cuStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) { return cudaStreamEndCapture(stream, graph); }

int cuGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}

int cuGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return contexts.empty() ? kNoContext : cudaGraphLaunch(executable, stream);
}

int cuGraphDestroy(cudaGraph_t graph) { return cudaGraphDestroy(graph); }

int cuGraphExecDestroy(cudaGraphExec_t executable) {
  return contexts.empty() ? kNoContext : cudaGraphExecDestroy(executable);
}

}  // extern "C"
