// Stands for the names of CUDA that the rotation kernels use, so that g++ compiles them.
//
// Tests let MLX write its Metal wrapper around the body of a CUDA kernel: pointers and constants have
// the same names in both. Threads, blocks and barriers are those of emulated_threads.h.
#define threadIdx (emulation::runner().running->place.thread_position_in_threadgroup)
#define blockIdx (emulation::runner().running->place.threadgroup_position_in_grid)
#define blockDim (emulation::runner().running->place.threads_per_threadgroup)
#define gridDim (emulation::runner().running->place.threadgroups_per_grid)
#define __shared__ static
#define __syncwarp() simdgroup_barrier(mem_flags::mem_threadgroup)
#define __syncthreads() threadgroup_barrier(mem_flags::mem_threadgroup)
#define __fmaf_rn(a, b, c) std::fma(float(a), float(b), float(c))
#define __fmul_rn(a, b) (float(a) * float(b))

template <typename T, int N>
struct alignas(N * sizeof(T)) AlignedVector {
  T at[N];
  AlignedVector() = default;
  AlignedVector(const AlignedVector& other) { *this = other; }
  AlignedVector& operator=(const AlignedVector& other) {
    emulation::note(other.at, sizeof at);
    emulation::note(at, sizeof at);
    for (int n = 0; n < N; ++n) at[n] = other.at[n];
    return *this;
  }
  T& operator[](int n) {
    emulation::note(at + n, sizeof(T));
    return at[n];
  }
  T operator[](int n) const {
    emulation::note(at + n, sizeof(T));
    return at[n];
  }
};

template <int N, typename T>
inline bool is_aligned(const T* x) {
  return reinterpret_cast<std::uintptr_t>(x) % (N * sizeof(T)) == 0;
}
