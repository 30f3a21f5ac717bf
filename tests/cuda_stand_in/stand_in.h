// What the parts of the stand-in share. See build.py for what it is.
#pragma once

#include <functional>
#include <string>
#include <vector>

using Half = _Float16;
using Work = std::function<void()>;  // on the GPU, done when its stream comes to it

void say(const char* format, ...);  // a line to the file that CUDA_STAND_IN_LOG names, or to stderr

// Where memory of the GPU really lies, which the host cannot touch by its own address; any other address as it is.
void* host_address(const void* address);

template <typename T>
T* at(const void* address) {
  return static_cast<T*>(host_address(address));
}

bool is_on_gpu(const void* address);

enum class Kind { kKernel = 0, kCopy = 1, kFill = 2, kHost = 3, kEvent = 6 };  // as CUgraphNodeType has them

struct Node {  // of a CUDA graph
  Work work;
  Kind kind = Kind::kKernel;
  const void *source = nullptr, *target = nullptr;  // of a copy
  size_t size = 0;
  size_t index = 0;  // in its graph, and in what is made of that
};
using Graph = std::vector<Node>;

// Wait for all streams, as the libraries do when a handle is destroyed; what is being captured is spoilt by it.
void wait_for_all();

// Add to a stream, or to the graph that it is capturing.
void enqueue(void* stream, Node node);
inline void enqueue(void* stream, Work work, Kind kind = Kind::kKernel) { enqueue(stream, Node{std::move(work), kind}); }

// What a copy does.
Work copying(const void* source, const void* target, size_t size);

// What a kernel does, by its demangled name, with the arguments and the grid that it is launched
// with; empty where it is not known.
Work find_kernel(const std::string& name, void** arguments, unsigned grid_depth);
