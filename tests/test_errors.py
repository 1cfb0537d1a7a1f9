"""The exceptions stand below everything else, so that any module can raise them."""

import ast
import sys

import pytest
from support import ROOT

from mmseg_inceptionnext import UserError
from mmseg_inceptionnext.errors import BadSample, first_sentence, one_line


@pytest.mark.parametrize('name', ['errors', 'files', 'version', 'doctor'])
def test_the_lowest_modules_import_python_and_each_other_alone(name):
    tree = ast.parse((ROOT / 'mmseg_inceptionnext' / f'{name}.py').read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    assert {name.split('.')[0] for name in names - {'mmseg_inceptionnext.errors'}} <= set(sys.stdlib_module_names)


def test_a_line_is_printable_and_without_the_traceback_of_a_worker():
    wrapped = UserError("Traceback …\nmmseg_inceptionnext.errors.BadSample: a\nb\x1b[31m's.png is empty\n")
    assert one_line(wrapped) == "a\\nb\\x1b[31m's.png is empty"
    assert one_line(BadSample('x.png is empty')) == 'x.png is empty'


def test_a_librarys_advice_is_left_out():
    assert first_sentence(RuntimeError('It failed. You may want to reinstall.\nSee …')) == 'It failed'
