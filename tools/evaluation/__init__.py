"""HOW GOOD A MODEL IS, and how sure that is. `python -m tools.evaluate` is the door.

A *question* (`questions.py` lists them) turns records into examples, each of one or more *parts*: rows of the model.
Parts are scored in batches, dealt over the ranks (`batches.py`); what is found about a part, a few numbers, goes to disk
at once (`spool.py`), so a killed run goes on and memory holds no logits. Then the parts of an example are merged into one
row of a table, and everything that is said (scores, intervals, slices, comparisons, calibration) is a function of that
table and of weights on its rows (`measures.py`).

    opened -> questions (likelihood, learnt, generation, pseudo) -> batches -> spool -> measures -> intervals, slices,
    compare, calibration -> results
"""
