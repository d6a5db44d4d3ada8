"""Speed and memory, against peers where they are installed: `python tests/bench`.

Each subject runs in a process of its own, started once; rounds are interleaved (one of each subject, then the next
round), the first is a warm-up, and what is reported are medians and their ratios. Writes bench.json, with every round,
and bench.md. Install the peers with `pip install --no-deps trl==1.12.0` (and `datasets`) and `pip install torchrl`.

    workload     shapes of models, the work of an iteration
    channel      the clock, and the pipes between a measured process and the one that asks
    subjects     what is measured; worker: one subject in a process of its own
    tables       measurements as Markdown
    command      starts the workers, takes the rounds, writes the files: imports neither subjects nor worker

`large_vocabulary` is a command of its own: one update with all logits held, and without.
"""
