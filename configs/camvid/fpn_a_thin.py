# The last part of fpn_a's training, from its last checkpoint: thin things weigh more (chosen on val, docs/camvid.md).
_base_ = './fpn_a.py'
class_weight = [0.3431, 0.292, 3.5, 0.2503, 0.6649, 0.4516, 2.0, 0.9, 0.5815, 1.7614, 2.0]
model = dict(
    decode_head=dict(loss_decode=dict(class_weight=class_weight)),
    auxiliary_head=dict(loss_decode=dict(class_weight=class_weight)),
)
optim_wrapper = dict(optimizer=dict(lr=7e-4))
train_cfg = dict(max_iters=620, val_interval=620)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=30, end=620),
]
