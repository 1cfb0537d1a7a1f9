import numpy as np

from mmseg_inceptionnext.drawing import draw_comparison, draw_overlay

PALETTE = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_overlay_blends_known_labels_and_leaves_the_rest():
    image = np.full((1, 3, 3), 100, np.uint8)
    blended = draw_overlay(image, np.array([[0, 2, 255]]), PALETTE, opacity=0.5)
    assert blended.tolist() == [[[178, 50, 50], [50, 50, 178], [100, 100, 100]]]


def test_comparison_shows_three_panels_and_the_classes_that_are_there():
    image = np.full((60, 80, 3), 90, np.uint8)
    truth, prediction = np.zeros((60, 80), int), np.full((60, 80), 255)
    truth[:, 40:] = 255
    names = ['sky ', 'sea', 'an absent class']
    picture = np.asarray(draw_comparison(image, truth, prediction, names, PALETTE))
    assert picture.shape[1] == 3 * 80 + 2 * 8
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
    assert (90, 90, 90) in colours and (255, 0, 0) in colours  # the image; the legend of the only class
    assert (0, 255, 0) not in colours and (0, 0, 255) not in colours


def test_legend_wraps_instead_of_running_out_of_the_picture():
    image = np.zeros((40, 60, 3), np.uint8)
    labels = np.arange(60)[None].repeat(40, 0) % 20
    names = [f'class number {i}' for i in range(20)]
    palette = [(10 * i, 255 - 10 * i, 128) for i in range(20)]
    picture = np.asarray(draw_comparison(image, labels, labels, names, palette))
    colours = {tuple(colour) for colour in picture[60:].reshape(-1, 3)}
    assert all(colour in colours for colour in palette)


def test_nothing_labelled_at_all():
    blank = np.full((40, 60), 255)
    draw_comparison(np.zeros((40, 60, 3), np.uint8), blank, blank, ['sky'], PALETTE)
