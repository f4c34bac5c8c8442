// Runs every thread of every threadgroup of a launch, with barriers, in an order that varies.
//
// Each thread has its own stack and runs until its next barrier. A SIMD group of 32 goes on when all
// its lanes have reached one barrier; if one ended or stands at another line, the program stops
// with a message. SIMD groups of a threadgroup take turns, a phase each; in order 1 each goes as far as
// it can alone. Buffers end at a page that cannot be touched, and an output starts as 0xff, which is no
// number in any dtype.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

namespace emulation {

[[noreturn]] inline void stop(const char* why, int line = 0) {
  std::fprintf(stderr, "emulation: %s (line %d)\n", why, line);
  std::exit(3);
}

struct Thread {
  uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
  uint3 threads_per_grid, threads_per_threadgroup, threadgroups_per_grid;
  uint thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
};
typedef std::vector<char*> Buffers;
typedef void (*Kernel)(const Buffers&, const Thread&);
extern const Kernel kernels[];

constexpr int SIMD = 32;
constexpr std::size_t STACK = 128 << 10;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  Thread place;
  bool done;
  int simd_barrier, group_barrier;  // the line of the barrier where it waits, or 0
};

struct Runner {
  Kernel kernel;
  const Buffers* buffers;
  ucontext_t scheduler;
  Fiber* running;
  std::vector<Fiber> fibers;
  void (*after_threadgroup)(int count) = nullptr;
  int most_in_a_bank = 0;  // see emulated_banks.h
};
inline Runner& runner() {
  static Runner one;
  return one;
}

inline void enter() {
  Runner& r = runner();
  r.kernel(*r.buffers, r.running->place);
  r.running->done = true;
}

inline void wait(int Fiber::* barrier, int line) {
  Runner& r = runner();
  Fiber* self = r.running;
  self->*barrier = line;
  swapcontext(&self->context, &r.scheduler);
}

// 0, 1, ... upwards for order 0, downwards for 1, else shuffled.
inline std::vector<int> order_of(int count, int order, std::uint32_t& random) {
  std::vector<int> all(count);
  for (int n = 0; n < count; ++n) all[n] = order == 1 ? count - 1 - n : n;
  for (int n = count - 1; order > 1 && n > 0; --n) {
    random = random * 1664525u + 1013904223u;  // Numerical Recipes
    std::swap(all[n], all[(random >> 8) % (n + 1)]);
  }
  return all;
}

inline int line_of_all(const std::vector<Fiber>& fibers, int from, int to, int Fiber::* barrier) {
  for (int n = from; n < to; ++n)
    if (fibers[n].done || fibers[n].*barrier != fibers[from].*barrier) return 0;
  return fibers[from].*barrier;
}

// One SIMD group runs until all its lanes stand at a barrier or have ended.
inline void run_phase(int from, int to, int order, std::uint32_t& random) {
  Runner& r = runner();
  for (int lane : order_of(to - from, order, random)) {
    r.running = &r.fibers[from + lane];
    if (!r.running->done) swapcontext(&r.scheduler, &r.running->context);
  }
  bool done = true;
  for (int n = from; n < to; ++n) done = done && r.fibers[n].done;
  if (done || line_of_all(r.fibers, from, to, &Fiber::group_barrier)) return;
  const int line = line_of_all(r.fibers, from, to, &Fiber::simd_barrier);
  if (!line) stop("lanes of a SIMD group are not at one barrier", r.fibers[from].simd_barrier);
  for (int n = from; n < to; ++n) r.fibers[n].simd_barrier = 0;
}

inline void run_threadgroup(int count, int order, std::uint32_t& random) {
  Runner& r = runner();
  const int simd_groups = (count + SIMD - 1) / SIMD;
  for (;;) {
    bool left = false, moved = false;
    for (int group : order_of(simd_groups, order, random)) {
      const int from = group * SIMD, to = count < from + SIMD ? count : from + SIMD;
      if (r.fibers[from].done) continue;
      left = true;
      if (r.fibers[from].group_barrier) continue;
      do run_phase(from, to, order, random);
      while (order == 1 && !r.fibers[from].done && !r.fibers[from].group_barrier);
      moved = true;
    }
    if (!left) return;
    if (moved) continue;
    if (!line_of_all(r.fibers, 0, count, &Fiber::group_barrier))
      stop("threads of a threadgroup are not at one barrier");
    for (int n = 0; n < count; ++n) r.fibers[n].group_barrier = 0;
  }
}

inline void prepare(Fiber& fiber, int index, uint3 group, uint3 size, uint3 grid) {
  Thread& t = fiber.place;
  t.threads_per_grid = grid;
  t.threads_per_threadgroup = size;
  t.threadgroup_position_in_grid = group;
  t.threadgroups_per_grid = {grid.x / size.x, grid.y / size.y, grid.z / size.z};
  t.thread_position_in_threadgroup = {index % size.x, index / size.x % size.y, index / size.x / size.y};
  const uint3& p = t.thread_position_in_threadgroup;
  t.thread_position_in_grid = {group.x * size.x + p.x, group.y * size.y + p.y, group.z * size.z + p.z};
  t.thread_index_in_simdgroup = index % SIMD;
  t.simdgroup_index_in_threadgroup = index / SIMD;
  fiber.done = false;
  fiber.simd_barrier = fiber.group_barrier = 0;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = &runner().scheduler;
  makecontext(&fiber.context, enter, 0);
}

inline void run_grid(Kernel kernel, const Buffers& buffers, uint3 grid, uint3 size, int order) {
  Runner& r = runner();
  r.kernel = kernel;
  r.buffers = &buffers;
  if (grid.x % size.x || grid.y % size.y || grid.z % size.z) stop("a threadgroup is not full");
  const int count = size.x * size.y * size.z;
  if (count > 1024) stop("a threadgroup has over 1,024 threads");
  if (int(r.fibers.size()) < count) r.fibers.resize(count);
  const uint3 groups = {grid.x / size.x, grid.y / size.y, grid.z / size.z};
  std::uint32_t random = order;
  for (int n : order_of(groups.x * groups.y * groups.z, order, random)) {
    const uint3 group = {n % groups.x, n / groups.x % groups.y, n / groups.x / groups.y};
    for (int t = 0; t < count; ++t) prepare(r.fibers[t], t, group, size, grid);
    run_threadgroup(count, order, random);
    if (r.after_threadgroup) r.after_threadgroup(count);
  }
}

// Bytes that end where a page begins that cannot be touched.
inline char* guarded(std::size_t bytes) {
  const std::size_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
  void* start = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + whole, page, PROT_NONE)) stop("no memory");
  return static_cast<char*>(start) + whole - bytes;
}

inline bool read_all(void* to, std::size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

// Launches from stdin: 10 numbers, the size of every buffer, then all but the last one, the output.
// The last number: how many bytes follow the first buffer, so that it begins elsewhere.
inline int serve() {
  for (std::uint32_t head[10]; read_all(head, sizeof head);) {
    const std::uint32_t count = head[8];
    std::vector<std::uint32_t> sizes(count);
    Buffers buffers(count);
    if (!read_all(sizes.data(), 4 * count)) stop("the request is cut short");
    for (std::uint32_t n = 0; n < count; ++n) {
      buffers[n] = guarded(sizes[n] + (n ? 0 : head[9]));
      if (n + 1 < count && !read_all(buffers[n], sizes[n])) stop("the request is cut short");
    }
    std::memset(buffers[count - 1], 0xff, sizes[count - 1]);
    run_grid(kernels[head[0]], buffers, {head[2], head[3], head[4]}, {head[5], head[6], head[7]}, head[1]);
    std::fwrite(buffers[count - 1], 1, sizes[count - 1], stdout);
    for (std::uint32_t n = 0; n < count; ++n) {
      const std::size_t page = sysconf(_SC_PAGESIZE);
      const std::size_t bytes = sizes[n] + (n ? 0 : head[9]), whole = (bytes + page - 1) / page * page;
      munmap(buffers[n] + bytes - whole, whole + page);
    }
  }
  std::fprintf(stderr, "%d", runner().most_in_a_bank);
  return 0;
}

}  // namespace emulation

namespace metal {
inline void simdgroup_barrier(mem_flags, int line) { emulation::wait(&emulation::Fiber::simd_barrier, line); }
inline void threadgroup_barrier(mem_flags, int line) { emulation::wait(&emulation::Fiber::group_barrier, line); }
}  // namespace metal
