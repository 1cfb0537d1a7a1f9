"""Say what is installed, what is wrong with it, and the commands that mend it."""

import runpy
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    # The file is run by its path: importing the package imports mmseg, and that may be what is broken.
    runpy.run_path(str(Path(find_spec('mmseg_inceptionnext').origin).with_name('doctor.py')), run_name='__main__')


if __name__ == '__main__':
    main()
