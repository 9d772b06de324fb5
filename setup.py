"""The one thing that pyproject.toml cannot say: operators in C++, which are left out where no compiler is."""

from pathlib import Path

from setuptools import Extension, setup

# Not a module of Python: ONNX Runtime loads it by its path. `optional` lets the installation go on without it.
setup(
    ext_modules=[
        Extension(
            "rtx.kernels._cpu",
            sources=sorted(map(str, Path("kernels/cpu").glob("*.cpp"))),
            depends=sorted(map(str, Path("kernels/cpu").glob("*.h"))),
            language="c++",
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fvisibility=hidden",
                # Nothing reads errno or traps of floating point; NaN and infinity stay what they are.
                "-fno-math-errno",
                "-fno-trapping-math",
                "-ffp-contract=fast",
                "-Wno-psabi",
                # Of GCC 12: its own headers for AVX-512 have registers that are not set, on purpose.
                "-Wno-uninitialized",
            ],
            optional=True,
        )
    ]
)
