_base_ = './convnext_t.py'
model = dict(backbone=dict(model_name='convnext_small'))
