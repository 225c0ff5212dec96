// Instructions of sm_80 and later that have no name in C++: copies that go on by themselves, and products of 16-bit matrices in a warp's
// registers. tests/cuda_emulator/mma.h does the same on the CPU.
#pragma once
#include "device.h"

#ifdef ISDAA_EMULATED
#include "../cuda_emulator/mma.h"
#else

namespace isdaa {

__device__ __forceinline__ unsigned shared_address(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

// x, of which the compiler does not know that it has made the same before and might have kept it.
__device__ __forceinline__ int computed_anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// from + row * stride bytes, in one instruction.
template <class T>
__device__ __forceinline__ T* row_address(T* from, int row, int stride) {
  T* address;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride), "l"(from));
  return address;
}

// 16 bytes into shared memory, or zeros: `global` is then not looked at. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool zeros) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(zeros ? 0 : 16)
               : "memory");
}

// The thread's copies since the last call become one group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than the kNewest last of the thread's groups are under way.
template <int kNewest>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Four matrices of 8 x 8 numbers, lane l giving the address of row l % 8 of matrix l / 8. Of each, lane l gets the numbers 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4, or, transposed, of column l / 4.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const unsigned address = shared_address(row);
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// sum [16, 8] += a [16, 16] @ b [16, 8]; g = lane / 4, t = 2 (lane % 4). a: rows g, g + 8, g, g + 8 of columns t, t, t + 8, t + 8 and their
// right neighbours; b: rows t and t + 8 and those below, of column g; sum: rows g, g, g + 8, g + 8 of columns t, t + 1, t, t + 1.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_add<half>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace isdaa
#endif
