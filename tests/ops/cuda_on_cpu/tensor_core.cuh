// Stands in for csrc/cuda/tensor_core.cuh on a CPU, by the layouts of the PTX ISA. A copy arrives
// when its group is waited for and not before; until then its destination is garbage, so that a
// missing wait and a stage that is loaded while others read it both give wrong results.
#pragma once

#include <vector>

#include "launch.cuh"

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// Of a thread: its groups of copies, the last one still open.
using Groups = std::vector<std::vector<Copy>>;

inline Groups& groups_of_thread() {
  static std::vector<Groups> groups(1024, Groups(1));
  return groups[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
}

}  // namespace emulation

namespace unimoe {

inline void copy_async_16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    emulation::fail("an asynchronous copy needs addresses that are multiples of 16");
  }
  std::memset(to, 0xff, 16);  // NaN in every 16-bit float
  emulation::groups_of_thread().back().push_back({to, from, bytes});
}

inline void commit_copies() { emulation::groups_of_thread().emplace_back(); }

template <int kPending>
void wait_for_copies() {
  auto& groups = emulation::groups_of_thread();
  const int done = static_cast<int>(groups.size()) - 1 - kPending;
  if (done <= 0) return;
  for (int i = 0; i < done; ++i) {
    for (const auto& copy : groups[i]) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  groups.erase(groups.begin(), groups.begin() + done);
}

inline void load_matrices(uint32_t (&matrices)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) {
    emulation::fail("a row of a matrix must start at a multiple of 16 bytes");
  }
  const char* rows[emulation::kLanes];
  emulation::device.collect(static_cast<const char*>(row), rows);
  const unsigned lane = emulation::device.lane();
  for (int m = 0; m < 4; ++m) std::memcpy(&matrices[m], rows[8 * m + lane / 4] + lane % 4 * 4, 4);
  emulation::device.wait_for_warp();
}

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Pair {
    T values[2];
  };
  // By fragment register and lane.
  Pair all_a[4][emulation::kLanes], all_b[2][emulation::kLanes];
  for (int i = 0; i < 4; ++i) emulation::device.collect(std::bit_cast<Pair>(a[i]), all_a[i]);
  emulation::device.collect(std::bit_cast<Pair>(b0), all_b[0]);
  emulation::device.collect(std::bit_cast<Pair>(b1), all_b[1]);
  const unsigned lane = emulation::device.lane();
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const T from_a = all_a[row / 8 + k / 8 * 2][row % 8 * 4 + k % 8 / 2].values[k % 2];
      const T from_b = all_b[k / 8][column * 4 + k % 8 / 2].values[k % 2];
      sums[i] += static_cast<float>(from_a) * static_cast<float>(from_b);
    }
  }
}

}  // namespace unimoe
