// Functions in instructions that not every CPU of x86-64 has, and whether this compiler can make them.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define EDGEDISTILL_X86 1
#define EDGEDISTILL_BMI2 __attribute__((target("bmi,bmi2")))
#define EDGEDISTILL_AVX2 __attribute__((target("avx2")))
#define EDGEDISTILL_AVX512 __attribute__((target("avx512f,avx512bw")))
#else
#define EDGEDISTILL_X86 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define EDGEDISTILL_INLINE inline __attribute__((always_inline))
#else
#define EDGEDISTILL_INLINE inline
#endif
