"""The op table, lazy exports, the machine's answers, and the contract helper."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kernels import KernelContractError, backend, dispatch, implementations, platform, rms_norm
from kernels.contract import check_tensor

CPU = torch.device("cpu")


def run_python(code: str, root: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_op_has_a_line_and_a_function() -> None:
    lines = dispatch.describe(CPU)
    assert {"linear", "sparse_attention", "moe_gate", "gumbel_noise"} <= {op for op, _, _ in lines}
    for op, name, why in lines:
        assert name == "reference"
        assert why
        assert callable(dispatch.kernel(op, CPU))


def test_every_exported_op_is_in_the_table() -> None:
    import kernels

    values = {name: getattr(kernels, name) for name in kernels.__all__}
    helpers = {"beside", "box_bytes", "stack_weights", "wide_dtype", "widen"}
    ops = {name for name, value in values.items() if not isinstance(value, type)}
    assert ops - helpers == set(dispatch.table(CPU))


def test_the_table_is_built_once_and_frozen() -> None:
    table = dispatch.table(CPU)
    assert dispatch.table(CPU) is table
    with pytest.raises(TypeError):
        table["linear"] = table["swiglu"]  # type: ignore[index]


def test_an_implementation_is_chosen_by_device_and_capability() -> None:
    fast = implementations.Implementation(
        name="triton", module="x", device_types=("cuda",), min_compute=(9, 0), why="test"
    )
    cap = platform.capability(CPU)
    assert not fast.runs_on(cap)
    hopper = platform.Capability(
        device_type="cuda", name="test", compute=(9, 0), memory_bytes=1, count=1
    )
    assert fast.runs_on(hopper)
    older = platform.Capability(
        device_type="cuda", name="test", compute=(8, 9), memory_bytes=1, count=1
    )
    assert not fast.runs_on(older)


def test_unknown_ops_and_devices_are_errors() -> None:
    with pytest.raises(KernelContractError, match="'no_op'"):
        dispatch.kernel("no_op", CPU)
    with pytest.raises(platform.PlatformError, match="meta"):
        dispatch.kernel("linear", torch.device("meta"))


def test_an_op_keeps_its_name_whatever_is_imported_first(repo_root: Path) -> None:
    """Folders share their op's name; the import system must not put the folder in its place."""
    code = (
        "import kernels.linear.api, kernels.rms_norm.reference\n"
        "import kernels\n"
        "from kernels import linear, rms_norm, swiglu\n"
        "from kernels.linear import api\n"
        "print(linear is api.linear, callable(rms_norm), callable(kernels.swiglu))"
    )
    assert run_python(code, repo_root) == "True True True"


def test_importing_the_package_is_cheap(repo_root: Path) -> None:
    code = (
        "import sys, kernels\n"
        "print(sorted(m for m in sys.modules if m.startswith(('kernels', 'torch', 'triton')))"
        ", hasattr(kernels, '__version__'), hasattr(kernels, 'nothing'))"
    )
    assert run_python(code, repo_root) == "['kernels'] False False"


def test_resolve_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform.resolve_device("cpu") == CPU
    with pytest.raises(platform.PlatformError, match=r"'gpu'.*auto, cpu, cuda"):
        platform.resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert platform.resolve_device("auto") == CPU
    with pytest.raises(platform.PlatformError, match="no CUDA device"):
        platform.resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert platform.resolve_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(platform.PlatformError, match=r"index 2, allowed: 0\.\.1"):
        platform.resolve_device("cuda", 2)


def test_backend_and_capability() -> None:
    assert platform.dist_backend(CPU) == "gloo"
    assert platform.dist_backend(torch.device("cuda", 3)) == "nccl"
    with pytest.raises(platform.PlatformError, match="meta"):
        platform.dist_backend(torch.device("meta"))
    cap = platform.capability(CPU)
    assert (cap.device_type, cap.compute, cap.count) == ("cpu", (0, 0), 1)
    assert cap.memory_bytes > 1 << 28


def test_check_tensor() -> None:
    x = torch.zeros(4, 6)
    check_tensor("op: x", x, shape=(None, 6), dtype=(torch.float32, torch.bfloat16), device=CPU)
    check_tensor("op: x", x[:, 2:5], shape=(4, 3))
    check_tensor("op: x", x[:, 2:3], shape=(4, 1))
    check_tensor("op: x", x.t()[:, :1], shape=(6, 1))
    check_tensor("op: x", torch.zeros(6, 0).t())
    check_tensor("op: x", torch.zeros(()), shape=())
    with pytest.raises(
        KernelContractError, match=r"op: x: expected shape \[any, 5\], got \[4, 6\]"
    ):
        check_tensor("op: x", x, shape=(None, 5))
    with pytest.raises(KernelContractError, match=r"shape \[any\], got \[4, 6\]"):
        check_tensor("op: x", x, shape=(None,))
    with pytest.raises(KernelContractError, match="dtype int64 or int32, got float32"):
        check_tensor("op: x", x, dtype=(torch.int64, torch.int32))
    with pytest.raises(KernelContractError, match="device cuda, got cpu"):
        check_tensor("op: x", x, device=torch.device("cuda"))
    with pytest.raises(KernelContractError, match=r"stride 1.*\[1, 6\]"):
        check_tensor("op: x", x.t())
    with pytest.raises(KernelContractError, match="expected a tensor, got list"):
        check_tensor("op: x", [1.0])  # type: ignore[arg-type]


def test_float64_goes_only_beside_float64() -> None:
    """A GPU kernel that computes in float32 would read the bytes of doubles."""
    single, double = torch.zeros(3), torch.zeros(3, dtype=torch.float64)
    for first, other in ((single, single), (double, single), (double, double)):
        check_tensor("op: y", other, dtype=torch.float32, beside=first)
    for first in (single, single.bfloat16()):
        with pytest.raises(KernelContractError, match="op: y: expected dtype float32, got float64"):
            check_tensor("op: y", double, dtype=torch.float32, beside=first)
    with pytest.raises(KernelContractError, match="op: y: expected device cpu, got meta"):
        check_tensor("op: y", single.to("meta"), beside=single)
    with pytest.raises(KernelContractError, match=r"rms_norm: weight: .* got float64"):
        rms_norm(torch.zeros(2, 3), double, 1e-6)


Install = Callable[[str, str | None], None]
GPU = torch.device("cuda", 0)
HOPPER = platform.Capability(
    device_type="cuda", name="test", compute=(9, 0), memory_bytes=1, count=1
)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A table as on a Hopper GPU where a backend is installed in a version (None: not at all)."""
    installed: dict[str, str | None] = {}
    monkeypatch.setattr(dispatch, "capability", lambda device: HOPPER)
    monkeypatch.setattr(backend, "_installed", lambda package: installed.get(package))
    dispatch._table.cache_clear()
    dispatch._function.cache_clear()

    def install(package: str, version: str | None) -> None:
        installed[package] = version
        dispatch._table.cache_clear()
        dispatch._function.cache_clear()

    yield install
    dispatch._table.cache_clear()
    dispatch._function.cache_clear()


@pytest.mark.parametrize(
    ("pinned", "op"),
    [
        (backend.DEEP_GEMM, "linear_quant"),
        (backend.FLASH_MLA, "sparse_attention"),
    ],
)
def test_a_backend_serves_in_its_exact_version_only(
    on_hopper: Install, pinned: backend.Backend, op: str
) -> None:
    lines = {name: (choice, why) for name, choice, why in dispatch.describe(GPU)}
    assert lines[op][0] == "cuda"
    assert "not used" not in lines[op][1]
    on_hopper(pinned.package, pinned.version)
    lines = {name: (choice, why) for name, choice, why in dispatch.describe(GPU)}
    assert lines[op][0] not in ("cuda", "reference")
    assert dispatch.table(GPU)[op].backend is pinned
    assert dispatch.own(op, GPU).name == "cuda"
    on_hopper(pinned.package, pinned.version + ".dev1")
    lines = {name: (choice, why) for name, choice, why in dispatch.describe(GPU)}
    assert lines[op][0] == "cuda"
    found = f"{pinned.package} {pinned.version}.dev1 found, {pinned.version} needed: not used"
    assert lines[op][1].endswith(found)


def test_a_backend_that_cannot_be_loaded_is_named(on_hopper: Install) -> None:
    """Here the pinned version is claimed but nothing is installed: no other kernel takes over."""
    on_hopper(backend.DEEP_GEMM.package, backend.DEEP_GEMM.version)
    with pytest.raises(backend.BackendError, match=rf"{backend.DEEP_GEMM}.*loading it failed"):
        dispatch.kernel("linear_quant", GPU)


def test_a_backend_that_fails_is_named() -> None:
    with (
        pytest.raises(backend.BackendError, match=r"sgl-deep-gemm .* fp8_gemm_nt failed: no nvcc"),
        backend.DEEP_GEMM.named("fp8_gemm_nt"),
    ):
        raise RuntimeError("no nvcc")


def test_the_extra_installs_the_versions_that_are_used(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    pinned = {f"{b.package}=={b.version}" for b in (backend.DEEP_GEMM, backend.FLASH_MLA)}
    assert set(project["optional-dependencies"]["hopper"]) == pinned


def test_ops_without_a_kernel_are_named_on_a_gpu_only(on_hopper: Install) -> None:
    assert dispatch.without_kernel(CPU) == []
    gaps = dispatch.without_kernel(GPU)
    twins = [op for op, choice, _ in dispatch.describe(GPU) if choice == "reference"]
    assert "act_quant" in twins  # of weights, at load time: no step runs it
    assert gaps == []  # every op that a step calls has a kernel


def test_the_own_kernel_and_the_twin_have_names() -> None:
    from kernels.rms_norm import reference

    assert dispatch.twin("rms_norm") is reference.rms_norm
    assert dispatch.own_kernel("rms_norm", CPU) is reference.rms_norm
    with pytest.raises(KernelContractError, match="'no_op'"):
        dispatch.own("no_op", CPU)
