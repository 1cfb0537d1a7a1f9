_base_ = './resnet_50.py'
model = dict(backbone=dict(type='ResNeXt', depth=101, groups=32, base_width=4))
