// Every row tile, column tile and part of the sum of every expert with rows is some block's work
// exactly once, for random offsets and sizes. Prints what is wrong and returns 1, or the number of
// cases.
#include "few_rows_schedule.cuh"

#include <cstdio>
#include <map>
#include <tuple>

namespace {

using namespace unimoe;

std::mt19937 generator{7};

int draw(int from, int to) { return std::uniform_int_distribution<int>(from, to)(generator); }

template <typename... Words>
bool complain(const Words&... words) {
  std::puts(join_words(words...).c_str());
  return false;
}

std::vector<int> draw_offsets(int experts) {
  static constexpr int kCounts[] = {1, 2, 15, 16, 17, 31, 32, 33, 200};
  std::vector<int> offsets{0};
  const int empty = draw(0, 10);  // of ten experts
  for (int e = 0; e < experts; ++e) {
    offsets.push_back(offsets.back() + (draw(0, 9) < empty ? 0 : kCounts[draw(0, 8)]));
  }
  return offsets;
}

// Every element of the sum belongs to one step of one warp, and no part is without any.
bool steps_are_complete(const FewRowsSchedule& schedule) {
  std::vector<int> seen(ceil_div(schedule.inner, kStepElements));
  for (int part = 0; part < schedule.parts; ++part) {
    bool any = false;
    for (int round = 0; round < schedule.rounds; ++round) {
      for (int warp = 0; warp < kSumWarps; ++warp) {
        const int k = schedule.step_start(part, round, warp);
        if (k >= schedule.inner) continue;
        if (k % kStepElements) return complain("step at ", k);
        ++seen[k / kStepElements];
        any = true;
      }
    }
    if (!any && schedule.inner > 0) return complain("part ", part, " has no step");
  }
  for (const int count : seen) {
    if (count != 1) return complain("a step is taken ", count, " times");
  }
  return true;
}

using Key = std::tuple<int, int, int, int>;  // expert, row tile, column tile, part

bool work_is_complete(const FewRowsSchedule& schedule, const std::vector<int>& offsets,
                      unsigned blocks, int64_t most_items) {
  std::map<Key, int> seen;
  int64_t items = -1;
  bool right = true;
  const auto walk = [&] {
    const RowTiles tiles = count_row_tiles(schedule, offsets.data());
    items = static_cast<int64_t>(tiles.total) * schedule.items_of_row_tile();
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const Work work = find_work(schedule, tiles, offsets.data(), item);
      const int in_expert = work.first_row - offsets[work.expert];
      const int left = offsets[work.expert + 1] - work.first_row;
      if (in_expert % schedule.tile_rows || work.rows != std::min(left, schedule.tile_rows) ||
          work.rows < 1 || work.column % schedule.tile_width) {
        right = complain("row ", work.first_row, " of expert ", work.expert);
      }
      // All lanes find the same.
      ++seen[{work.expert, in_expert / schedule.tile_rows, work.column / schedule.tile_width,
              work.part}];
    }
  };
  emulation::device.run(dim3(blocks), dim3(kWarp), 0, walk);
  if (items > most_items) return complain(items, " items, at most ", most_items, " expected");
  size_t expected = 0;
  for (int e = 0; e < schedule.experts; ++e) {
    for (int tile = 0; tile < schedule.row_tiles(offsets[e + 1] - offsets[e]); ++tile) {
      for (int column = 0; column < schedule.columns; ++column) {
        for (int part = 0; part < schedule.parts; ++part, ++expected) {
          if (seen[{e, tile, column, part}] != kWarp) {
            return complain("row tile ", tile, " of expert ", e, ", column tile ", column,
                            ", part ", part, ": ", seen[{e, tile, column, part}], " lanes");
          }
        }
      }
    }
  }
  if (seen.size() != expected) return complain(seen.size(), " items, ", expected, " expected");
  return right;
}

bool case_is_right(bool many_experts) {
  static constexpr int kExperts[] = {1, 2, 5, 31, 32, 33, 64, 65, 128, 300};
  static constexpr int kInner[] = {0, 8, 64, 248, 256, 264, 768, 2048, 14336};
  static constexpr int kWidths[] = {1, 15, 16, 17, 33, 96};
  const int experts = kExperts[draw(0, many_experts ? 9 : 2)];
  const auto offsets = draw_offsets(experts);
  const int64_t rows = offsets.back() + draw(0, 20);  // some of no expert
  if (rows == 0) return true;
  const auto schedule = few_rows_schedule(rows, experts, kWidths[draw(0, many_experts ? 2 : 5)],
                                          kInner[draw(0, 8)], draw(0, 1), draw(1, 200));
  const int64_t most =
      most_row_tiles(rows, experts, schedule.tile_rows) * schedule.items_of_row_tile();
  return steps_are_complete(schedule) &&
         work_is_complete(schedule, offsets, static_cast<unsigned>(draw(1, 9)), most);
}

}  // namespace

int main() {
  constexpr int kCases = 400;
  for (int i = 0; i < kCases; ++i) {
    if (!case_is_right(i % 2)) return 1;
  }
  std::printf("%d cases\n", kCases);
}
