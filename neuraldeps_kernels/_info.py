"""What `neuraldeps info` says: versions, devices, instruction-set levels, and which kernel serves each hot path."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import neuraldeps_kernels

# Per hot path the kernels that serve it on a CUDA device, best first; on the CPU C++ serves all.
CUDA_KERNELS = {
    "closed_form_discriminator": "Triton",
    "covariance": "Triton",
    "covlasso": "CUDA C++",
    "distillation_kl": "Triton",
    "domain_norm": "Triton",
    "fourier_filter": "CUDA C++",
    "gnn_rerank": "CUDA C++",
    "pose_weighted_pool": "Triton",
    "projected_step": "Triton",
    "queue_contrast": "Triton",
    "region_mixup": "Triton",
    "retrieval": "CUDA C++",
    "retrieval_metrics": "CUDA C++",
    "spectrum": "CUDA C++",
}


def collect() -> dict[str, Any]:
    """All facts as JSON-able values; a missing part is null, and its neighbour `..._reason` or `error` says why."""
    cuda = _cuda()
    optional = {name: _version(*names) for name, names in _OPTIONAL_PACKAGES.items()}
    return {
        "version": neuraldeps_kernels.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
            "devices": [_device(index) for index in range(torch.cuda.device_count())],
        },
        "build": json.loads(torch.ops.neuraldeps.build_info()),
        "cpu": _cpu(),
        "cuda": cuda,
        "packages": optional,
        "kernels": {
            path: {
                "cpu": f"C++ ({torch.ops.neuraldeps.cpu_levels()[2]})",
                "cuda": _cuda_kernel(kernel, cuda["library_error"], optional["triton"]),
            }
            for path, kernel in CUDA_KERNELS.items()
        },
    }


def format(facts: dict[str, Any]) -> str:
    """The facts as aligned lines of text."""
    build, cpu, cuda, framework = facts["build"], facts["cpu"], facts["cuda"], facts["torch"]
    devices = [f"{d['name']}, sm_{d['capability']}, {d['memory_gib']:.0f} GiB" for d in framework["devices"]]
    lines = [
        ("neuraldeps_kernels", facts["version"]),
        ("Python, platform", f"{facts['python']}, {facts['platform']}"),
        ("torch", f"{framework['version']}, CUDA {framework['cuda'] or 'none'}, {framework['threads']} threads"),
        ("built with", f"{build['compiler']}, torch {build['torch']}"),
        ("processor", cpu["name"]),
        ("CPU levels", f"{cpu['active']} in use; runnable {', '.join(cpu['available'])}; {_levels_choice(cpu)}"),
        ("CUDA kernels", _cuda_line(build, cuda)),
        ("CUDA driver", cuda["driver"] or "none"),
        ("CUDA devices", "; ".join(devices) or "none"),
        *((name, version or "not installed") for name, version in facts["packages"].items()),
    ]
    for path, served in facts["kernels"].items():
        lines += [(f"{path} on CPU", served["cpu"]), (f"{path} on CUDA", served["cuda"])]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


_OPTIONAL_PACKAGES = {
    "triton": ("triton",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "matplotlib": ("matplotlib",),
}


def _version(*distributions: str) -> str | None:
    """Version of the first installed distribution."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
    }


def _cpu() -> dict[str, Any]:
    compiled, available, active = torch.ops.neuraldeps.cpu_levels()
    return {
        "name": _processor(),
        "compiled": compiled.split(),
        "available": available.split(),
        "active": active,
        "forced": os.environ.get("NEURALDEPS_CPU_LEVEL") or None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cuda() -> dict[str, Any]:
    """State of libneuraldeps_cuda.so: why its functions cannot be called, and if they can, what keeps devices away."""
    library_error = torch.ops.neuraldeps.cuda_library_error() or None
    device_error = None
    if library_error is None:
        library = ctypes.CDLL(str(Path(neuraldeps_kernels.__file__).parent / "_lib" / "libneuraldeps_cuda.so"))
        library.nd_cuda_error_string.restype = ctypes.c_char_p
        count = ctypes.c_int(0)
        if code := library.nd_cuda_device_count(ctypes.byref(count)):
            device_error = library.nd_cuda_error_string(code).decode()
        elif torch.version.cuda is None:
            device_error = "this torch is built without CUDA"
    return {"library_error": library_error, "device_error": device_error, "driver": _driver()}


def _driver() -> str | None:
    """Newest CUDA version that the driver serves, such as "13.0"."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _cuda_kernel(kernel: str | None, library_error: str | None, triton: str | None) -> str:
    """What serves a CUDA tensor: the kernel, or plain PyTorch and why."""
    if kernel is None:
        return "PyTorch: no kernel yet"
    if kernel == "Triton":
        return f"Triton {triton}" if triton else "PyTorch: triton is not installed"
    return f"PyTorch: {library_error}" if library_error else "CUDA C++"


def _levels_choice(cpu: dict[str, Any]) -> str:
    compiled = f"compiled {', '.join(cpu['compiled'])}"
    return f"{compiled}; forced by NEURALDEPS_CPU_LEVEL" if cpu["forced"] else compiled


def _cuda_line(build: dict[str, Any], cuda: dict[str, Any]) -> str:
    if build["cuda"] is None:
        return f"not built: {build['no_cuda_reason']}"
    problem = cuda["library_error"] or cuda["device_error"]
    return f"built by CUDA {build['cuda']} for {build['cuda_architectures']}" + (f"; {problem}" if problem else "")
