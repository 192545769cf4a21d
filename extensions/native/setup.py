"""Builds the compiled kernels: one C++ file, once for each instruction set, into a plain library.

The library has a C interface and needs neither Python nor libtorch, so one wheel of a platform
serves every version of both. Where it cannot be built, the package installs without it and
computes in plain torch, which `quark doctor` says.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
# Exactness needs: no contraction into fused multiply-adds, no reordering (so no -ffast-math).
EXACT = ["-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# Loops over blocks of 16 would otherwise be unrolled before they are vectorized.
GCC_ONLY = ["--param", "max-completely-peel-times=8"]
PLAIN = ["-std=c++17", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]
SETS = {
    "QN_BASE_TABLE": [],
    "qn_avx2_table": ["-mavx2", "-mf16c"],
    "qn_avx512_table": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}


class BuildKernels(build_ext):
    """Compiles csrc/ for every instruction set of this kind of processor."""

    def build_extension(self, ext: Extension) -> None:
        """Build, or say why not."""
        try:
            self._build(Path(self.get_ext_fullpath(ext.name)))
        except Exception as error:  # whatever a compiler that is missing or too old raises
            if os.environ.get("QUARK_NATIVE_REQUIRE_KERNELS"):
                raise
            print(
                f"quark-native: the compiled kernels were not built ({error}). The package works "
                "without them, about eight times slower, in plain torch. With a C++17 compiler "
                "(gcc or clang), reinstall: pip install --force-reinstall --no-deps quark-native",
                file=sys.stderr,
            )

    def get_ext_filename(self, fullname: str) -> str:
        """A library that any Python can load has no tag of one."""
        return str(Path(*fullname.split("."))) + ".so"

    def copy_extensions_to_source(self) -> None:
        """In an editable install, put the library beside its sources, if it was built."""
        for ext in self.extensions:
            if Path(
                self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name))
            ).exists():
                super().copy_extensions_to_source()

    def _build(self, target: Path) -> None:
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(f"no recipe for the compiler {self.compiler.compiler_type}")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        sets = SETS if x86 else {"QN_BASE_TABLE": []}
        folder = Path(self.build_temp)
        version = subprocess.check_output([self.compiler.compiler[0], "--version"], text=True)
        tuning = [] if "clang" in version else GCC_ONLY

        def compile_set(table: str) -> list[str]:
            flags = [*EXACT, *tuning, *PLAIN, *sets[table], f"-DQN_TABLE={table}"]
            return self._compile([SOURCES / "kernels.cpp"], folder / table, flags)

        with ThreadPoolExecutor() as pool:
            objects = [name for names in pool.map(compile_set, sets) for name in names]
        plain = [SOURCES / "library.c", SOURCES / "pool.c"]
        objects += self._compile(
            plain, folder, ["-O2", "-fPIC", "-std=gnu11", "-fvisibility=hidden"]
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), libraries=["pthread"])

    def _compile(self, sources: list[Path], folder: Path, flags: list[str]) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in sources:
            target = folder / f"{source.stem}.o"
            command = [*self.compiler.compiler[:1], *flags, "-c", str(source), "-o", str(target)]
            self.compiler.spawn(command)
            objects.append(str(target))
        return objects


class PlatformWheel(bdist_wheel):
    """A wheel for the platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Drop the tags of this Python."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("quark_native.kernels.libquark_native", sources=["csrc/kernels.cpp"])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
