// Counts how often the lanes of a warp meet in a bank of CUDA's shared memory.
//
// The n-th access of a lane is one instruction with the n-th of the others, where all have as many.
// An access of 4 bytes is made for 32 lanes at once, of 8 bytes for 16, of 16 for 8. There are 32 banks,
// 4 bytes wide; lanes that ask for the same word do not meet.
#pragma once
#include <algorithm>
#include <map>
#include <set>

extern "C" char __bss_start, _end;

namespace emulation {

struct Access { std::uintptr_t at; int bytes; };
inline std::vector<std::vector<Access>> accesses(1024);  // of each thread of the block

// Shared memory is static, all else is on the heap or a stack.
inline void note(const void* at, int bytes) {
  if (at < &__bss_start || at >= &_end) return;
  const uint3& p = runner().running->place.thread_position_in_threadgroup;
  const uint3& size = runner().running->place.threads_per_threadgroup;
  accesses[(p.z * size.y + p.y) * size.x + p.x].push_back({std::uintptr_t(at), bytes});
}

inline void count_meetings(int count) {
  for (int from = 0; from + SIMD <= count; from += SIMD) {
    const std::size_t all = accesses[from].size();
    bool same = true;
    for (int lane = 0; lane < SIMD; ++lane) same = same && accesses[from + lane].size() == all;
    for (std::size_t n = 0; same && n < all; ++n) {
      const int bytes = accesses[from][n].bytes, lanes = SIMD * 4 / bytes;
      for (int first = 0; first < SIMD; first += lanes) {
        std::map<int, std::set<std::uintptr_t>> words;
        for (int lane = first; lane < first + lanes; ++lane)
          for (std::uintptr_t at = accesses[from + lane][n].at / 4, k = 0; int(k) < bytes / 4; ++k)
            words[(at + k) % 32].insert(at + k);
        int& most = runner().most_in_a_bank;
        for (const auto& [bank, found] : words) most = std::max(most, int(found.size()));
      }
    }
  }
  for (auto& one : accesses) one.clear();
}

inline const bool counting = (runner().after_threadgroup = count_meetings, true);

}  // namespace emulation
