"""How good a model is, with intervals: tasks, what they ask of a model, and the run over rows.

Generation, likelihoods and scores come in as functions, so nothing here knows a model or a
sampler.
"""
