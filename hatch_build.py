"""Compiles the rater's fast path where there is a C compiler; without one Tally is installed all the same, slower."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

_MODULE = "pipeline.rating.fastpath"


class FastPath(BuildHookInterface[Any]):
    """Hatchling's build hook: the extension module is made beside its source, and goes into the wheel from there."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        folder = Path(self.root, *_MODULE.split(".")[:-1])
        for stale in folder.glob("fastpath.*.so"):
            stale.unlink()
        with tempfile.TemporaryDirectory() as scratch:
            source = str(folder / "fastpath.pyx")
            extension = Extension(_MODULE, [source], extra_compile_args=["-O3"])
            modules = cythonize([extension], build_dir=scratch, quiet=True)
            command = build_ext(Distribution({"ext_modules": modules, "packages": []}))
            command.build_temp, command.build_lib = scratch, self.root
            command.ensure_finalized()
            try:
                command.run()
            except (CompileError, LinkError, PlatformError) as error:
                print(f"the rater will run without its fast path, at half the speed: {error}", file=sys.stderr)  # noqa: T201
                return
        build_data["artifacts"] += [path.relative_to(self.root).as_posix() for path in folder.glob("fastpath.*.so")]
        build_data["pure_python"], build_data["infer_tag"] = False, True
