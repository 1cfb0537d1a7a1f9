# A data set of your own with two classes, on the Semantic FPN recipe. In the annotations 0 is road, 1 is the rest, and
# 255 is ignored. A class that is not to be learned at all needs reduce_zero_label=True instead, as ADE20K has it.
_base_ = '../../configs/fpn/inceptionnext_t.py'

metainfo = dict(classes=('road', 'other'), palette=[[128, 64, 128], [200, 200, 200]])
num_classes = 2
data_root = 'data/roads'

model = dict(decode_head=dict(num_classes=num_classes))
train_pipeline = _base_.train_pipeline
test_pipeline = _base_.test_pipeline
for pipeline in (train_pipeline, test_pipeline):
    next(t for t in pipeline if t['type'] == 'CheckAnnotation')['num_classes'] = num_classes
del pipeline

train_dataset = dict(
    _delete_=True,
    type='BaseSegDataset',
    metainfo=metainfo,
    data_root=data_root,
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    pipeline=train_pipeline,
)
test_dataset = dict(
    train_dataset,
    data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
    pipeline=test_pipeline,
)
train_dataloader = dict(dataset=train_dataset)
val_dataloader = dict(dataset=test_dataset)
test_dataloader = val_dataloader

# Fewer images need fewer iterations than ADE20K's 20 210.
train_cfg = dict(max_iters=4000, val_interval=500)
param_scheduler = [dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=4000)]
default_hooks = dict(checkpoint=dict(interval=500))
