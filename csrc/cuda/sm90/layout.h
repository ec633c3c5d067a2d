// Tiles of the matmuls for compute capability 9.0, and the layout of their elements in shared
// memory and registers. Plain functions of integers, the same on the host and on the device.
//
// A block multiplies tiles of 128 rows and 256 columns, 64 deep: two warpgroups of 64 rows each
// multiply, a third one loads. On an H100 four stages of that hide the latency of the loads.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define UNIMOE_HOST_DEVICE __host__ __device__
#else
#define UNIMOE_HOST_DEVICE
#endif

// Whether this pass compiles for a target that has wgmma; kernels are empty in all others.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define UNIMOE_SM90A 1
#else
#define UNIMOE_SM90A 0
#endif

namespace unimoe::sm90 {

constexpr int kTileRows = 128;
constexpr int kTileColumns = 256;
constexpr int kTileDepth = 64;
constexpr int kStages = 4;
constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kConsumers = 2;
constexpr int kConsumerRows = kTileRows / kConsumers;
// Depth of one wgmma instruction.
constexpr int kStepDepth = 16;

constexpr int kElementBytes = 2;
constexpr int kVectorElements = 8;
constexpr int kVectorBytes = kVectorElements * kElementBytes;
// A block of shared memory under the 128-byte swizzle: rows of 128 bytes, which TMA fills and
// wgmma reads. Its address is a multiple of 1024.
constexpr int kBlockColumns = 64;
constexpr int kBlockRowBytes = kBlockColumns * kElementBytes;
constexpr int kBlockBytes = kTileDepth * kBlockRowBytes;

constexpr int kLeftBytes = kTileRows * kTileDepth * kElementBytes;
constexpr int kRightBytes = kTileColumns * kTileDepth * kElementBytes;
constexpr int kStageBytes = kLeftBytes + kRightBytes;
// Results of a consumer on their way to global memory: 64 rows of 128 columns.
constexpr int kStagedColumns = 128;
constexpr int kStagedRowBytes = kStagedColumns * kElementBytes;
constexpr int kStagingBytes = kConsumerRows * kStagedRowBytes;
// More experts are rejected: the table of their row tiles has a fixed size.
constexpr int kMostExperts = 512;

// Offsets of the parts of a block's shared memory.
constexpr int kStagingAt = kStages * kStageBytes;
constexpr int kBarriersAt = kStagingAt + kConsumers * kStagingBytes;
constexpr int kBarrierBytes = 8;
constexpr int kTableAt = kBarriersAt + 2 * kStages * kBarrierBytes;
constexpr int kUsedSharedBytes = kTableAt + (kMostExperts + 1) * static_cast<int>(sizeof(int));
// Maximum shared memory of a block on compute capability 9.0.
constexpr int kLargestSharedBytes = 227 * 1024;
static_assert(kUsedSharedBytes <= kLargestSharedBytes);

// Byte of the 16-byte vector `vector` of a row in rows of `row_bytes`: vectors of eight successive
// rows change places, so that reading a column of them meets every bank once.
UNIMOE_HOST_DEVICE constexpr int swizzled(int row, int vector, int row_bytes) {
  return row * row_bytes + ((vector ^ (row & 7)) * kVectorBytes);
}

// Describes an operand of wgmma in shared memory. Of an operand that lies along its depth
// `stride_bytes` is from 8 rows to the next 8 and `leading_bytes` is not used; of one that lies
// across, they are from 8 steps of depth to the next, and from one block of 64 to the next.
UNIMOE_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, int leading_bytes,
                                                 int stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | static_cast<uint64_t>(stride_bytes / kVectorBytes) << 32 |
         static_cast<uint64_t>(leading_bytes / kVectorBytes) << 16 | (address & 0x3ffff) >> 4;
}

constexpr int kEightRowsBytes = 8 * kBlockRowBytes;

// The operand whose rows are along the depth, `step` instructions deep.
UNIMOE_HOST_DEVICE constexpr uint64_t along_depth(uint32_t address, int step) {
  return descriptor(address + step * kStepDepth * kElementBytes, kVectorBytes, kEightRowsBytes);
}

// The operand whose rows are across the depth, in blocks of 64 columns.
UNIMOE_HOST_DEVICE constexpr uint64_t across_depth(uint32_t address, int step) {
  return descriptor(address + step * kStepDepth * kBlockRowBytes, kBlockBytes, kEightRowsBytes);
}

// The sums of a consumer, 64 rows by 256 columns, in registers: sum `4 * j + 2 * half + i` of a
// thread is at row `sum_row` and column `sum_column`.
UNIMOE_HOST_DEVICE constexpr int sum_row(int warp, int lane, int half) {
  return warp * 16 + lane / 4 + half * 8;
}
UNIMOE_HOST_DEVICE constexpr int sum_column(int j, int lane, int i) {
  return j * 8 + lane % 4 * 2 + i;
}

// Where a lane of `stmatrix.x4` points: of the four 8x8 matrices that it writes, lanes 0-7 point to
// the rows of the first, lanes 8-15 to those of the second. Matrices are (columns j, rows 0-7),
// (columns j, rows 8-15), (columns j + 1, rows 0-7), (columns j + 1, rows 8-15).
UNIMOE_HOST_DEVICE constexpr int stored_row(int warp, int lane) { return warp * 16 + lane % 16; }
UNIMOE_HOST_DEVICE constexpr int stored_vector(int j, int lane) { return j + lane / 16; }

}  // namespace unimoe::sm90
