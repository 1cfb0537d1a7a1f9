"""The temperature of a checkpoint, in a file beside it."""

from __future__ import annotations

import json
from pathlib import Path

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.files import file_digest, write_text


def temperature_file(checkpoint: str | Path) -> Path:
    """Return where the temperature of a checkpoint is: ``iter_160000.pth.temperature.json``."""
    checkpoint = Path(checkpoint).expanduser()
    return checkpoint.with_name(f'{checkpoint.name}.temperature.json')


def write_temperature(checkpoint: str | Path, fitted: dict, digest: str | None = None) -> Path:
    """Write a fitted temperature beside its checkpoint, and return the path.

    Args:
        checkpoint: The checkpoint.
        fitted: ``temperature``, and what else is known of it.
        digest: The checkpoint's, as it was when it was read; by default, as it is now.

    Raises:
        OSError: It cannot be written.
    """
    path = temperature_file(checkpoint)
    digest = digest or file_digest(Path(checkpoint).expanduser())
    write_text(path, json.dumps(dict(fitted, checkpoint=digest), indent=1) + '\n')
    return path


def read_temperature(checkpoint: str | Path) -> float:
    """Return the temperature of a checkpoint: by which its logits are divided; 1 if none was fitted.

    Raises:
        UserError: The file is damaged, or was fitted for another checkpoint.
    """
    path = temperature_file(checkpoint)
    if not path.exists():
        return 1.0
    advice = f'fit it again by `test --temperature fit`, or remove {path.name}'
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        temperature, digest = float(content['temperature']), content['checkpoint']
        if not 0 < temperature < float('inf'):
            raise ValueError(f'temperature {temperature}')
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f'{path} holds no temperature ({type(error).__name__}): {advice}') from error
    if digest != file_digest(Path(checkpoint).expanduser()):
        raise UserError(f'{path} was fitted for another checkpoint than {checkpoint}: {advice}')
    return temperature
