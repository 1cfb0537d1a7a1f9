"""Segment an image with an exported file, by numpy, Pillow and onnxruntime alone.

    python examples/onnx_only.py model.onnx street.jpg out.png

It does by hand what docs/deploy.md says about a file of tools/export.py: resize the image, lay it out, run the graph,
take the argmax where the file returns logits, and write the label map in the coding of the data set's annotations.
Pillow's bilinear resize differs a little from OpenCV's, which the tools use: borders may be a pixel off where it is
needed.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def main(model: str, image: str, out: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    text = session.get_modelmeta().custom_metadata_map
    facts = {key: json.loads(value) for key, value in text.items() if key != 'format'}

    if facts['input']['channels'] != 'RGB':
        sys.exit(f'{model} takes images of {facts["input"]["channels"]} channels, and this example reads RGB')
    picture = Image.open(image).convert('RGB')
    size = picture.size
    for step in facts['prepare']:
        picture = picture.resize(new_size(picture.size, step), Image.Resampling.BILINEAR)
    if facts['input']['height']:  # a file for one size
        picture = picture.resize((facts['input']['width'], facts['input']['height']), Image.Resampling.BILINEAR)

    pixels = np.asarray(picture, facts['input']['dtype']).transpose(2, 0, 1)[None]  # (1, 3, H, W), RGB, 0 … 255
    result, *_ = session.run(None, {session.get_inputs()[0].name: pixels})
    if facts['output'] == 'labels':
        labels = result[0]
    elif facts['threshold'] is None:
        labels = result[0].argmax(0)
    else:  # one logit, of class 1
        labels = 1 / (1 + np.exp(-result[0, 0])) > facts['threshold']

    codes = np.array(facts['codes'])  # what annotations hold for each class: an id or a colour
    codes = codes.astype(np.uint8 if codes.max() < 256 else np.uint16)
    Image.fromarray(codes[labels.astype(int)]).resize(size, Image.Resampling.NEAREST).save(out)
    for label in np.unique(labels):
        print(f'{facts["classes"][int(label)]}: {np.mean(labels == label):.1%}')


def new_size(size: tuple[int, int], step: dict) -> tuple[int, int]:
    """Return the width and height that a Resize or a ResizeToMultiple of mmseg makes of an image."""
    if step['type'] == 'ResizeToMultiple':
        divisor = step.get('size_divisor', 32)
        return tuple(-(-side // divisor) * divisor for side in size)
    if not step.get('keep_ratio'):
        return tuple(step['scale'])
    factor = min(max(step['scale']) / max(size), min(step['scale']) / min(size))
    return tuple(int(side * factor + 0.5) for side in size)


if __name__ == '__main__':
    if len(sys.argv) != 4:
        sys.exit('usage: onnx_only.py MODEL.onnx IMAGE OUT.png')
    main(*sys.argv[1:])
