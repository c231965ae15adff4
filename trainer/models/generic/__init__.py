"""Any language or vision-language model of transformers: its own class trains, and its folder describes it.

family.py               the answers to what the trainer asks of a family (trainer/models/family.py)
  model_parts.py          where its blocks, tower and projector are
  conversions.py          the names and forms of its tensors in published folders
  chat.py                 its chat template: turns → token ids, and which of them train
  pictures.py             its processor: pictures → tensors, and their tokens from the size alone
    load_processor.py       a processor without torchvision
    picture_shapes.py       its code run on shapes
modeling.py             the training forward: packed rows, loss on supervised positions
  packed_attention.py     attention and other token mixers, one sample at a time
  tower_attention.py      attention of a vision tower, one picture or window at a time
  slots.py                features of pictures into their slots
  picture_sizes.py        positions and bounds from sizes, on the host
  own_head.py             output layers with more than a product
answers.py              what single families need beside all this, in a line or two each
"""
