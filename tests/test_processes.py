"""Several processes that share a batch: the library's trainers, started over gloo as `torchrun` starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, count_good, tiny_lm, tiny_policy, tiny_trainer, word_tokenizer
from test_trainer import EVAL_PROMPTS, assert_all_close, copies, parameter_hash, without_times

from rlhf_lessons import forward
from rlhf_lessons.config import GRPOConfig
from rlhf_lessons.device import end_processes, gather_rows, make_accelerator
from rlhf_lessons.group_trainers import GRPOTrainer

SIZES = dict(batch_size=16, minibatch_size=8, gradient_accumulation_steps=2, ppo_epochs=2, max_new_tokens=6)
SHARED = SIZES | dict(target_kl=100.0, learning_rate=1e-3, device="cpu", num_iterations=4)

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo",
)


def starting(count, *words, **environment):
    """A launcher of so many processes of a script or module: what `subprocess` is to start, and how."""
    # Standalone: the launcher keeps the port that it draws.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return dict(args=[*launch, *map(str, words)], env=environment, text=True)


def launched(count, *words, cwd=None, **environment):
    """What came of it."""
    return subprocess.run(**starting(count, *words, **environment), cwd=cwd, capture_output=True, timeout=240)


def results_of(count, script, folder, **environment):
    """What each process of a file of tests saved."""
    result = launched(count, script, folder, **environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def small_trainers():
    """PPO and GRPO with much to go wrong: adaptive β, pieces, an early stop, rows that end at different steps."""
    yield "ppo", tiny_trainer(**SHARED, normalize_scores=True, adaptive_kl_target=1.0, adaptive_kl_horizon=100)
    config = GRPOConfig(**SHARED, samples_per_prompt=4, kl_in="loss", kl_kind="k3")
    yield "grpo", GRPOTrainer(config, tiny_lm(), tiny_lm(seed=1), count_good, PROMPTS, word_tokenizer())
    policy, reference = (tiny_policy(head=0.1, vocab_size=80), tiny_lm(seed=1, vocab_size=80))
    forward.LARGE = 0  # for who steps before asking for the next: the processes do, what they are held against does not
    yield "large vocabulary", tiny_trainer(policy, reference, **SHARED, ent_coef=0.1)
    forward.LARGE = 2**26


def outcome(trainer):
    """Two iterations: what was sampled, what was learnt from, where it led."""
    history, batches = [], []
    for _ in range(2):
        history.append(without_times(trainer.step()))
        batches.append({name: x for name, x in vars(trainer.batch).items() if isinstance(x, torch.Tensor)})
    return dict(
        history=history, batches=batches, parameters=copies(trainer.policy), hash=parameter_hash(trainer.policy)
    )


def evaluation_of_five():
    """One that 2 and 4 processes cannot share out evenly, in batches of 4 and 1."""
    sizes = dict(batch_size=4, minibatch_size=4, whiten_advantages=False)
    metrics, rollout = tiny_trainer(eval_prompts=EVAL_PROMPTS[:5], **sizes).evaluate()
    return metrics, rollout.tokens


def share_a_batch(folder):
    """What each process runs to share a batch."""
    results = {name: outcome(trainer) for name, trainer in small_trainers()}
    accelerator = make_accelerator("cpu")
    results["processes"], results["refused"] = accelerator.num_processes, []
    own = torch.full((2, 3 + accelerator.process_index), accelerator.process_index + 1)  # each process's are longer
    results["gathered"] = gather_rows(accelerator, own, padding=9)
    results["evaluated"] = evaluation_of_five()
    for sizes in (dict(batch_size=15, minibatch_size=5), dict(batch_size=16, samples_per_prompt=16)):
        try:
            tiny_trainer(**sizes)
        except ValueError as error:
            results["refused"].append(str(error))
    torch.save(results, f"{folder}/{accelerator.process_index}.pt")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def processes(tmp_path_factory, request):
    """The results of each of several processes that share a batch."""
    return results_of(request.param, __file__, tmp_path_factory.mktemp("batch"))


@pytest.mark.detail(35)
@pytest.mark.detail(37)
@pytest.mark.parametrize("method", ["ppo", "grpo", "large vocabulary"])
def test_a_seed_means_one_run_in_any_number_of_processes(processes, method):
    """The same tokens, the same credit for them, the same steps: whitening and groups are over the whole batch."""
    expected = outcome(dict(small_trainers())[method])
    lengths = expected["batches"][0]["response_mask"].sum(dim=1)
    assert lengths.unique().numel() > 2, "rows of one length would prove less"
    for result in processes:
        assert result["processes"] == len(processes)
        result = result[method]
        for got, wanted in zip(result["batches"], expected["batches"], strict=True):
            assert torch.equal(got["tokens"], wanted["tokens"])
            for name, x in wanted.items():
                torch.testing.assert_close(got[name], x, atol=1e-5, rtol=1e-5)
        for got, wanted in zip(result["history"], expected["history"], strict=True):
            assert got == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert_all_close(result["parameters"], expected["parameters"], atol=1e-5, rtol=0)
    assert len({result[method]["hash"] for result in processes}) == 1, "one model"


def test_evaluation_prompts_are_shared_out_and_none_counts_twice(processes):
    metrics, tokens = evaluation_of_five()
    for got, answers in (result["evaluated"] for result in processes):
        assert got == pytest.approx(metrics, abs=1e-5) and torch.equal(answers, tokens) and len(tokens) == 5


def test_rows_of_all_processes_are_gathered_padded_on_the_right(processes):
    longest = 2 + len(processes)
    wanted = [[rank + 1] * (3 + rank) + [9] * (longest - 3 - rank) for rank in range(len(processes)) for _ in range(2)]
    assert all(result["gathered"].tolist() == wanted for result in processes)


def test_sizes_that_cannot_be_shared_out_are_refused(processes):
    count = len(processes)
    for result in processes:
        assert result["refused"] == [
            f"batch_size must be a multiple of {count}, 1 for each of {count} processes; got 15",
            f"batch_size must be a multiple of {16 * count}, 16 for each of {count} processes; got 16",
        ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    share_a_batch(Path(sys.argv[1]))
    end_processes()
