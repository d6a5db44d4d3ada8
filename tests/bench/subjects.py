"""The subjects: this package's code and its peers', each a function (channel, shape, work) that serves rounds."""

import os
import tempfile
from collections.abc import Callable

import torch

from bench import workload
from bench.channel import Channel
from bench.workload import PAD, Shape, Work

NEVER = -1  # as the EOS id: no token has it, so no response ends early
LEARNING_RATE = 1e-5

# --- generalised advantage estimation -------------------------------------------------------------


def episodes() -> dict[str, torch.Tensor]:
    """64 rows of 64 steps, a tenth of them terminations."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator)
    return dict(rewards=rewards, values=values, terminated=torch.rand(64, 64, generator=generator) < 0.1)


def gae_ours(channel: Channel, shape: Shape | None, work: Work) -> None:
    from rlhf_lessons.advantages import gae

    data = episodes()
    channel.serve(lambda: gae(**data, gamma=0.99, lam=0.95))


def gae_loop(channel: Channel, shape: Shape | None, work: Work) -> None:
    from rlhf_lessons.advantages import gae_recursion

    data = episodes()
    channel.serve(lambda: gae_recursion(**data, gamma=0.99, lam=0.95))


def gae_torchrl(channel: Channel, shape: Shape | None, work: Work) -> None:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate as peer

    data = {name: value[..., None] for name, value in episodes().items()}
    values, end = data["values"], data["terminated"]
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    channel.serve(lambda: peer(0.99, 0.95, values, following, data["rewards"], end, end))


# --- sampling -------------------------------------------------------------------------------------


def sampling_inputs(shape: Shape, work: Work, *, as_saved: bool = False):
    """A model on the device, and prompts whose first tokens are padding in every third row."""
    lm = workload.language_model(shape, as_saved=as_saved).to(work.device).eval()
    ids = torch.randint(3, shape.vocabulary, (work.rows, work.prompt_tokens), device=work.device)
    mask = torch.ones_like(ids)
    mask[::3, : work.prompt_tokens // 4] = 0
    return lm, ids, mask


def autocast(work: Work):
    return torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16")


def call_of(sampler: Callable, shape: Shape, work: Work) -> Callable[[], None]:
    """A batch of responses by one of our samplers."""
    lm, ids, mask = sampling_inputs(shape, work)
    generator = torch.Generator().manual_seed(0)
    options = dict(max_new_tokens=work.new_tokens, eos_id=NEVER, pad_id=PAD, generator=generator)

    def sample() -> None:
        with autocast(work):
            sampler(lm, ids, mask.bool(), **options)

    return sample


def sampling_ours(channel: Channel, shape: Shape, work: Work) -> None:
    from rlhf_lessons.generation import sample_responses

    channel.serve(call_of(sample_responses, shape, work))


def sampling_static(channel: Channel, shape: Shape, work: Work) -> None:
    from rlhf_lessons.engines.static import StaticSampler

    channel.serve(call_of(StaticSampler(), shape, work))


def sampling_replay(channel: Channel, shape: Shape, work: Work) -> None:
    """A response's steps after its first token, replayed from their graph with nothing else done: the limit."""
    from rlhf_lessons.engines.static import StaticSampler

    sampler = StaticSampler()
    call_of(sampler, shape, work)()
    (decoder,) = sampler.decoders.values()

    def replay() -> None:
        decoder.t.fill_(1)
        for layer in decoder.cache.layers:
            layer.cumulative_length.fill_(decoder.prompt_length)
        for _ in range(work.new_tokens - 1):
            decoder.graph.replay()

    channel.serve(replay)


def sampling_generate(channel: Channel, shape: Shape, work: Work, *, fast: bool = False) -> None:
    lm, ids, mask = sampling_inputs(shape, work, as_saved=not fast)
    options = dict(max_new_tokens=work.new_tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0)
    options |= dict(pad_token_id=PAD, eos_token_id=[], return_dict_in_generate=True, output_scores=True)

    @torch.no_grad()
    def run() -> None:
        with autocast(work):
            output = lm.generate(ids, attention_mask=mask, **options)
        assert len(output.scores) == work.new_tokens

    channel.serve(run)


def sampling_generate_fast(channel: Channel, shape: Shape, work: Work) -> None:
    sampling_generate(channel, shape, work, fast=True)


# --- one PPO iteration ----------------------------------------------------------------------------


class Phases:
    """What an iteration's parts cost on some meter, a clock or a counter, by wrapping the calls that make them up."""

    def __init__(self, trainer, read: Callable[[], float]) -> None:
        self.read, self.measured = read, {}
        draw = trainer.sampler
        trainer.sampler = self.metered("sampling", lambda *args, **options: draw(*args, **options | {"eos_id": NEVER}))
        trainer.rollout = self.metered("rollout", trainer.rollout)
        trainer.update = self.metered("update", trainer.update)

    def metered(self, name: str, function):
        def wrapped(*args, **options):
            before = self.read()
            result = function(*args, **options)
            self.measured[name] = self.read() - before
            return result

        return wrapped

    def parts(self) -> dict[str, float]:
        """Sampling, scoring (what else the rollout does), update."""
        found = self.measured
        return {
            "sampling": found["sampling"],
            "scoring": found["rollout"] - found["sampling"],
            "update": found["update"],
        }


def trainer_for(shape: Shape, work: Work, critic: str):
    """This package's trainer for an iteration of that work; on a GPU it samples with fixed shapes."""
    from rlhf_lessons.engines.static import StaticSampler
    from rlhf_lessons.models import CausalLMWithValueHead, RewardModel
    from rlhf_lessons.trainer import PPOConfig, PPOTrainer

    settings = PPOConfig(
        num_iterations=1000, batch_size=work.rows, minibatch_size=work.rows // work.minibatches,
        ppo_epochs=work.epochs, max_new_tokens=work.new_tokens, learning_rate=LEARNING_RATE, lr_schedule="constant",
        device=work.device, precision=work.precision,
    )  # fmt: skip
    policy = CausalLMWithValueHead(workload.language_model(shape), critic=critic)
    return PPOTrainer(
        settings, policy, workload.language_model(shape), RewardModel(workload.classifier(shape)),
        workload.prompts(shape, work, 4 * work.rows), workload.tokenizer(shape),
        sampler=StaticSampler() if work.device == "cuda" else None,
    )  # fmt: skip


def ppo_ours(channel: Channel, shape: Shape, work: Work, *, critic: str = "shared") -> None:
    trainer = trainer_for(shape, work, critic)
    phases = Phases(trainer, channel.clock)

    def run() -> dict:
        metrics = trainer.step()
        return phases.parts() | {
            name: metrics[name] for name in ("optimizer_steps", "response_length", "first_ratio_error")
        }

    channel.serve(run)


def ppo_ours_separate(channel: Channel, shape: Shape, work: Work) -> None:
    ppo_ours(channel, shape, work, critic="separate")


def ppo_flops(channel: Channel, shape: Shape, work: Work, *, critic: str = "shared") -> None:
    """Floating-point operations by phase, counted in a process of its own: counting takes time and memory."""
    from torch.utils.flop_counter import FlopCounterMode

    from rlhf_lessons.generation import sample_responses

    trainer = trainer_for(shape, work, critic)
    trainer.sampler = sample_responses  # the same operations, none of them hidden in a graph
    trainer.rollout()  # each model is tried out when it first reads padding, which is not counted

    if channel.wait():
        with FlopCounterMode(display=False) as counter:
            phases = Phases(trainer, counter.get_total_flops)
            trainer.step()
        channel.report(**phases.parts())


def ppo_flops_separate(channel: Channel, shape: Shape, work: Work) -> None:
    ppo_flops(channel, shape, work, critic="separate")


def update_bare(channel: Channel, shape: Shape, work: Work) -> None:
    """An iteration's optimiser steps with nothing of PPO in them: forward, cross-entropy of the responses, AdamW."""
    lm = workload.language_model(shape).to(work.device).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    rows = work.rows // work.minibatches
    ids = torch.randint(3, shape.vocabulary, (rows, work.prompt_tokens + work.new_tokens), device=work.device)

    def run() -> dict:
        for _ in range(work.optimizer_steps):
            with autocast(work):
                logits = lm(ids, logits_to_keep=work.new_tokens + 1, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), ids[:, work.prompt_tokens :].flatten()
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return {"optimizer_steps": work.optimizer_steps}

    channel.serve(run)


def rounds_of(channel: Channel, work: Work, *, steps: int):
    """A callback of TRL's trainers: ends the clock after that many of their steps and starts it again when asked."""
    from transformers import TrainerCallback

    class Rounds(TrainerCallback):
        """Counts, beside its calls, the optimiser's steps."""

        made = called = 0

        def count(self, *_) -> None:
            self.made += 1

        def on_train_begin(self, *args, **options):
            optimizer = options["optimizer"]
            getattr(optimizer, "optimizer", optimizer).register_step_post_hook(self.count)
            channel.wait()

        def on_step_end(self, *args, **options):
            self.called += 1
            if self.called < steps:
                return
            channel.report(optimizer_steps=self.made, response_length=work.new_tokens)
            self.made = self.called = 0
            if not channel.wait():
                os._exit(0)  # the trainer cannot be told to stop

    return Rounds()


def ppo_trl(channel: Channel, shape: Shape, work: Work) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    rows = work.rows * 64
    tokenizer = workload.tokenizer(shape)
    ids = [{"input_ids": tokenizer(text).input_ids} for text in workload.prompts(shape, work, 4 * work.rows)]
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=work.rows, gradient_accumulation_steps=1,
        num_mini_batches=work.minibatches, num_ppo_epochs=work.epochs, total_episodes=rows,
        local_rollout_forward_batch_size=work.rows, response_length=work.new_tokens, temperature=1.0,
        learning_rate=LEARNING_RATE, gradient_checkpointing=False, bf16=work.precision == "bf16",
        use_cpu=work.device == "cpu", num_sample_generations=0, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=arguments, processing_class=tokenizer, model=workload.language_model(shape, as_saved=True),
        ref_model=workload.language_model(shape, as_saved=True),
        reward_model=workload.classifier(shape, as_saved=True), value_model=workload.classifier(shape, as_saved=True),
        train_dataset=Dataset.from_list(ids), callbacks=[rounds_of(channel, work, steps=1)],
    )  # fmt: skip
    trainer.train()


# --- one GRPO iteration ---------------------------------------------------------------------------

GROUP = 8  # responses to a prompt


def grpo_ours(channel: Channel, shape: Shape, work: Work) -> None:
    from rlhf_lessons.config import GRPOConfig
    from rlhf_lessons.engines.static import StaticSampler
    from rlhf_lessons.group_trainers import GRPOTrainer
    from rlhf_lessons.models import RewardModel

    settings = GRPOConfig(
        num_iterations=1000, batch_size=work.rows, minibatch_size=work.rows // work.minibatches,
        ppo_epochs=work.epochs, max_new_tokens=work.new_tokens, learning_rate=LEARNING_RATE, lr_schedule="constant",
        samples_per_prompt=GROUP, kl_in="loss", kl_kind="k3", kl_coef=0.1, device=work.device, precision=work.precision,
    )  # fmt: skip
    trainer = GRPOTrainer(
        settings, workload.language_model(shape), workload.language_model(shape),
        RewardModel(workload.classifier(shape)), workload.prompts(shape, work, 4 * work.rows),
        workload.tokenizer(shape), sampler=StaticSampler() if work.device == "cuda" else None,
    )  # fmt: skip
    phases = Phases(trainer, channel.clock)

    def run() -> dict:
        metrics = trainer.step()
        return phases.parts() | {name: metrics[name] for name in ("optimizer_steps", "response_length")}

    channel.serve(run)


def grpo_trl(channel: Channel, shape: Shape, work: Work) -> None:
    """TRL's trainer takes a step on a part of its batch at a time: a round is `optimizer_steps` of them."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, saved = workload.tokenizer(shape), tempfile.mkdtemp()
    workload.language_model(shape, as_saved=True).save_pretrained(saved)  # from where it makes its reference too
    rows = [{"prompt": text} for text in workload.prompts(shape, work, 16 * work.rows)]
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=work.rows // work.minibatches,
        steps_per_generation=work.minibatches, num_iterations=work.epochs, num_generations=GROUP, beta=0.1,
        max_completion_length=work.new_tokens, temperature=1.0, learning_rate=LEARNING_RATE, max_steps=100_000,
        gradient_checkpointing=False, bf16=work.precision == "bf16", use_cpu=work.device == "cpu", report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    reward = workload.classifier(shape, as_saved=True)
    reward.config.pad_token_id = PAD
    trainer = GRPOTrainer(
        model=saved, reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, reward_processing_classes=tokenizer,
        callbacks=[rounds_of(channel, work, steps=work.optimizer_steps)],
    )  # fmt: skip
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = [NEVER]
    trainer.train()


# --- the machine ----------------------------------------------------------------------------------


def matmul(channel: Channel, shape: Shape | None, work: Work) -> None:
    """The highest rate of a square matrix multiplication among a few sizes, in the work's precision."""
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    sizes, repeats = ((4096, 8192), 20) if work.device == "cuda" else ((512, 1024), 5)

    def rate(n: int) -> float:
        a, b = (torch.randn(n, n, device=work.device, dtype=dtype) for _ in range(2))
        a @ b
        started = channel.clock()
        for _ in range(repeats):
            a @ b
        return repeats * 2 * n**3 / (channel.clock() - started)

    channel.serve(lambda: {"flops_per_second": max(rate(n) for n in sizes)})


SUBJECTS = {
    function.__name__: function
    for function in (
        gae_ours, gae_loop, gae_torchrl, sampling_ours, sampling_static, sampling_replay, sampling_generate,
        sampling_generate_fast, ppo_ours, ppo_ours_separate, ppo_flops, ppo_flops_separate, ppo_trl, update_bare,
        grpo_ours, grpo_trl, matmul,
    )
}  # fmt: skip
