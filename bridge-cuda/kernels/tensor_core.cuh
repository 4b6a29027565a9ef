// Tensor cores and what feeds them: matrix products of a warp, matrices from shared memory to registers, copies from global
// to shared memory that a block does not wait for. One instruction each, for 16-bit floats. PTX ISA, "Warp-level matrix
// instructions" and "Data movement".
#pragma once
#include "common.cuh"

// c (16 x 8, float) += a (16 x 16) b (16 x 8). With g = lane / 4 and i = lane % 4:
// c[0], c[1]: row g, columns 2i, 2i + 1; c[2], c[3]: row g + 8.
// a[0]: row g, columns 2i, 2i + 1; a[1]: row g + 8; a[2]: row g, columns 2i + 8, 2i + 9; a[3]: row g + 8, the same.
// b0: rows 2i, 2i + 1 of column g; b1: rows 2i + 8, 2i + 9.
template <typename T> struct Mma;
template <> struct Mma<bf16> {
    static __device__ __forceinline__ void run(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};
template <> struct Mma<f16> {
    static __device__ __forceinline__ void run(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Four 8 x 8 matrices of 16-bit values. Lanes 8i to 8i + 7 point to the rows (16 bytes, aligned) of matrix i; lane l gets
// from matrix i, in r[i], columns 2(l % 4) and 2(l % 4) + 1 of row l / 4.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
// The same with each matrix transposed: lane l gets rows 2(l % 4) and 2(l % 4) + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

// Starts the copy of 16 bytes, aligned on both sides; zeros arrive where `inside` is false, and `from` is not read.
__device__ __forceinline__ void copy_async(void* shared, const void* from, bool inside) {
    int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(shared_address(shared)), "l"(from), "r"(bytes));
}
// Closes the group of the copies that this thread has started.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
// Waits until at most the latest N groups of this thread are under way. Other threads' copies need a barrier after it.
template <int N> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" :: "n"(N)); }

// Lanes 4g to 4g + 3 each hold one column of a 4 x 4 matrix; afterwards each holds one row of it. So the rows of products
// (`Mma`), of which a lane has two neighbouring values in every 8 columns, can be written in pieces of 16 bytes.
__device__ __forceinline__ void transpose_quad(u32 (&x)[4]) {
    bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    u32 from_0 = __shfl_xor_sync(FULL_MASK, odd ? x[0] : x[1], 1), from_2 = __shfl_xor_sync(FULL_MASK, odd ? x[2] : x[3], 1);
    u32 a = odd ? from_0 : x[0], b = odd ? x[1] : from_0, c = odd ? from_2 : x[2], d = odd ? x[3] : from_2;
    u32 first = __shfl_xor_sync(FULL_MASK, upper ? a : c, 2), second = __shfl_xor_sync(FULL_MASK, upper ? b : d, 2);
    x[0] = upper ? first : a;
    x[1] = upper ? second : b;
    x[2] = upper ? c : first;
    x[3] = upper ? d : second;
}
