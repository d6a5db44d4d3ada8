"""Checks of the exercises and bug hunts, one per exercise: `checks.gae(my_gae)`.

A check prints "not attempted yet" while the learner's function returns NotImplemented, and "correct" when it agrees
with the package's own on every input. Otherwise it raises AssertionError with a hint: the misconception behind the
answer where it is a known one, else the first input on which it is wrong.
"""

from rlhf_lessons.checks.capstone import my_credit, my_losses, my_step
from rlhf_lessons.checks.faults import FAULTS
from rlhf_lessons.checks.lesson_00 import four_models, two_oddities
from rlhf_lessons.checks.lesson_01 import action_log_probs, shift_by_one
from rlhf_lessons.checks.lesson_02 import bradley_terry_loss, last_real_token
from rlhf_lessons.checks.lesson_03 import gradient_through_return, policy_gradient_loss
from rlhf_lessons.checks.lesson_04 import peeking_baseline, reward_to_go
from rlhf_lessons.checks.lesson_05 import gae, next_episode
from rlhf_lessons.checks.lesson_06 import importance_ratio, missing_support
from rlhf_lessons.checks.lesson_07 import clipped_policy_loss, max_for_min
from rlhf_lessons.checks.lesson_08 import late_score, sampled_kl, shaped_rewards
from rlhf_lessons.checks.lesson_09 import left_padding, value_head
from rlhf_lessons.checks.lesson_10 import aligned_by_you, diagnose, faulty_runs, healthy_run
from rlhf_lessons.checks.lesson_11 import kl_loss, other_way
from rlhf_lessons.checks.lesson_12 import group_advantages, one_scale_for_all
from rlhf_lessons.checks.lesson_13 import dpo_loss, lost_reference
from rlhf_lessons.checks.lesson_14 import best_of_n, same_sample_twice
from rlhf_lessons.checks.lesson_15 import is_right, own_question
from rlhf_lessons.checks.lesson_16 import stale_engine, truncated_ratio

__all__ = [
    "FAULTS",
    "action_log_probs",
    "aligned_by_you",
    "best_of_n",
    "bradley_terry_loss",
    "clipped_policy_loss",
    "diagnose",
    "dpo_loss",
    "faulty_runs",
    "four_models",
    "gae",
    "gradient_through_return",
    "group_advantages",
    "healthy_run",
    "importance_ratio",
    "is_right",
    "kl_loss",
    "last_real_token",
    "late_score",
    "left_padding",
    "lost_reference",
    "max_for_min",
    "missing_support",
    "my_credit",
    "my_losses",
    "my_step",
    "next_episode",
    "other_way",
    "own_question",
    "one_scale_for_all",
    "peeking_baseline",
    "policy_gradient_loss",
    "reward_to_go",
    "same_sample_twice",
    "sampled_kl",
    "shaped_rewards",
    "shift_by_one",
    "stale_engine",
    "truncated_ratio",
    "two_oddities",
    "value_head",
]
