"""One PPO step in plain numpy, written from the papers, one number at a time; imports nothing of the package.

Its inputs and results are kept in fixtures/golden_step.json, which this script writes:

    python tests/proof/golden_step.py

Sources. Rewards: Ziegler et al. 2019 (arXiv 1909.08593), §2, R = r − β log(π/ρ), paid token by token. Advantages:
Schulman et al. 2016 (arXiv 1506.02438), Eq. 16, summed as written there. Whitening, value clip and ½: the code released
with Ziegler et al. Policy loss: Schulman et al. 2017 (arXiv 1707.06347), Eq. 7. Whole loss: Eq. 9 there, as a loss.
"""

import json
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).with_name("fixtures") / "golden_step.json"
SETTINGS = {
    "plain": dict(gamma=1.0, lam=0.95, kl_coef=0.05, clip_eps=0.2, value_clip_eps=0.2, vf_coef=0.1, ent_coef=0.0),
    "discounted": dict(gamma=0.9, lam=0.8, kl_coef=0.3, clip_eps=0.1, value_clip_eps=0.5, vf_coef=0.5, ent_coef=0.01),
}
LENGTHS = [5, 1, 3, 4]  # of the responses; the rest of a row is padding
VOCABULARY, LONGEST = 7, 5


def made_inputs() -> dict:
    """A batch as rollout and update see it: the policy then and now, the reference, the critic, the scores."""
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), LONGEST)
    tokens = rng.integers(VOCABULARY, size=shape)
    old_logits = rng.normal(size=(*shape, VOCABULARY))
    logits = old_logits + 0.3 * rng.normal(size=old_logits.shape)
    ref_logits = old_logits + 0.5 * rng.normal(size=old_logits.shape)
    old_values = rng.normal(size=shape)
    return {
        "lengths": LENGTHS,
        "tokens": tokens,
        "logits": logits,
        "old_log_probs": chosen_log_probs(old_logits, tokens),
        "ref_log_probs": chosen_log_probs(ref_logits, tokens),
        "old_values": old_values,
        "values": old_values + 0.4 * rng.normal(size=shape),
        "scores": rng.normal(size=len(LENGTHS)),
    }


def log_softmax(z):
    return z - np.log(np.exp(z).sum())


def chosen_log_probs(logits, tokens):
    chosen = np.zeros(tokens.shape)
    for place, token in np.ndenumerate(tokens):
        chosen[place] = log_softmax(logits[place])[token]
    return chosen


def episode_rewards(score, log_probs, ref_log_probs, kl_coef):
    """r_t = −β (log π_old − log π_ref), and the score on the last token."""
    rewards = [-kl_coef * (p - q) for p, q in zip(log_probs, ref_log_probs, strict=True)]
    rewards[-1] += score
    return rewards


def episode_advantages(rewards, values, gamma, lam):
    """Â_t = Σ_l (γλ)^l δ_{t+l}; the value after the last token is 0."""
    length = len(rewards)
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(length - t)) for t in range(length)]


def step(inputs: dict, settings: dict) -> dict:
    """Everything that one PPO step computes from a batch, as padded lists and numbers."""
    gamma, lam = settings["gamma"], settings["lam"]
    rewards, advantages = [], []
    for row, n in enumerate(inputs["lengths"]):
        old, ref = inputs["old_log_probs"][row][:n], inputs["ref_log_probs"][row][:n]
        rewards.append(episode_rewards(inputs["scores"][row], old, ref, settings["kl_coef"]))
        advantages.append(episode_advantages(rewards[-1], inputs["old_values"][row][:n], gamma, lam))
    returns = [[a + v for a, v in zip(x, inputs["old_values"][row], strict=False)] for row, x in enumerate(advantages)]

    together = np.concatenate(advantages)
    mean, variance = together.mean(), ((together - together.mean()) ** 2).mean()
    white = [[(a - mean) / np.sqrt(variance + 1e-8) for a in row] for row in advantages]

    policy_terms, value_terms, entropies, clipped = [], [], [], []
    for row, n in enumerate(inputs["lengths"]):
        for t in range(n):
            distribution = log_softmax(inputs["logits"][row][t])
            ratio = np.exp(distribution[inputs["tokens"][row][t]] - inputs["old_log_probs"][row][t])
            allowed = min(max(ratio, 1 - settings["clip_eps"]), 1 + settings["clip_eps"])
            objective = min(ratio * white[row][t], allowed * white[row][t])
            policy_terms.append(-objective)
            clipped.append(objective < ratio * white[row][t])
            value, old, target = inputs["values"][row][t], inputs["old_values"][row][t], returns[row][t]
            near = old + min(max(value - old, -settings["value_clip_eps"]), settings["value_clip_eps"])
            value_terms.append(0.5 * max((value - target) ** 2, (near - target) ** 2))
            entropies.append(-(np.exp(distribution) * distribution).sum())
    policy_loss, value_loss, entropy = np.mean(policy_terms), np.mean(value_terms), np.mean(entropies)
    return {
        "rewards": padded(rewards),
        "advantages": padded(advantages),
        "whitened_advantages": padded(white),
        "returns": padded(returns),
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "clip_fraction": np.mean(clipped),
        "loss": policy_loss + settings["vf_coef"] * value_loss - settings["ent_coef"] * entropy,
    }


def padded(rows):
    """Lists of several lengths as one table, 0 behind each."""
    return np.array([[*row, *[0.0] * (LONGEST - len(row))] for row in rows])


def as_json(values: dict) -> dict:
    """Arrays as nested lists."""
    return {name: np.asarray(value).tolist() for name, value in values.items()}


def fixture() -> dict:
    """The file's content: one batch, and for each setting what the step makes of it."""
    inputs = made_inputs()
    steps = {name: {"settings": s, "expected": as_json(step(inputs, s))} for name, s in SETTINGS.items()}
    return {"inputs": as_json(inputs), "steps": steps}


if __name__ == "__main__":
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(fixture(), indent=1) + "\n", encoding="utf-8")
