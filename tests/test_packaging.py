"""The build script's answers to a wrong environment, what the binaries and the wheel hold, what importing costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

import neuraldeps_kernels
from neuraldeps_kernels import _info

ROOT = Path(__file__).resolve().parents[1]
OPS_LIBRARY = Path(neuraldeps_kernels.__file__).parent / "_lib" / "libneuraldeps_ops.so"
MAX_WHEEL_BYTES = 18e6  # 12e6 was wanted; the covariance of real logits alone is 6.8e6

SOLVE_AND_PRINT = """
import sys
import torch
import neuraldeps_kernels as nk
torch.manual_seed(0)
x = torch.randn(200, 40, dtype=torch.float64)
solution = nk.covlasso(x.T @ x / 200, lam_ratio=0.3)
print(nk.__file__)
print(torch.ops.neuraldeps.cpu_levels()[2])
print(*(value.hex() for value in solution.err2.tolist()))
"""


def fake_nvcc(folder: Path, version: str, architectures: str = "compute_80 compute_90") -> Path:
    """Root of a toolkit whose nvcc answers questions and compiles nothing."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release {version}, V{version}.1" ;;\n'
        f"--list-gpu-arch) printf '%s\\n' {architectures} ;; *) exit 1 ;; esac\n"
    )
    nvcc.chmod(0o755)
    return folder


@pytest.fixture
def build(build_script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, in an environment without its variables."""
    for name in (
        "NEURALDEPS_CUDA",
        "NEURALDEPS_CUDA_ARCH_LIST",
        "TORCH_CUDA_ARCH_LIST",
        "CUDA_HOME",
        "CUDA_PATH",
        "MAX_JOBS",
        "NEURALDEPS_NATIVE",
    ):
        monkeypatch.delenv(name, raising=False)
    build_script.usable_nvcc.cache_clear()
    yield build_script
    build_script.usable_nvcc.cache_clear()


class TestBuildScript:
    def test_a_missing_nvcc_is_an_error_only_if_asked_for(self, build, monkeypatch, capsys):
        monkeypatch.setattr(build.shutil, "which", lambda _: None)
        nvcc, reason = build.usable_nvcc()
        assert nvcc is None
        assert "nvcc was not found" in reason
        assert "CPU kernels only" in capsys.readouterr().err
        build.usable_nvcc.cache_clear()
        monkeypatch.setenv("NEURALDEPS_CUDA", "1")
        with pytest.raises(
            SystemExit, match=r"NEURALDEPS_CUDA=1, but nvcc was not found \(looked at CUDA_HOME.*\n.*CUDA_HOME"
        ):
            build.usable_nvcc()

    def test_an_old_nvcc_is_named_with_its_version(self, build, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, "11.8")))
        monkeypatch.setenv("NEURALDEPS_CUDA", "1")
        with pytest.raises(SystemExit, match=rf"{tmp_path}/bin/nvcc is of CUDA 11\.8, and 12\.8 or newer is needed"):
            build.usable_nvcc()

    def test_the_oldest_nvcc_allowed_is_taken(self, build, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_PATH", str(fake_nvcc(tmp_path, "12.8")))
        assert build.usable_nvcc() == (str(tmp_path / "bin/nvcc"), "")

    def test_cuda_can_be_left_out(self, build, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(fake_nvcc(tmp_path, "13.0")))
        monkeypatch.setenv("NEURALDEPS_CUDA", "0")
        assert build.usable_nvcc() == (None, "NEURALDEPS_CUDA=0")

    def test_cuda_home_without_nvcc(self, build, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(SystemExit, match=rf"CUDA_HOME='{tmp_path}': expected the root of a CUDA toolkit"):
            build.usable_nvcc()

    def test_an_nvcc_that_does_not_run(self, build, monkeypatch, tmp_path):
        nvcc = fake_nvcc(tmp_path, "13.0") / "bin/nvcc"
        nvcc.write_text("#!/bin/sh\necho broken toolkit >&2\nexit 1\n")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        with pytest.raises(SystemExit, match=r"cannot read the version of .*\n.*broken toolkit"):
            build.usable_nvcc()

    def test_source_lines_are_in_cuda_kernels_on_request_only(self, build, monkeypatch, tmp_path):
        nvcc = str(fake_nvcc(tmp_path, "13.0", "compute_80 compute_90 compute_100 compute_120") / "bin/nvcc")
        monkeypatch.setenv("NEURALDEPS_CUDA", "0")
        commands = {}
        for value in (None, "0", "1"):
            monkeypatch.delenv("NEURALDEPS_LINEINFO", raising=False)
            if value is not None:
                monkeypatch.setenv("NEURALDEPS_LINEINFO", value)
            commands[value] = [step.command for step in build.Binaries().cuda(nvcc)]
        assert not any("lineinfo" in word for value in (None, "0") for command in commands[value] for word in command)
        assert all(command.count("-lineinfo") == 1 for command in commands["1"])
        without = [[word for word in command if word != "-lineinfo"] for command in commands["1"]]
        assert without == commands[None] == commands["0"]

    def test_the_module_for_arrays_can_be_left_out(self, build, monkeypatch):
        """Where pybind11 is missing, the operators are built without it."""
        monkeypatch.setenv("NEURALDEPS_CUDA", "0")
        monkeypatch.setitem(sys.modules, "pybind11", None)
        with pytest.raises(SystemExit, match="pybind11 is needed to build without isolation"):
            build.Binaries()
        monkeypatch.setenv("NEURALDEPS_NATIVE", "0")
        assert list(build.Binaries().steps()) == [build.OPS_LIBRARY]
        assert [extension.name for extension in build.extensions()] == [build.OPS_LIBRARY]

    @pytest.mark.parametrize(
        ("variable", "value", "message"),
        [
            ("NEURALDEPS_NATIVE", "no", r"NEURALDEPS_NATIVE='no': expected 1 \(built\) or 0"),
            ("NEURALDEPS_CUDA", "yes", r"NEURALDEPS_CUDA='yes': expected 1 .* 0 .* or auto"),
            ("MAX_JOBS", "many", r"MAX_JOBS='many': expected a positive number"),
            ("MAX_JOBS", "0", r"MAX_JOBS='0': expected a positive number"),
        ],
    )
    def test_wrong_switches(self, build, monkeypatch, variable, value, message):
        monkeypatch.setenv(variable, value)
        with pytest.raises(SystemExit, match=message):
            {"NEURALDEPS_CUDA": build.usable_nvcc, "MAX_JOBS": build.num_jobs}.get(variable, build.native_wanted)()

    def test_architecture_list(self, build, monkeypatch, tmp_path):
        nvcc = str(fake_nvcc(tmp_path, "13.0", "compute_80 compute_90 compute_120") / "bin/nvcc")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
        assert build.architecture_flags(nvcc) == ["-gencode", "arch=compute_90,code=sm_90"]
        monkeypatch.setenv("NEURALDEPS_CUDA_ARCH_LIST", "8.0+PTX;12.0a")
        assert [flag for flag in build.architecture_flags(nvcc) if flag != "-gencode"] == [
            "arch=compute_80,code=sm_80",
            "arch=compute_80,code=compute_80",
            "arch=compute_120a,code=sm_120a",
        ]

    @pytest.mark.parametrize(
        ("listed", "message"),
        [
            ("8.0 hopper", r"ARCH_LIST='8\.0 hopper': cannot read 'hopper'; expected numbers like '8\.0 9\.0\+PTX'"),
            ("90", r"cannot read '90'"),
            ("7.0", r"nvcc cannot compile for '7\.0', only for 8\.0 9\.0 12\.0"),
        ],
    )
    def test_wrong_architecture_list(self, build, monkeypatch, tmp_path, listed, message):
        nvcc = str(fake_nvcc(tmp_path, "13.0", "compute_80 compute_90 compute_120") / "bin/nvcc")
        monkeypatch.setenv("NEURALDEPS_CUDA_ARCH_LIST", listed)
        with pytest.raises(SystemExit, match=message):
            build.architecture_flags(nvcc)

    def test_an_old_torch_is_named_with_its_version(self, build, monkeypatch):
        monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
        with pytest.raises(SystemExit, match=r"torch 2\.11 or newer is needed to build; this is torch 2\.10\.1\+cu128"):
            build.checked_torch()

    def test_a_missing_build_requirement_is_named(self, build):
        with pytest.raises(SystemExit, match="no_such_package is needed to build without isolation"):
            build.build_requirement("no_such_package")

    def test_a_compiler_that_does_not_run(self, build, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        monkeypatch.setenv("NEURALDEPS_CUDA", "0")
        with pytest.raises(SystemExit, match=r"C\+\+ compiler 'no-such-compiler' does not run .* set CXX"):
            build.Binaries().steps()

    def test_errors_reach_the_user_without_a_traceback(self, tmp_path):
        environment = {**os.environ, "CUDA_HOME": str(fake_nvcc(tmp_path, "12.1")), "NEURALDEPS_CUDA": "1"}
        command = [sys.executable, "setup.py", "build_ext"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 1
        assert "12.8 or newer is needed" in result.stderr
        assert "Traceback" not in result.stderr


class TestRebuilding:
    """A step runs again when its command, its tools or a file it read changes, and only then."""

    @pytest.fixture
    def step(self, build, monkeypatch, tmp_path):
        monkeypatch.setattr(build, "OBJECTS", tmp_path / "objects")
        (tmp_path / "answer.h").write_text("int answer() { return 42; }\n")
        (tmp_path / "a.cpp").write_text('#include "answer.h"\n')
        return lambda *flags, made_by="g++ 12": build.compile_step(
            ["g++"], list(flags), tmp_path / "a.cpp", "x", made_by
        )

    def test_unchanged(self, step):
        assert step().is_stale()
        step().run()
        assert not step().is_stale()

    def test_command_and_tools(self, step):
        step("-O1").run()
        assert step("-O2").is_stale()
        assert step("-O1", made_by="g++ 13").is_stale()
        assert not step("-O1").is_stale()

    def test_headers(self, step, tmp_path):
        step().run()
        (tmp_path / "answer.h").write_text("int answer() { return 43; }\n")
        assert step().is_stale()
        (tmp_path / "answer.h").unlink()
        assert step().is_stale()

    def test_a_failed_step_leaves_nothing(self, step, tmp_path):
        (tmp_path / "answer.h").write_text("int answer() { return\n")
        with pytest.raises(SystemExit, match=r"g\+\+ failed with exit status 1"):
            step().run()
        assert step().is_stale()


def symbols_outside(compiled: Path, level: str) -> list[str]:
    """Symbols of an object that the linker may take from, or give to, the object of another instruction-set level.

    Those are the weak ones (inline functions, template instantiations: one copy of all is kept, and an old machine
    could meet AVX-512 code at its baseline) and exported ones outside of the namespace of the level.
    """
    listing = subprocess.run(["nm", "--defined-only", compiled], capture_output=True, text=True, check=True).stdout
    found = []
    for line in listing.splitlines():
        kind, name = line.split()[-2:]
        # DW.ref.*: the pointer to the unwinder's routine, the same at every level.
        weak = kind in "VWuvw" and not name.startswith("DW.ref.")
        if weak or (kind.isupper() and kind not in "VW" and level not in name):
            found.append(name)
    return sorted(found)


class TestInstructionSetLevels:
    def test_every_level_can_be_forced_and_gives_the_same_result(self, run_python, cpu_levels):
        results = {}
        for level in cpu_levels:
            result = run_python(SOLVE_AND_PRINT, NEURALDEPS_CPU_LEVEL=level)
            assert result.returncode == 0, result.stderr
            _, active, errors = result.stdout.splitlines()
            assert active == level
            results[level] = torch.tensor([float.fromhex(value) for value in errors.split()], dtype=torch.float64)
        for errors in results.values():
            torch.testing.assert_close(errors, results["baseline"], rtol=1e-9, atol=0)

    @pytest.mark.parametrize("level", ["avx1024", "AVX2", "avx2,avx512"])
    def test_an_unknown_level_is_refused_at_import(self, run_python, cpu_levels, level):
        result = run_python("import neuraldeps_kernels", NEURALDEPS_CPU_LEVEL=level)
        assert result.returncode == 1
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"ValueError: NEURALDEPS_CPU_LEVEL='{level}'")
        assert f"({' '.join(cpu_levels)})" in last

    def test_an_unknown_level_is_refused_without_torch(self, run_python):
        code = f"""
import sys
sys.path.insert(0, {str(OPS_LIBRARY.parents[1])!r})
import _native
assert "torch" not in sys.modules
_native.cpu_levels()
"""
        assert run_python(code, NEURALDEPS_CPU_LEVEL="baseline").returncode == 0
        result = run_python(code, NEURALDEPS_CPU_LEVEL="avx1024")
        assert "ValueError: NEURALDEPS_CPU_LEVEL='avx1024'" in result.stderr

    def test_levels_share_no_symbol(self, build, monkeypatch):
        monkeypatch.setenv("NEURALDEPS_CUDA", "0")
        steps = [step for step in build.Binaries().cpu() if step.stem.split("/")[1] in build.cpu_levels()]
        assert steps
        build.run_stale(steps)
        for step in steps:
            assert not symbols_outside(step.output, level=step.stem.split("/")[1]), step.stem

    def test_a_shared_symbol_is_found(self, tmp_path):
        source, output = tmp_path / "a.cpp", tmp_path / "a.o"
        source.write_text("inline int twice(int x) { return 2 * x; }\nnamespace avx2 { int (*f)(int) = twice; }\n")
        subprocess.run(["g++", "-c", source, "-o", output], check=True)
        assert symbols_outside(output, level="avx2") == ["_Z5twicei"]
        assert symbols_outside(output, level="baseline") == ["_Z5twicei", "_ZN4avx21fE"]


class TestBinaries:
    def test_the_operator_library_keeps_to_the_stable_abi(self):
        auditor = Path(sysconfig.get_path("scripts")) / "torch-abi-audit"
        result = subprocess.run([auditor, "--check", "torch", OPS_LIBRARY], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
        assert re.search(r"Torch ABI: +STABLE", result.stdout), result.stdout
        oldest = re.search(r"Min torch: +(\d+)\.(\d+)", result.stdout)
        assert oldest
        assert tuple(map(int, oldest.groups())) <= (2, 11)

    def test_no_python_in_the_libraries_and_no_torch_in_the_bindings(self):
        package = OPS_LIBRARY.parents[1]
        binaries = [*package.glob("_lib/*.so"), *package.glob("_native*.so")]
        assert len(binaries) == 2 + (_info.collect()["build"]["cuda"] is not None)
        for binary in binaries:
            listing = subprocess.run(["readelf", "-d", binary], capture_output=True, text=True, check=True).stdout
            needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing)
            assert not [name for name in needed if "python" in name]
            assert not [name for name in needed if "cuda" in name], "the CUDA runtime is linked statically"
            assert bool([name for name in needed if "torch" in name]) == (binary == OPS_LIBRARY)
            assert "RUNPATH" not in listing
            assert "RPATH" not in listing

    def test_importing_is_cheap(self, run_python):
        """Nothing heavy beyond torch itself comes with the package."""
        code = """
import sys
import torch
before = set(sys.modules)
import neuraldeps_kernels
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
        result = run_python(code)
        assert result.returncode == 0, result.stderr
        added = set(result.stdout.split())
        assert "neuraldeps_kernels" in added
        heavy = {"scipy", "sklearn", "matplotlib", "triton", "rich", "typer", "safetensors", "PIL", "cupy"}
        assert not added & heavy


class TestInfo:
    def test_facts_are_of_this_process(self, cpu_levels):
        facts = _info.collect()
        assert facts["version"] == neuraldeps_kernels.__version__
        assert facts["cpu"]["available"] == cpu_levels
        assert facts["cpu"]["active"] in cpu_levels
        assert facts["torch"]["version"] == torch.__version__
        assert len(facts["torch"]["devices"]) == torch.cuda.device_count()
        hot_paths = {path.stem for path in (ROOT / "neuraldeps_kernels/reference").glob("[!_]*.py")}
        assert set(facts["kernels"]) == hot_paths
        library = OPS_LIBRARY.with_name("libneuraldeps_cuda.so")
        assert (facts["build"]["cuda"] is not None) == library.is_file()
        assert (facts["cuda"]["library_error"] is None) == library.is_file()

    def test_text_names_every_fact_once(self):
        facts = _info.collect()
        text = _info.format(facts)
        names = [re.split(r"  +", line)[0] for line in text.splitlines()]
        assert len(names) == len(set(names))
        assert f"{facts['cpu']['active']} in use" in text
        assert {"covlasso on CPU", "covlasso on CUDA", "CUDA driver", "triton"} <= set(names)

    def test_why_cuda_was_left_out(self):
        facts = _info.collect()
        facts["build"].update(cuda=None, no_cuda_reason="nvcc was not found")
        assert "not built: nvcc was not found" in _info.format(facts)


def build_wheel(source: Path, folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    options = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    result = subprocess.run([*command, "-w", folder, source], env=options, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected_files(cuda: bool) -> set[str]:
    package = ROOT / "neuraldeps_kernels"
    sources = {str(path.relative_to(ROOT)) for path in package.rglob("*.py*") if path.suffix in (".py", ".pyi")}
    data = {
        str(path.relative_to(ROOT))
        for path in [*(package / "data").iterdir(), *(package / "models" / "configs").iterdir()]
        if path.suffix in (".npz", ".txt", ".json", ".toml")
    }
    binaries = {"_lib/libneuraldeps_ops.so", f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"}
    binaries |= {"_lib/libneuraldeps_cuda.so"} if cuda else set()
    return {*sources, *data, "neuraldeps_kernels/py.typed", *(f"neuraldeps_kernels/{name}" for name in binaries)}


class TestWheel:
    def test_holds_the_package_and_nothing_else(self, run_python, tmp_path):
        wheel = build_wheel(ROOT, tmp_path)
        assert files_of(wheel) == expected_files(_info.collect()["build"]["cuda"] is not None)
        assert wheel.stat().st_size <= MAX_WHEEL_BYTES
        assert wheel.name.startswith(f"neuraldeps_kernels-{neuraldeps_kernels.__version__}-")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
            assert b"neuraldeps = neuraldeps_kernels.cli:main" in archive.read(entry_points)
            assert any(name.endswith("licenses/LICENSE") for name in names)

    def test_without_cuda_takes_no_cuda_library_of_another_build(self, tmp_path):
        wheel = build_wheel(ROOT, tmp_path, NEURALDEPS_CUDA="0")
        assert files_of(wheel) == expected_files(cuda=False)

    @pytest.mark.slow
    def test_from_a_source_distribution(self, run_python, tmp_path):
        """sdist -> wheel -> installed package, each outside of the source tree; for one architecture, to save time."""
        command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (archive,) = tmp_path.glob("*.tar.gz")
        wheel = build_wheel(archive, tmp_path, NEURALDEPS_CUDA_ARCH_LIST="9.0")
        assert files_of(wheel) == expected_files(_info.collect()["build"]["cuda"] is not None)
        installed = tmp_path / "installed"
        with zipfile.ZipFile(wheel) as contents:
            contents.extractall(installed)
        result = run_python(f"import os; os.chdir({str(tmp_path)!r})\n{SOLVE_AND_PRINT}", PYTHONPATH=str(installed))
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(str(installed))
