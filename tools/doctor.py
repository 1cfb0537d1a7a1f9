"""Say what is installed, what is wrong with it, and the commands that fix it."""

import runpy
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    # The file is run by its path: importing the package imports mmseg, and that may be what is broken. In a checkout
    # the package may not be installed at all.
    spec = find_spec('mmseg_inceptionnext')
    package = Path(spec.origin).parent if spec else Path(__file__).resolve().parents[1] / 'mmseg_inceptionnext'
    runpy.run_path(str(package / 'doctor.py'), run_name='__main__')


if __name__ == '__main__':
    main()
