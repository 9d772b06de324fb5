"""Kernels of Triton run in its interpreter here, which has to be known before they are imported."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed: it is for Linux on x86-64")
os.environ["TRITON_INTERPRET"] = "1"
