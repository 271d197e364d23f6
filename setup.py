"""Builds the C++ kernels, once for each instruction set; where that fails, the package runs on plain torch."""

import copy
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("openelm/kernels/cpp")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]  # no CPU has the first without the second
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": BF16,
    "amx": [*BF16, "-mamx-tile", "-mamx-bf16"],
}

extensions = []
if sys.platform == "linux" and platform.machine() == "x86_64":
    extensions = [
        Extension(
            f"openelm.kernels._{name}",
            sources=sorted(path.as_posix() for path in SOURCES.glob("*.cpp")),
            depends=sorted(path.as_posix() for path in SOURCES.glob("*.h")),
            # -fopenmp is left out when linking: the threads are those of the libgomp that torch has loaded.
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=fast", *flags],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]


class BuildApart(build_ext):
    """Builds several at a time, whose objects have the same names, in folders of their own."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True  # one for each CPU

    def build_extension(self, ext: Extension) -> None:
        apart = copy.copy(self)
        apart.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(apart, ext)


setup(ext_modules=extensions, cmdclass={"build_ext": BuildApart})
