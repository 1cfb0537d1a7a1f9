_base_ = './inceptionnext_t.py'
model = dict(backbone=dict(arch='small', drop_path_rate=0.3))  # Table 9
