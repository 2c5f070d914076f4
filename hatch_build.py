"""Compiles the fast paths where there is a C compiler; without one Tally is installed all the same, slower."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from Cython.Build import cythonize
from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

_MODULES = ("pipeline.rating.fastpath", "pipeline.billing.fastpath")


class FastPaths(BuildHookInterface[Any]):
    """Hatchling's build hook: each extension module is made beside its source, and goes into the wheel from there."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        for stale in Path(self.root, "pipeline").glob("*/fastpath.*.so"):
            stale.unlink()
        with tempfile.TemporaryDirectory() as scratch:
            extensions = [
                Extension(
                    module,
                    [str(Path(self.root, *module.split(".")).with_suffix(".pyx"))],
                    extra_compile_args=["-O3"],
                )
                for module in _MODULES
            ]
            modules = cythonize(extensions, build_dir=scratch, quiet=True)
            command = build_ext(Distribution({"ext_modules": modules, "packages": []}))
            command.build_temp, command.build_lib = scratch, self.root
            command.ensure_finalized()
            try:
                command.run()
            except (CompileError, LinkError, PlatformError) as error:
                print(f"Tally will run without its fast paths, at half the speed: {error}", file=sys.stderr)  # noqa: T201
                return
        made = Path(self.root, "pipeline").glob("*/fastpath.*.so")
        build_data["artifacts"] += [path.relative_to(self.root).as_posix() for path in made]
        build_data["pure_python"], build_data["infer_tag"] = False, True
