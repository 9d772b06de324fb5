"""Kernels of Triton run in its interpreter here: tests/conftest.py says so before triton is imported."""

import pytest

pytest.importorskip("triton", reason="triton is not installed: it is for Linux on x86-64")
