// A caching allocator for CPU tensors, `unimoe_kernels/_caching_allocator.so`.
//
// c10::Allocator is not in torch's stable ABI, so this library is apart from `_C`: Python loads it
// only into the torch that it was compiled with (unimoe_kernels/caching_allocator.py).

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>
#include <pthread.h>
#include <sys/mman.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>

#define UNIMOE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Smaller blocks, header included, are left to the C library, which has lists of small sizes.
constexpr size_t kSmallestCached = size_t{1} << 16;
// Of one size class; larger blocks are left to the system too.
constexpr size_t kLargestCached = size_t{1} << 40;
// Size classes for each power of two; at most an eighth of a block is unused.
constexpr int kClassesPerPower = 8;
constexpr int kClassBits = 3;
constexpr int kSmallestPower = 16;
constexpr int kClasses = (40 - kSmallestPower) * kClassesPerPower + 1;
// A free block of a class up to this many above serves too: one and a half times the size.
constexpr int kLargerClasses = 4;
constexpr size_t kHugePage = size_t{1} << 21;

// Lies in front of the tensor's memory and keeps that aligned.
struct alignas(64) Header {
  Header* next;  // in the list of free blocks of its class
  int size_class;
};
constexpr int kNotCached = -1;

size_t class_bytes(int size_class) {
  const int power = kSmallestPower + size_class / kClassesPerPower;
  const size_t eighths = kClassesPerPower + size_class % kClassesPerPower;
  return eighths << (power - kClassBits);
}

// The smallest class that holds `bytes`, between kSmallestCached and kLargestCached.
int find_class(size_t bytes) {
  const int power = 63 - __builtin_clzll(bytes);
  const size_t eighth = size_t{1} << (power - kClassBits);
  const size_t eighths = (bytes + eighth - 1) / eighth;
  return (power - kSmallestPower) * kClassesPerPower + static_cast<int>(eighths) - kClassesPerPower;
}

struct Cache {
  std::mutex mutex;
  Header* free[kClasses] = {};
  uint64_t last_use[kClasses] = {};
  uint64_t uses = 0;
  size_t used_bytes = 0, peak_bytes = 0, free_bytes = 0;

  // A free block of this class or a slightly larger one, or null.
  Header* take(int size_class) {
    last_use[size_class] = ++uses;
    const int end = std::min(size_class + kLargerClasses + 1, kClasses);
    for (int i = size_class; i < end; ++i) {
      Header* const block = free[i];
      if (block == nullptr) continue;
      free[i] = block->next;
      free_bytes -= class_bytes(i);
      count_used(class_bytes(i));
      return block;
    }
    return nullptr;
  }

  void put(Header* block) {
    const size_t bytes = class_bytes(block->size_class);
    block->next = free[block->size_class];
    free[block->size_class] = block;
    used_bytes -= bytes;
    free_bytes += bytes;
  }

  void count_used(size_t bytes) {
    used_bytes += bytes;
    peak_bytes = std::max(peak_bytes, used_bytes);
  }

  // Returns free blocks to the system, least recently used classes first, until `bytes` more fit
  // into a quarter above the most that was in use at once.
  void make_room(size_t bytes) {
    const size_t in_use = used_bytes + bytes;
    const size_t limit = std::max(peak_bytes, in_use) / 4 * 5;
    while (free_bytes > 0 && in_use + free_bytes > limit) release_oldest();
  }

  void release_oldest() {
    int oldest = -1;
    for (int i = 0; i < kClasses; ++i) {
      if (free[i] == nullptr) continue;
      if (oldest < 0 || last_use[i] < last_use[oldest]) oldest = i;
    }
    Header* const block = free[oldest];
    free[oldest] = block->next;
    free_bytes -= class_bytes(oldest);
    munmap(block, class_bytes(oldest));
  }

  void release_all() {
    while (free_bytes > 0) release_oldest();
  }
};

// Never destroyed: tensors outlive static objects.
Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

Header* map_block(int size_class) {
  const size_t bytes = class_bytes(size_class);
  void* const block =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) return nullptr;
  // Fewer page faults, and fewer misses of the TLB; a refusal costs only speed.
  if (bytes >= kHugePage) madvise(block, bytes, MADV_HUGEPAGE);
  return new (block) Header{nullptr, size_class};
}

Header* allocate_cached(size_t bytes) {
  const int size_class = find_class(bytes);
  Cache& blocks = cache();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  if (Header* const block = blocks.take(size_class)) return block;
  blocks.make_room(class_bytes(size_class));
  Header* block = map_block(size_class);
  if (block == nullptr) {
    blocks.release_all();
    block = map_block(size_class);
  }
  if (block != nullptr) blocks.count_used(class_bytes(size_class));
  return block;
}

Header* allocate_block(size_t bytes) {
  if (bytes >= kSmallestCached && bytes <= kLargestCached) {
    if (Header* const block = allocate_cached(bytes)) return block;
  }
  // torch's own, with its error where there is no memory.
  return new (c10::alloc_cpu(bytes)) Header{nullptr, kNotCached};
}

void free_data(void* data) {
  if (data == nullptr) return;
  c10::profiledCPUMemoryReporter().Delete(data);
  Header* const block = static_cast<Header*>(data) - 1;
  if (block->size_class == kNotCached) {
    c10::free_cpu(block);
    return;
  }
  Cache& blocks = cache();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  blocks.put(block);
}

class CachingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device cpu(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &free_data, cpu};
    TORCH_CHECK(bytes <= SIZE_MAX - sizeof(Header), "CPU allocator: ", bytes, " bytes");
    void* const data = allocate_block(bytes + sizeof(Header)) + 1;
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &free_data, cpu};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_data; }

  void copy_data(void* dest, const void* src, size_t bytes) const override {
    std::memcpy(dest, src, bytes);
  }
};

// A child process that is forked while another thread holds the lock would wait for ever.
void lock_cache() { cache().mutex.lock(); }
void unlock_cache() { cache().mutex.unlock(); }

}  // namespace

// The torch whose headers this library was compiled with.
UNIMOE_EXPORT const char* unimoe_allocator_torch_version() { return TORCH_VERSION; }

// From here on CPU tensors are allocated here. For the start of a process: it is not thread-safe.
UNIMOE_EXPORT void unimoe_allocator_install() {
  static CachingAllocator* const allocator = [] {
    pthread_atfork(lock_cache, unlock_cache, unlock_cache);
    return new CachingAllocator;
  }();
  c10::SetCPUAllocator(allocator);
}

UNIMOE_EXPORT void unimoe_allocator_empty_cache() {
  Cache& blocks = cache();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  blocks.release_all();
  blocks.peak_bytes = blocks.used_bytes;
}

// Writes the bytes of blocks that tensors use, the most since the start or the last emptying, and
// the bytes of free blocks.
UNIMOE_EXPORT void unimoe_allocator_stats(uint64_t* stats) {
  Cache& blocks = cache();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  stats[0] = blocks.used_bytes;
  stats[1] = blocks.peak_bytes;
  stats[2] = blocks.free_bytes;
}
