// CUDA C++ on the CPU, for tests: with this header a .cu file compiles as C++20 and runs with one fiber a CUDA thread.
//
// Use. Sources include "neuraldeps/device.hpp" in place of <cuda_runtime.h> and launch with ND_LAUNCH.
//   g++ -std=c++20 -x c++ -Icsrc/emu -Icsrc/include -fPIC -shared csrc/cuda/*.cu          (tests/emulation.py does it)
// <cuda_fp16.h>, <cuda_bf16.h> and <cuda_pipeline.h> of this folder stand in for those of the toolkit.
//   ND_EMU_ORDER=forward|reverse|random[:seed]    order of the threads of a block and of the blocks of a launch
//   ND_EMU_DEVICE=sm_80|sm_90|sm_100|sm_120       device whose limits are reported and enforced (default sm_90)
// Both are read at each launch. With -fsanitize=address,undefined or -fsanitize=thread more faults are found.
//
// Modelled: threads, warps, blocks; barriers, shuffles, votes, matches, warp reductions with their masks; static and
// dynamic shared memory; atomics; asynchronous copies to shared memory; vector types, half and bfloat16; limits of
// launches and of shared memory with the error codes of CUDA; device memory (fresh memory and dynamic shared memory
// hold NaN patterns, and writes past the end of the latter are found). A misused collective, a barrier that part of a
// block never reaches, a trap: a report on stderr thread by thread, and the launch returns cudaErrorLaunchFailure.
// Unlike on a device the error comes at once and does not stick.
//
// Not modelled: __activemask and code that relies on lanes running in step; threads that wait by spinning; blocks that
// wait for each other (blocks run one after another); the weak memory order; races between blocks, other than through
// results that depend on the order; tensor cores, bulk copies, clusters, cooperative groups, textures; streams (all
// work is synchronous); a host pointer given to a kernel; registers, __launch_bounds__ and the size of static shared
// memory (held against limits by nvcc); contraction of a * b + c; fast-math accuracy. Static shared memory
// keeps what the block before left in it.
#pragma once
#include "nd_emu_device.hpp"
#include "nd_emu_host.hpp"
#include "nd_emu_threads.hpp"
