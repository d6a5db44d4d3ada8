"""Measurements as a Markdown document: ratios first, then where an iteration's time goes."""

import statistics

from bench.workload import Work

PHASES = ("sampling", "scoring", "update")


def median(rounds: list[dict] | None, name: str = "seconds") -> float | None:
    """Over the rounds after the warm-up; None for a subject that did not run."""
    values = [r[name] for r in (rounds or [])[1:] if name in r]
    return statistics.median(values) if values else None


def ratio(peer: float | None, ours: float | None) -> str:
    """How many times the peer's figure is of ours."""
    return "–" if peer is None or ours is None else f"{peer / ours:.2f}"


def number(x: float | None, scale: float = 1.0, digits: int = 2) -> str:
    return "–" if x is None else f"{x * scale:.{digits}f}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def markdown(measured: dict) -> str:
    """The whole document."""
    machine, work = measured["machine"], measured["work"]
    peak = median(measured["matmul"]["matmul"], "flops_per_second")
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} thread(s)"
    lines = [
        "# Speed and memory", "",
        f"`{machine['command']}` on {where}; load {number(machine['load'])} at the start; Python {machine['python']}, "
        f"torch {machine['torch']}, transformers {machine['transformers']}. Medians of {measured['rounds']} "
        "interleaved rounds after a warm-up, each subject in its own process. A ratio is the peer's time over this "
        "package's; the one in CPU seconds is less disturbed by other work on the machine. Matrix multiplication "
        f"reaches {number(peak, 1e-9, 0)} GFLOP/s here.", "",
        f"An iteration: {work['rows']} prompts × ({work['prompt_tokens']} + {work['new_tokens']}) tokens, "
        f"{work['epochs']} epochs of {work['minibatches']} minibatches, precision {work['precision']}; no response "
        "ends early.", "",
    ]  # fmt: skip
    lines += ["## In short", ""] + in_short(measured)
    lines += startup_rows(measured) + gae_rows(measured) + sampling_rows(measured) + ppo_rows(measured, peak)
    lines += grpo_rows(measured)
    return "\n".join(lines)


def in_short(measured: dict) -> list[str]:
    """The lines of the table that the README shows: ratios alone, a column for each size of the model."""
    found = {part: measured.get(part, {}) for part in ("sampling", "ppo", "grpo")}
    sizes = list(dict.fromkeys([*found["ppo"], *found["grpo"], *found["sampling"]]))

    def row(label: str, part: str, peer: str, ours: str, figure=median, of_ours=None) -> list[str]:
        def cell(rounds: dict[str, list[dict]] | None) -> str:
            if not rounds or not {peer, ours} <= set(rounds):
                return ""
            return ratio(figure(rounds[peer]), (of_ours or figure)(rounds[ours]))

        return [label, *(cell(found[part].get(size)) for size in sizes)]

    def peak(rounds: list[dict]) -> float | None:
        return last(rounds, "peak_mb")

    def update(rounds: list[dict]) -> float | None:
        return median(rounds, "update")

    rows = [
        row("PPO, shared trunk: tokens/s, times TRL's", "ppo", "ppo_trl", "ppo_ours"),
        row("PPO, separate critic: tokens/s, times TRL's", "ppo", "ppo_trl", "ppo_ours_separate"),
        row("PPO, shared trunk: peak memory, of TRL's", "ppo", "ppo_ours", "ppo_trl", peak),
        row("PPO, separate critic: peak memory, of TRL's", "ppo", "ppo_ours_separate", "ppo_trl", peak),
        row(
            "PPO's update: steps/s, of a bare forward, backward and AdamW",
            "ppo",
            "update_bare",
            "ppo_ours",
            of_ours=update,
        ),
        row("GRPO: tokens/s, times TRL's", "grpo", "grpo_trl", "grpo_ours"),
        row("GRPO: peak memory, of TRL's", "grpo", "grpo_ours", "grpo_trl", peak),
        row("sampling: tokens/s, times `generate`'s", "sampling", "sampling_generate", "sampling_ours"),
        row("sampling, fixed shapes: tokens/s, times `generate`'s", "sampling", "sampling_generate", "sampling_static"),
    ]
    return table(["parameters", *sizes], [r for r in rows if any(r[1:])])


def startup_rows(measured: dict) -> list[str]:
    if "startup" not in measured:
        return []
    base = median(measured["startup"]["import torch"])
    rows = [[f"`{k}`", number(median(v)), number(median(v) / base)] for k, v in measured["startup"].items()]
    return ["## Start-up", ""] + table(["", "seconds", "times `import torch`"], rows)


def gae_rows(measured: dict) -> list[str]:
    if "gae" not in measured:
        return []
    found = measured["gae"]
    labels = {"gae_ours": "`gae`", "gae_loop": "the plain loop", "gae_torchrl": "torchrl, vectorised"}
    rows = [
        [label, number(median(found[name]), 1e6, 0), *ratios(found[name], found["gae_ours"])]
        for name, label in labels.items()
    ]
    return ["## GAE, 64 × 64 with terminations", ""] + table(["", "µs a call", "ratio", "ratio in CPU seconds"], rows)


def ratios(peer: list[dict], ours: list[dict]) -> list[str]:
    """In wall-clock time and in CPU seconds."""
    return [ratio(median(peer, name), median(ours, name)) for name in ("seconds", "cpu_seconds")]


def sampling_rows(measured: dict) -> list[str]:
    if "sampling" not in measured:
        return []
    work, rows = Work(**measured["work"]), []
    for shape, found in measured["sampling"].items():
        ours = found["sampling_ours"]
        for name, label in (
            ("sampling_ours", "`sample_responses`"),
            ("sampling_static", "`StaticSampler`"),
            ("sampling_generate", "`generate` with scores"),
            ("sampling_generate_fast", "the same with this activation"),
        ):
            if name not in found:
                continue
            seconds = median(found[name])
            rows.append([shape, label, number(seconds and work.tokens / seconds, digits=0), *ratios(found[name], ours)])
        if replay := median(found.get("sampling_replay")):
            share = (median(found["sampling_static"]) / work.new_tokens) / (replay / (work.new_tokens - 1))
            rows.append([shape, "a step, the prompt's share in it, over a replay of its graph", number(share), "", ""])
    note = "A GPT-2 checkpoint's activation is computed in seven calls; loaded here, in one."
    return ["## Sampling", "", note, ""] + table(
        ["parameters", "", "tokens/s", "ratio", "ratio in CPU seconds"], rows
    )  # fmt: skip


def ppo_rows(measured: dict, peak: float | None) -> list[str]:
    if "ppo" not in measured:
        return []
    tokens = Work(**measured["work"]).tokens
    labels = {"ppo_trl": "TRL 1.12", "ppo_ours_separate": "separate critic", "ppo_ours": "shared trunk"}
    rows, phases = [], []
    for shape, found in measured["ppo"].items():
        for name, label in labels.items():
            rounds = found[name]
            rows.append([shape, label, *iteration(rounds, found["ppo_trl"], tokens)])
            if name != "ppo_trl":
                flops = found[name.replace("ours", "flops")][-1]
                phases += [[shape, label, *phase(rounds, flops, part, peak)] for part in PHASES]
    lines = ["## One PPO iteration", ""] + table(ITERATION, rows)
    header = ["parameters", "", "phase", "s", "GFLOP", "of the matrix-multiply peak"]
    return lines + ["## Where it goes", ""] + table(header, phases)


ITERATION = ["parameters", "", "s", "tokens/s", "ratio", "ratio in CPU seconds", "peak MB", "of TRL's", "steps"]


def iteration(rounds: list[dict], trl: list[dict], tokens: int) -> list[str]:
    """Time, speed, memory and steps of an iteration, beside TRL's."""
    seconds, memory = median(rounds), last(rounds, "peak_mb")
    return [
        number(seconds), number(seconds and tokens / seconds, digits=0), *ratios(trl, rounds),
        number(memory, digits=0), ratio(memory, last(trl, "peak_mb")),
        number(last(rounds, "optimizer_steps"), digits=0),
    ]  # fmt: skip


def grpo_rows(measured: dict) -> list[str]:
    if "grpo" not in measured:
        return []
    tokens = Work(**measured["work"]).tokens
    rows = [
        [shape, label, *iteration(found[name], found["grpo_trl"], tokens)]
        for shape, found in measured["grpo"].items()
        for name, label in (("grpo_trl", "TRL 1.16"), ("grpo_ours", "`GRPOTrainer`"))
    ]
    return ["## One GRPO iteration, groups of 8", ""] + table(ITERATION, rows)


def last(rounds: list[dict], name: str) -> float | None:
    return rounds[-1].get(name)


def phase(rounds: list[dict], flops: dict, name: str, peak: float | None) -> list[str]:
    """Its name, seconds, GFLOP, and what share of the peak that is."""
    seconds = median(rounds, name)
    share = seconds and peak and flops[name] / seconds / peak
    return [
        name,
        number(seconds, digits=3),
        number(flops[name], 1e-9, 1),
        number(share and 100 * share, digits=0) + " %",
    ]
