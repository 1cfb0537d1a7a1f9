"""The metafiles say of each recipe what its config, the counter and the paper's tables say."""

import pytest
from mmengine.fileio import load
from support import ROOT

from mmseg_inceptionnext.config import read_config
from mmseg_inceptionnext.measure.complexity import measure_complexity
from mmseg_inceptionnext.measure.paper import paper_row

RECIPES = sorted(
    f'{path.parent.name}/{path.stem}' for f in ('upernet', 'fpn') for path in (ROOT / 'configs' / f).glob('*.py')
)
MODELS = {
    model['Name']: model for path in load(ROOT / 'model-index.yml')['Import'] for model in load(ROOT / path)['Models']
}


def test_every_recipe_is_listed_once():
    imported = load(ROOT / 'model-index.yml')['Import']
    listed = [model['Name'] for path in imported for model in load(ROOT / path)['Models']]
    assert sorted(listed) == RECIPES and len(RECIPES) == 8
    assert sorted(imported) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('metafile.*'))


@pytest.mark.parametrize('name', RECIPES)
def test_schedule_and_cost_are_those_of_the_config(name):
    model = MODELS[name]
    cfg, cost = read_config(ROOT / model['Config']), measure_complexity(ROOT / model['Config'])
    height, width = cost.shape
    facts = model['Metadata']
    assert model['Config'] == f'configs/{name}.py'
    assert facts['Batch Size'] == cfg.auto_scale_lr.base_batch_size
    assert facts['Iterations'] == cfg.train_cfg.max_iters
    assert facts['Parameters'] == round(cost.params_m * 1e6)
    assert facts[f'MACs at {height}x{width}'] == round(cost.gmacs * 1e9)
    assert facts['Architecture'][0] == f'InceptionNeXt-{cfg.model.backbone.arch[0].upper()}'


@pytest.mark.parametrize('name', RECIPES)
def test_miou_is_the_papers_and_says_so(name):
    model, row = MODELS[name], paper_row(ROOT / MODELS[name]['Config'])
    if row is None:
        assert 'Results' not in model and 'Source of mIoU' not in model['Metadata']
        return
    (result,) = model['Results']
    metric = 'mIoU(ms+flip)' if name.startswith('upernet') else 'mIoU'
    assert result['Metrics'] == {metric: row.miou}
    assert model['Metadata']['Source of mIoU'].endswith('of the paper, not measured here')  # `mim search` prints it


def test_weights_are_not_promised():
    """There are none: a `Weights` key is what tools would download."""
    assert not any('Weights' in model for model in MODELS.values())
