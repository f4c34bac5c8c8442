// The Metal names of the rotation kernel in OpenCL C++, whose address spaces are those of Metal.
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
typedef unsigned int uint;
typedef unsigned long size_t;
typedef int int32_t;
typedef float float4 __attribute__((ext_vector_type(4)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef half float16_t;
namespace metal {
enum class mem_flags { mem_threadgroup };
float fma(float, float, float);
float4 fma(float4, float4, float4);
void simdgroup_barrier(mem_flags);
}  // namespace metal
using namespace metal;
