// Cache of tensor maps by layout.
#include <mutex>
#include <unordered_map>

#include "sm90/tensor_map.h"

namespace unimoe::sm90 {
namespace {

// A model has a few hundred weights, each with one or two maps, and activations of a few sizes.
constexpr size_t kMostMaps = 4096;

struct Hash {
  size_t operator()(const TensorLayout& layout) const {
    uint64_t hash = reinterpret_cast<uintptr_t>(layout.data);
    const auto mix = [&](uint64_t value) {
      hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    };
    mix(static_cast<uint64_t>(layout.rank) << 33 | static_cast<uint64_t>(layout.device) << 1 |
        static_cast<uint64_t>(layout.half));
    for (const uint64_t size : layout.sizes) mix(size);
    for (const uint64_t stride : layout.strides) mix(stride);
    for (const uint32_t size : layout.box) mix(size);
    return static_cast<size_t>(hash);
  }
};

}  // namespace

TensorMap tensor_map(const TensorLayout& layout) {
  static std::mutex mutex;
  static std::unordered_map<TensorLayout, TensorMap, Hash> maps;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = maps.find(layout);
  if (found != maps.end()) return found->second;
  const TensorMap map = encode_tensor_map(layout);
  if (maps.size() >= kMostMaps) maps.clear();
  maps.emplace(layout, map);
  return map;
}

}  // namespace unimoe::sm90
