_base_ = './resnext_101_32x4d.py'
model = dict(backbone=dict(groups=64))
