_base_ = './swin_t.py'
model = dict(backbone=dict(depths=[2, 2, 18, 2]))
