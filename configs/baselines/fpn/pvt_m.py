_base_ = './pvt_s.py'
model = dict(backbone=dict(arch='medium'))
