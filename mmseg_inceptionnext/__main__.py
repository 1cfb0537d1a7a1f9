"""Run the tools as ``python -m mmseg_inceptionnext COMMAND …``, from any folder, without a checkout."""

import ast
import runpy
import sys
from pathlib import Path

from mmseg_inceptionnext.command_line import SHORT_NAMES, run
from mmseg_inceptionnext.config_files import shipped_folder
from mmseg_inceptionnext.errors import UserError


def main() -> None:
    tools = {SHORT_NAMES.get(path.stem, path.stem): path for path in sorted(shipped_folder('tools').glob('*.py'))}
    if len(sys.argv) == 1:
        print(usage(tools), file=sys.stderr)
        sys.exit(2)
    name = sys.argv.pop(1)
    if name in ('-h', '--help'):
        print(usage(tools))
    elif name in tools:
        runpy.run_path(str(tools[name]), run_name='__main__')
    else:
        raise UserError(f'no command {name!r}: choose one of {", ".join(sorted(tools))}')


def usage(tools: dict[str, Path]) -> str:
    """Return the usage, with the first line of each tool's docstring."""
    lines = ['usage: python -m mmseg_inceptionnext COMMAND …   (COMMAND --help says more)', '']
    for name, path in sorted(tools.items()):
        lines.append(f'  {name:<12} {ast.get_docstring(ast.parse(path.read_bytes())).splitlines()[0]}')
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main)
