"""The library of C++ kernels: built where it can be, called only for what it takes, and missed aloud."""

from __future__ import annotations

import platform
import shutil
import sys

import pytest
import torch

from openelm.kernels import native

CAN_BE_BUILT = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++") is not None


@pytest.mark.skipif(not CAN_BE_BUILT, reason="no compiler, or not Linux on x86-64: there is nothing to build")
def test_the_kernels_are_built_where_there_is_a_compiler() -> None:
    """Otherwise a build that fails, which the installation allows, would skip every test of them."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert native.native_missing() is None
        assert native.kernels_name() in ("avx2", "avx512", "avx512_bf16", "amx")
    else:
        assert native.kernels_name() == "torch"


def test_a_missing_library_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert native.kernels_name() == "torch"
    assert "avx2" in (told := native.native_missing() or "") and "compiler" in told
    assert not native.runs_native(torch.ones(1))


def test_a_cpu_without_kernels_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert native.native_missing() is None


def test_other_dtypes_and_devices_run_on_torch() -> None:
    assert not native.runs_native(torch.ones(1, dtype=torch.float64))
    assert not native.runs_native(torch.ones(1), torch.ones(1, dtype=torch.float16))
    assert not native.runs_native(torch.ones(1, device="meta"))
