"""Everything is in pyproject.toml but what a wheel carries in `.mim`, where OpenMMLab's tools look for it.

In a checkout, and so in an editable install, `mmseg_inceptionnext/.mim` holds links to the same files.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, 'mmseg_inceptionnext', '.mim')
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build
            for folder in ('configs', 'tools'):
                shutil.copytree(folder, target / folder, ignore=shutil.ignore_patterns('__pycache__'))
            shutil.copy('model-index.yml', target)


setup(cmdclass={'build_py': BuildWithRecipes})
