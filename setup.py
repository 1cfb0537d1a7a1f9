"""Everything is in pyproject.toml but the configs, which a wheel carries where OpenMMLab's tools look for them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, 'mmseg_inceptionnext', '.mim', 'configs')
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            shutil.copytree('configs', target, ignore=shutil.ignore_patterns('__pycache__'))


setup(cmdclass={'build_py': BuildWithConfigs})
