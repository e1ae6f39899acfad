"""``bench paper``: what the papers claim and what they leave open, measured on the machine at hand.

One module an experiment: lengths.py (a), training.py (b), inference.py (c), ablation.py (d), longest.py (e), loss.py
(f), layers.py (g). Each has ``LETTER``, ``TITLE``, ``points(run)`` (the configurations, the important ones first),
``measure(run, config)``, ``section(rows)``, ``draw(folder, rows, caption)`` and ``release()``. run.py is what they need
of the machine, store.py keeps one JSON file for each measured point, claims.py has the papers' numbers, results.py
writes RESULTS.md from the files alone, cli.py is the command.
"""
