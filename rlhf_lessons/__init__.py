"""rlhf_lessons: the equations of RLHF, each one readable function, each tested against an exact answer.

An import may only go down this list. Importing the package, or any estimator, loads torch alone.

    estimators   masking, policy_gradient, baselines, advantages, importance, ppo, preferences, kl
    oracle       exact, gridworld
    parts        config, checkpoint, device, forward, adapters, models, tiny_reviews, tiny_sums, data
    flow         generation, likelihood, scoring, rollout, fitting, trainer, group_trainers
    engines      engines: samplers by another engine, imported when asked for
    side         checks, display, plots, record: for the notebooks
    surface      __main__ (python -m rlhf_lessons), app
"""

__version__ = "0.1.0"
