"""Registries of the scope ``mmseg_inceptionnext``, in which mmengine builds what comes from one of our configs by name.

It puts that scope into a config whose ``_base_`` is ``'mmseg_inceptionnext::…'``, and then looks here. Our classes are
in mmseg's registries, beside those that the configs combine them with; these here are empty, and ask their parents.
"""

import mmseg.registry
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

SCOPE = 'mmseg_inceptionnext'

# Of which packages mmengine knows configs by name, and as what they are installed.
MODULE2PACKAGE[SCOPE] = SCOPE

# mmseg imports these when its own registries are asked, but not when one of theirs asks.
LOCATIONS = [f'mmseg.{part}' for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization')]

REGISTRIES = [
    Registry(parent.name, parent=parent, scope=SCOPE, locations=LOCATIONS)
    for parent in vars(mmseg.registry).values()
    if isinstance(parent, Registry)
]
