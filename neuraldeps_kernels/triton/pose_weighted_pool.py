# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs
"""Pooling of features F [N, C, S] by maps H [N, K, S] on CUDA, and its backward; S positions.

    pooled_kc = sum_s F_cs H_ks / D_k,   D_k = sum_s H_ks + eps
    A_kc = G_kc / D_k,   dF_cs = sum_k A_kc H_ks,   P_ks = sum_c A_kc F_cs,   dH_k = P_k - sum_s(H_ks P_ks) / D_k

The functions have the names and arguments of the operators of `ops/pose_weighted_pool.py`.

Floor, bytes an element of F of s bytes: s forward; backward s for dF, 2 s with dH. Flops: three TF32 products (tf32x3:
errors as in float32) of each of F's values with 16 or 32 maps, on tensor cores below the time of the memory.

Layout: a program owns a sample and BLOCK_C channels, walks along the positions BLOCK_S at a time, and keeps all maps,
padded to 16 or 32, beside it. With groups the other maps of a channel are masked out of the result, or
of its gradient. P is left as one partial table a program, which are added in order: no atomics. Contiguous and
channels-last features are read as they are. Limits: float32, bfloat16, float16; at most 32 maps; C S below 2^31.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neuraldeps_kernels.ops.layouts import dense, is_channels_last, result_like


@triton.jit
def group_of(c, C, K):
    """Of channels c: C // K of them in a group, the last takes the rest."""
    return tl.minimum(c // (C // K), K - 1)


@triton.jit
def pool_kernel(
    features_ptr,  # [N, C, S], strides C S, channel, position
    maps_ptr,  # [N, K, S] float32
    pooled_ptr,  # [N, K, C], or with GROUPS [N, C]
    C,
    S,
    K,
    channel,
    position,
    eps,
    GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = n * K * S + k[:, None] * S + s[None, :]
        maps = tl.load(maps_ptr + at, mask=(k[:, None] < K) & (s[None, :] < S), other=0.0)
        at = n * C * S + s[:, None] * position + c[None, :] * channel
        features = tl.load(features_ptr + at, mask=(s[:, None] < S) & (c[None, :] < C), other=0.0)
        total = tl.dot(maps, features.to(tl.float32), total, input_precision="tf32x3")
        weight += tl.sum(maps, 1)
    pooled = total / (weight + eps)[:, None]
    if GROUPS:
        own = k[:, None] == group_of(c, C, K)[None, :]
        tl.store(pooled_ptr + n * C + c, tl.sum(tl.where(own, pooled, 0.0), 0), mask=c < C)
    else:
        at = (n * K + k[:, None]) * C + c[None, :]
        tl.store(pooled_ptr + at, pooled, mask=(k[:, None] < K) & (c[None, :] < C))


@triton.jit
def gradient_kernel(
    grad_ptr,  # as pooled_ptr
    features_ptr,
    maps_ptr,
    divisor_ptr,  # D [N, K] float32
    dfeatures_ptr,  # as features_ptr
    partial_ptr,  # P of every program [N, blocks of channels, K, S] float32
    C,
    S,
    K,
    channel,
    position,
    GROUPS: tl.constexpr,
    FEATURES: tl.constexpr,
    MAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    inside = (k[:, None] < K) & (c[None, :] < C)
    if GROUPS:
        inside = inside & (k[:, None] == group_of(c, C, K)[None, :])
        of_grad = n * C + c[None, :] + 0 * k[:, None]
    else:
        of_grad = (n * K + k[:, None]) * C + c[None, :]
    divisor = tl.load(divisor_ptr + n * K + k, mask=k < K, other=1.0)
    coefficients = tl.load(grad_ptr + of_grad, mask=inside, other=0.0).to(tl.float32) / divisor[:, None]
    transposed = tl.trans(coefficients)
    for first in range(0, S, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        of_maps = (k[:, None] < K) & (s[None, :] < S)
        of_features = (c[:, None] < C) & (s[None, :] < S)
        at = n * C * S + c[:, None] * channel + s[None, :] * position
        if FEATURES:
            maps = tl.load(maps_ptr + n * K * S + k[:, None] * S + s[None, :], mask=of_maps, other=0.0)
            found = tl.dot(transposed, maps, input_precision="tf32x3")
            tl.store(dfeatures_ptr + at, found, mask=of_features)
        if MAPS:
            features = tl.load(features_ptr + at, mask=of_features, other=0.0).to(tl.float32)
            found = tl.dot(coefficients, features, input_precision="tf32x3")
            tl.store(partial_ptr + program * K * S + k[:, None] * S + s[None, :], found, mask=of_maps)


# ------------------------------------------------------------------------------------------------ operators


def launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Queues the kernel on the current stream of the device of x."""
    with torch.cuda.device_of(x):
        kernel[(programs,)](*arguments, **constants)


def sizes_of(features: Tensor, K: int) -> tuple[int, ...]:
    """C, S, K, channel, position."""
    C, S = features.shape[1], features.shape[2] * features.shape[3]
    return (C, S, K, 1, C) if is_channels_last(features) else (C, S, K, S, 1)


def blocks_of(K: int) -> dict[str, int]:
    BLOCK_K = max(16, triton.next_power_of_2(K))
    return {"BLOCK_C": 64 if BLOCK_K == 16 else 32, "BLOCK_S": 32, "BLOCK_K": BLOCK_K, "num_warps": 8}


def pose_weighted_pool(features: Tensor, maps: Tensor, groups: bool, eps: float) -> Tensor:
    features, maps = dense(features), maps.contiguous()
    N, C = features.shape[:2]
    K = maps.shape[1]
    pooled = features.new_empty((N, C) if groups else (N, K, C))
    if pooled.numel() == 0:
        return pooled
    constants = {"GROUPS": groups, **blocks_of(K)}
    programs = N * triton.cdiv(C, constants["BLOCK_C"])
    launch(pool_kernel, programs, maps, features, maps, pooled, *sizes_of(features, K), eps, **constants)
    return pooled


def pose_weighted_pool_backward(
    grad: Tensor, features: Tensor, maps: Tensor, groups: bool, eps: float, of_features: bool, of_maps: bool
) -> tuple[Tensor, Tensor]:
    grad, features, maps = grad.contiguous(), dense(features), maps.contiguous()
    N, C = features.shape[:2]
    K, nothing = maps.shape[1], maps.new_empty(0)
    dF = result_like(features) if of_features else nothing
    if grad.numel() == 0:
        return dF.zero_(), torch.zeros_like(maps) if of_maps else nothing
    D = maps.sum((2, 3)) + eps
    constants = {"GROUPS": groups, "FEATURES": of_features, "MAPS": of_maps, **blocks_of(K)}
    blocks = triton.cdiv(C, constants["BLOCK_C"])
    partial = maps.new_empty((N, blocks, *maps.shape[1:]) if of_maps else (0,))
    sizes = sizes_of(features, K)
    launch(gradient_kernel, N * blocks, maps, grad, features, maps, D, dF, partial, *sizes, **constants)
    if not of_maps:
        return dF, nothing
    P = partial.sum(1)
    return dF, P - ((maps * P).sum((2, 3)) / D)[:, :, None, None]
