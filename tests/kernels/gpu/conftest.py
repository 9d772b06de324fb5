"""Kernels of Triton run in its interpreter here, which has to be known before they are imported."""

import os

import pytest

# Before triton itself is imported: functions of its own are decorated then.
os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="triton is not installed: it is for Linux on x86-64")
