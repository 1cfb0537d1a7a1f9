_base_ = './resnet_50.py'
model = dict(backbone=dict(depth=101))
