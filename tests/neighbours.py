"""Run the tests of mmengine, mmseg or another library with and without our package imported, and print what differs.

    python tests/neighbours.py [SOURCE_TREE …]

A source tree has a folder `tests`, such as a checkout or an unpacked sdist of the version that is installed. Without
one, the sdist of the installed mmengine is downloaded; mmseg's comes with few tests. Tests that fail both ways, for
want of a GPU, data or a package, are not our concern. The exit code is 1 if anything differs.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('trees', nargs='*', type=Path, metavar='SOURCE_TREE')
    args = parser.parse_args()
    differences = 0
    with tempfile.TemporaryDirectory() as folder:
        for tree in args.trees or [download_mmengine(Path(folder))]:
            alone, beside = (outcomes(tree, Path(folder), plugin) for plugin in ((), ('-p', 'mmseg_inceptionnext')))
            passed = sum(outcome == 'passed' for outcome in alone.values())
            print(f'{tree.name}: {passed} of {len(alone)} tests pass without mmseg_inceptionnext')
            for test in sorted(alone.keys() | beside.keys()):
                before, after = alone.get(test, 'missing'), beside.get(test, 'missing')
                if before != after:
                    differences += 1
                    print(f'  {test}: {before} without, {after} with it')
    print(f'{differences} tests differ')
    return int(differences > 0)


def download_mmengine(folder: Path) -> Path:
    """Download and unpack the sdist of the mmengine that is installed."""
    for name in ('onedl-mmengine', 'mmengine'):
        try:
            requirement = f'{name}=={version(name)}'
        except PackageNotFoundError:
            continue
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', ':all:', requirement]
        subprocess.run([*command, '--dest', folder], check=True)
        with tarfile.open(next(folder.glob('*.tar.gz'))) as archive:
            archive.extractall(folder, filter='data')
        return next(path.parent for path in folder.glob('*/tests'))
    raise SystemExit('error: mmengine is not installed: name a source tree')


def outcomes(tree: Path, folder: Path, plugin: tuple[str, ...]) -> dict[str, str]:
    """Return 'passed', 'failed' or 'skipped' of each test of a tree."""
    report = folder / 'report.xml'
    report.unlink(missing_ok=True)
    command = [sys.executable, '-m', 'pytest', *plugin, '-q', '-p', 'no:cacheprovider', '--junit-xml', report]
    command += ['--continue-on-collection-errors', 'tests']
    process = subprocess.run(
        command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if not report.is_file():
        raise SystemExit(f'error: pytest did not finish in {tree}:\n{process.stdout[-2000:]}')
    found = {}
    for case in ElementTree.parse(report).iter('testcase'):
        kinds = {child.tag for child in case}
        outcome = 'failed' if kinds & {'failure', 'error'} else 'skipped' if 'skipped' in kinds else 'passed'
        found[f'{case.get("classname")}::{case.get("name")}'] = outcome
    return found


if __name__ == '__main__':
    sys.exit(main())
