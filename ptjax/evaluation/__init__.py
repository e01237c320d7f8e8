"""How good a policy is, with intervals: tasks, pass@k and maj@k, and the run over held-out rows.

Generation comes in as a function, so nothing here knows a model or a sampler.
"""
