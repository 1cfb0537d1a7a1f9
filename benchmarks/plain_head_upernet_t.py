# Our UperNet T with mmseg's UPerHead: what the head alone makes of a training step.
_base_ = '../configs/upernet/inceptionnext_t.py'
model = dict(decode_head=dict(type='UPerHead'))
