// Element-wise operations over strided views: out[i] = OP(a[i], b[i], c[i]; s0, s1).
//
// Definitions: OP (a struct below), ARITY (0 to 3 inputs), TYPE_O, TYPE_A, TYPE_B, TYPE_C (element types of output and
// inputs; those beyond ARITY are ignored). Booleans are u8 holding 0 or 1. Scalars arrive as 8 bytes: a double for float types, an i64 (or
// the bits of a u64) for integers. Arithmetic in Compute<A>.
//
// `contiguous`: all operands packed and aligned; a thread moves 16-byte packs. `strided32`, `strided64`: any views, the
// index type by element count; a thread owns one element per step. The output may be one of the inputs.
// Launcher: src/elementwise.rs.
#include "common.cuh"

typedef TYPE_O O;
typedef TYPE_A A;
typedef TYPE_B B;
typedef TYPE_C C;

template <typename C> struct ScalarOf { static __device__ C from(u64 bits) { return (C)(i64)bits; } };
template <> struct ScalarOf<u64> { static __device__ u64 from(u64 bits) { return bits; } };
template <> struct ScalarOf<double> { static __device__ double from(u64 bits) { return __longlong_as_double((i64)bits); } };
template <> struct ScalarOf<float> { static __device__ float from(u64 bits) { return (float)__longlong_as_double((i64)bits); } };

// Functions of the C library exist for float and double under different names; these pick by type. Integers never call
// them.
#define BY_TYPE(name)                                                                     \
    __device__ __forceinline__ float m_##name(float x) { return name##f(x); }             \
    __device__ __forceinline__ double m_##name(double x) { return name(x); }
BY_TYPE(exp) BY_TYPE(log) BY_TYPE(log1p) BY_TYPE(sqrt) BY_TYPE(sin) BY_TYPE(cos) BY_TYPE(tan) BY_TYPE(sinh) BY_TYPE(cosh)
BY_TYPE(tanh) BY_TYPE(asin) BY_TYPE(acos) BY_TYPE(atan) BY_TYPE(asinh) BY_TYPE(acosh) BY_TYPE(atanh) BY_TYPE(erf)
BY_TYPE(floor) BY_TYPE(ceil) BY_TYPE(trunc) BY_TYPE(rint) BY_TYPE(fabs)
__device__ __forceinline__ float m_pow(float a, float b) { return powf(a, b); }
__device__ __forceinline__ double m_pow(double a, double b) { return pow(a, b); }
__device__ __forceinline__ float m_atan2(float a, float b) { return atan2f(a, b); }
__device__ __forceinline__ double m_atan2(double a, double b) { return atan2(a, b); }
__device__ __forceinline__ float m_fmod(float a, float b) { return fmodf(a, b); }
__device__ __forceinline__ double m_fmod(double a, double b) { return fmod(a, b); }

template <typename T> __device__ __forceinline__ T remainder_of(T a, T b) { T r = a % b; return r != 0 && ((r < 0) != (b < 0)) ? r + b : r; }
template <> __device__ __forceinline__ float remainder_of(float a, float b) { float r = m_fmod(a, b); return r != 0 && ((r < 0) != (b < 0)) ? r + b : r; }
template <> __device__ __forceinline__ double remainder_of(double a, double b) { double r = m_fmod(a, b); return r != 0 && ((r < 0) != (b < 0)) ? r + b : r; }
template <typename T> __device__ __forceinline__ T power(T a, T b) { return (T)pow((double)a, (double)b); }
template <> __device__ __forceinline__ float power(float a, float b) { return m_pow(a, b); }
template <> __device__ __forceinline__ i64 power(i64 a, i64 b) {
    if (b < 0) return a == 1 ? 1 : a == -1 ? (b % 2 ? -1 : 1) : 0;
    i64 result = 1;
    for (; b > 0; b /= 2, a *= a) if (b % 2) result *= a;
    return result;
}
template <> __device__ __forceinline__ i32 power(i32 a, i32 b) { return (i32)power<i64>(a, b); }

// All operations have one signature; X is Compute<A>, Y is Compute<B>, Z is Compute<C>.
#define OPERATION(name, expression)                                                                              \
    struct name {                                                                                                \
        template <typename X, typename Y, typename Z>                                                            \
        static __device__ __forceinline__ auto of(X a, Y b, Z c, X s0, X s1) { return expression; }              \
    };

OPERATION(Fill, s0)
OPERATION(Copy, a)
OPERATION(IsTrue, a != (X)0)
OPERATION(Negate, -a)
OPERATION(Recip, (X)1 / a)
OPERATION(Exp, m_exp(a))
OPERATION(Log, m_log(a))
OPERATION(Log1p, m_log1p(a))
OPERATION(Sqrt, m_sqrt(a))
OPERATION(Abs, a < (X)0 ? -a : a)
OPERATION(FloatAbs, m_fabs(a))
OPERATION(Sin, m_sin(a))
OPERATION(Cos, m_cos(a))
OPERATION(Tan, m_tan(a))
OPERATION(Sinh, m_sinh(a))
OPERATION(Cosh, m_cosh(a))
OPERATION(Tanh, m_tanh(a))
OPERATION(Asin, m_asin(a))
OPERATION(Acos, m_acos(a))
OPERATION(Atan, m_atan(a))
OPERATION(Asinh, m_asinh(a))
OPERATION(Acosh, m_acosh(a))
OPERATION(Atanh, m_atanh(a))
OPERATION(Erf, m_erf(a))
OPERATION(Round, m_rint(a))
OPERATION(Floor, m_floor(a))
OPERATION(Ceil, m_ceil(a))
OPERATION(Trunc, m_trunc(a))
OPERATION(Sign, (X)((a > (X)0) - (a < (X)0)))
OPERATION(IsNan, a != a)
OPERATION(IsInf, m_fabs(a) == (X)infinity())
OPERATION(BitNot, ~a)
OPERATION(BoolNot, (u8)(a == 0))
OPERATION(Relu, a > (X)0 ? a : (X)0)
OPERATION(Sigmoid, (X)1 / ((X)1 + m_exp(-a)))
OPERATION(LogSigmoid, a < (X)0 ? a - m_log1p(m_exp(a)) : -m_log1p(m_exp(-a)))
OPERATION(Gelu, a * (X)0.5 * ((X)1 + m_erf(a * (X)0.70710678118654752440)))
OPERATION(Silu, a / ((X)1 + m_exp(-a)))
OPERATION(Clamp, a < s0 ? s0 : a > s1 ? s1 : a)
OPERATION(ClampMin, a < s0 ? s0 : a)
OPERATION(ClampMax, a > s0 ? s0 : a)

OPERATION(AddScalar, a + s0)
OPERATION(SubScalar, a - s0)
OPERATION(MulScalar, a * s0)
OPERATION(DivScalar, a / s0)
OPERATION(RemScalar, remainder_of<X>(a, s0))
OPERATION(PowScalar, power<X>(a, s0))
OPERATION(AndScalar, a & s0)
OPERATION(OrScalar, a | s0)
OPERATION(XorScalar, a ^ s0)
OPERATION(ShlScalar, a << s0)
OPERATION(ShrScalar, a >> s0)
OPERATION(EqualScalar, a == s0)
OPERATION(NotEqualScalar, a != s0)
OPERATION(GreaterScalar, a > s0)
OPERATION(GreaterEqualScalar, a >= s0)
OPERATION(LowerScalar, a < s0)
OPERATION(LowerEqualScalar, a <= s0)

OPERATION(AddTensor, a + b)
OPERATION(SubTensor, a - b)
OPERATION(MulTensor, a * b)
OPERATION(DivTensor, a / b)
OPERATION(RemTensor, remainder_of<X>(a, (X)b))
OPERATION(PowTensor, power<X>(a, (X)b))
OPERATION(Atan2, m_atan2(a, b))
OPERATION(AndTensor, a & b)
OPERATION(OrTensor, a | b)
OPERATION(XorTensor, a ^ b)
OPERATION(ShlTensor, a << b)
OPERATION(ShrTensor, a >> b)
OPERATION(EqualTensor, a == b)
OPERATION(NotEqualTensor, a != b)
OPERATION(GreaterTensor, a > b)
OPERATION(GreaterEqualTensor, a >= b)
OPERATION(LowerTensor, a < b)
OPERATION(LowerEqualTensor, a <= b)
OPERATION(MaskFill, b != (Y)0 ? s0 : a)
OPERATION(MaskWhere, b != (Y)0 ? (X)c : a)

template <typename I> __device__ __forceinline__ void strided(O* out, const A* a, const B* b, const C* c, const Views& views, u64 s0, u64 s1, I count) {
    typedef Compute<A> X;
    typedef Compute<B> Y;
    typedef Compute<C> Z;
    X x0 = ScalarOf<X>::from(s0), x1 = ScalarOf<X>::from(s1);
    I step = (I)gridDim.x * blockDim.x;
    for (I i = (I)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        i64 at[ARITY + 1];
        offsets<ARITY + 1, I>(views, i, at);
        X x = ARITY > 0 ? load(a[at[ARITY > 0 ? 1 : 0]]) : X();
        Y y = ARITY > 1 ? load(b[at[ARITY > 1 ? 2 : 0]]) : Y();
        Z z = ARITY > 2 ? load(c[at[ARITY > 2 ? 3 : 0]]) : Z();
        out[at[0]] = store<O>(OP::of(x, y, z, x0, x1));
    }
}

extern "C" __global__ void strided32(O* out, const A* a, const B* b, const C* c, Views views, u64 s0, u64 s1, i64 count) {
    strided<u32>(out, a, b, c, views, s0, s1, (u32)count);
}

extern "C" __global__ void strided64(O* out, const A* a, const B* b, const C* c, Views views, u64 s0, u64 s1, i64 count) {
    strided<u64>(out, a, b, c, views, s0, s1, (u64)count);
}

// Elements in a pack: the widest operand fills 16 bytes.
__device__ constexpr int larger(int x, int y) { return x > y ? x : y; }
constexpr int WIDEST = larger(sizeof(O), larger(ARITY > 0 ? sizeof(A) : 1, larger(ARITY > 1 ? sizeof(B) : 1, ARITY > 2 ? sizeof(C) : 1)));
constexpr int VECTOR = 16 / WIDEST;

extern "C" __global__ void contiguous(O* out, const A* a, const B* b, const C* c, u64 s0, u64 s1, i64 count) {
    typedef Compute<A> X;
    typedef Compute<B> Y;
    typedef Compute<C> Z;
    X x0 = ScalarOf<X>::from(s0), x1 = ScalarOf<X>::from(s1);
    i64 packs = count / VECTOR;
    i64 thread = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 p = thread; p < packs; p += step) {
        Pack<A, VECTOR> x = {};
        Pack<B, VECTOR> y = {};
        Pack<C, VECTOR> z = {};
        if (ARITY > 0) x = load_pack<A, VECTOR>(a + p * VECTOR);
        if (ARITY > 1) y = load_pack<B, VECTOR>(b + p * VECTOR);
        if (ARITY > 2) z = load_pack<C, VECTOR>(c + p * VECTOR);
        Pack<O, VECTOR> o;
        #pragma unroll
        for (int k = 0; k < VECTOR; k++) o.at[k] = store<O>(OP::of((X)load(x.at[k]), (Y)load(y.at[k]), (Z)load(z.at[k]), x0, x1));
        store_pack(out + p * VECTOR, o);
    }
    for (i64 i = packs * VECTOR + thread; i < count; i += step) {
        X x = ARITY > 0 ? load(a[i]) : X();
        Y y = ARITY > 1 ? load(b[i]) : Y();
        Z z = ARITY > 2 ? load(c[i]) : Z();
        out[i] = store<O>(OP::of(x, y, z, x0, x1));
    }
}
