"""``python -m lightning_attn2_ext demo``: trains, measures and samples a small language model on this machine.

data.py takes text that every machine has, model.py is the model (its token mixer is ``torch.ops.la2.forward``),
train.py trains it, speed.py times the mixer against softmax attention, generate.py writes with
``torch.ops.la2.decode`` from the carried state, plot.py draws, cli.py tells the story. ``demo generate`` (serve.py)
lets engine.py serve several requests at once, from a pool of states.
"""
