"""rlhf_lessons: the equations of RLHF, each one readable function, each tested against an exact answer.

An import may only go down this list. Importing the package, or any estimator, loads torch alone.

    estimators   masking, policy_gradient, baselines, advantages, importance, ppo, preferences, kl
    oracle       exact, gridworld
    parts        models, tiny_reviews, data
    flow         fitting, rollout, decoding, trainer
    surface      __main__ (python -m rlhf_lessons), parser, sources, stages, report, record, equations, bench
    side         checks, display, plots: for the notebooks
"""

__version__ = "0.1.0"
