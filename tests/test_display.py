"""What notebooks print, to the letter."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import types

import pytest
import torch

from rlhf_lessons import display
from rlhf_lessons.advantages import gae, td_residuals
from rlhf_lessons.gridworld import GridWorld
from rlhf_lessons.models import CausalLMWithValueHead


def double(x):
    """Twice a number.

        y = 2 x                                     (Eq. 12.3)

    Raises nothing.
    """
    # A comment that stays.
    return 2 * x


class Pair:
    """
    Two numbers.

    And more about them.
    """

    def total(self):
        """Their sum,
        in nats.

            s = a
                + b   (Eq. 2.10)
        """
        return sum(self)

    def bare(self):
        return None


# ---- source and equations --------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "shown"), [("good", "good"), (" é…", " é…"), ("a\n", "a↵"), ("\x0b\t", r"\x0b\t"), ("\u200b", r"\u200b")]
)
def test_a_token_stands_on_one_line_in_what_fonts_have(token, shown):
    assert display.visible(token) == shown


def test_source_is_printed_with_one_line_of_docstring(capsys):
    display.show_source(double)
    assert capsys.readouterr().out == (
        'def double(x):\n    """Twice a number."""\n    # A comment that stays.\n    return 2 * x\n'
    )


def test_source_can_keep_its_docstring(capsys):
    display.show_source(double, docstring=True)
    out = capsys.readouterr().out
    assert "y = 2 x   " in out and out.endswith("    return 2 * x\n")


def test_source_of_a_class_has_short_docstrings_throughout():
    assert display.source_of(Pair).splitlines() == [
        "class Pair:",
        '    """Two numbers."""',
        "",
        "    def total(self):",
        '        """Their sum,"""',
        "        return sum(self)",
        "",
        "    def bare(self):",
        "        return None",
    ]


def test_source_of_a_method_begins_at_the_margin():
    assert display.source_of(Pair.total).startswith("def total(self):\n    ")


@pytest.mark.parametrize("function", [gae, td_residuals, GridWorld, CausalLMWithValueHead])
def test_printed_source_is_python_that_does_the_same(function):
    short, whole = display.source_of(function), display.source_of(function, docstring=True)
    assert len(short.splitlines()) < len(whole.splitlines())
    assert code_without_docstrings(short) == code_without_docstrings(whole)


def code_without_docstrings(source: str) -> list[tuple]:
    code = compile(source, "x", "exec", optimize=2)  # 2 drops docstrings
    return [(c.co_code, c.co_names) for c in nested(code)]


def nested(code: types.CodeType):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested(constant)


def test_what_has_no_source_is_refused():
    for thing in (len, 3):
        with pytest.raises(ValueError, match="function must be a Python function or class; got "):
            display.show_source(thing)


# ---- tables ----------------------------------------------------------------------------


def test_tokens_are_aligned_with_their_numbers(capsys):
    quantities = {"reward": [0.012, -1.5], "ratio": torch.tensor([1.0, 12.3]), "real": [True, False]}
    display.token_table(["superb", "\n"], quantities)
    assert capsys.readouterr().out == (
        "t  token   reward  ratio   real\n0  superb    0.01   1.00   True\n1  ↵        -1.50  12.30  False\n"
    )


def test_columns_are_aligned_by_what_is_seen():
    rows = [["R̂", "1"], ["好", "2"], ["ab", "3"]]
    assert display.aligned(rows) == "R̂   1\n好  2\nab  3"


def test_zero_has_no_sign():
    assert [display.number(x, 1) for x in (-0.04, -0.06, 0.0, -10.0)] == ["0.0", "-0.1", "0.0", "-10.0"]


def test_a_quantity_needs_a_number_per_token():
    with pytest.raises(ValueError, match=r"quantities\['kl'\] must have 2 numbers, one per token; got 1"):
        display.token_table(["a", "b"], {"kl": [1.0]})
    with pytest.raises(ValueError, match="tokens must hold at least one; got none"):
        display.token_table([], {})


def test_texts_stand_side_by_side_with_their_scores(capsys):
    display.compare_texts(
        ["the plot was", "i"],
        ["dull and long .", "slept ."],
        ["superb .", "loved it all ."],
        scores={"gold": ([-1.0, 0.5], torch.tensor([2.0, 3.25])), "proxy": ([0, 0], [1, 1])},
        width=24,
    )
    assert capsys.readouterr().out == (
        "before                   | after\n"
        "-------------------------+-------------------------\n"
        "> the plot was\n"
        "dull and long .          | superb .\n"
        "[gold -1.00  proxy 0.00] | [gold 2.00  proxy 1.00]\n"
        "-------------------------+-------------------------\n"
        "> i\n"
        "slept .                  | loved it all .\n"
        "[gold 0.50  proxy 0.00]  | [gold 3.25  proxy 1.00]\n"
    )


def test_long_texts_are_wrapped_and_empty_ones_leave_room(capsys):
    display.compare_texts(["i"], ["one two three four"], [""], width=9)
    assert capsys.readouterr().out.splitlines()[2:] == ["> i", "one two   |", "three     |", "four      |"]


def test_texts_and_scores_must_match_the_prompts():
    with pytest.raises(ValueError, match="after must have 1 entries, one per prompt; got 0"):
        display.compare_texts(["a"], ["b"], [])
    for scores in (([1.0, 2.0], [1.0]), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match=r"scores\['gold'\] must have 1 entries, one per prompt; got 2"):
            display.compare_texts(["a"], ["b"], ["c"], scores={"gold": scores})


# ---- progress --------------------------------------------------------------------------


def work(line, steps: int) -> None:
    for step in range(1, steps + 1):
        line(step, {"score": 0.7 * step, "kl": 0.04, "loss": 9.0}, None)


def test_what_is_said_is_a_line_on_stderr(capsys):
    display.say("run folder: x")
    assert capsys.readouterr() == ("", "run folder: x\n")


@pytest.mark.parametrize(("total", "shown"), [(50, list(range(5, 51, 5))), (3, [1, 2, 3]), (25, None)])
def test_off_a_terminal_progress_is_a_line_every_tenth(total, shown, capsys):
    show = display.progress(total, label="PPO", show={"reward": "score", "gold": "gold", "KL": "kl"})
    for step in range(1, total + 1):
        show(step, {"score": step / 2, "kl": 1.0, "loss": 9.0})
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    if shown is not None:
        assert lines == [f"PPO {step}/{total}  reward {step / 2:.2f}  KL 1.00" for step in shown]
    assert len(lines) == min(total, 10) and lines[-1].startswith(f"PPO {total}/{total}") and captured.out == ""


def test_progress_that_begins_half_way_or_leaps_says_each_tenth_once(capsys):
    show = display.progress(100, show={})
    for step in (57, 58, 60, 85, 86, 100):
        show(step, {})
    assert capsys.readouterr().err.splitlines() == [f"{step}/100 iterations" for step in (57, 60, 85, 100)]


def test_progress_can_show_other_metrics_and_lacks_none(capsys):
    work(display.progress(1, unit="epochs", show={"loss": "loss", "gold": "gold"}), 1)
    assert capsys.readouterr().err == "1/1 epochs  loss 9.00\n"


def test_progress_can_be_closed_early_and_twice(capsys):
    line = display.progress(100)
    work(line, 2)
    assert capsys.readouterr() == ("", "")
    line.close()
    line.close()
    assert capsys.readouterr().err == "2/100 iterations  reward 1.40  KL 0.04\n"


def test_fitting_reports_its_loss_and_learns_its_length_from_the_first_step(capsys):
    for on_step, place in ((display.fit_progress(), "{}/2 steps"), (display.fit_progress(label="RM"), "RM {}/2")):
        for step in (1, 2):
            on_step(step, 2, 0.69)
        assert capsys.readouterr().err == f"{place.format(1)}  loss 0.69\n{place.format(2)}  loss 0.69\n"


def test_progress_needs_a_length():
    with pytest.raises(ValueError, match="total must be at least 1; got 0"):
        display.progress(0)


def read_all(terminal: int) -> str:
    """What was written to a pseudo-terminal whose other end is closed; it comes in pieces."""
    pieces = []
    with contextlib.suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as file:
        while piece := file.read(4096):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_a_terminal_shows_one_bar_with_metrics_and_time_left_and_keeps_it(monkeypatch, capsys):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        show = display.progress(20, label="PPO")
        for step in range(1, 21):
            time.sleep(0.11)  # a bar is drawn ten times a second at the most
            show(step, {"score": 0.25 * step, "kl": 2.0})
    text = read_all(ours)
    # A bar leaves out frames where the machine is slow; those that it draws must be whole.
    frames = re.findall(r"(\d+)/20 \[\d+:\d+<\d+:\d+,[^]]*?reward (\d\.\d\d)  KL 2\.00\]", text)
    assert "PPO:" in text and len(frames) >= 5 and frames[-1] == ("20", "5.00")
    assert all(float(reward) == 0.25 * int(step) for step, reward in frames)
    assert text.count("\r") >= len(frames) and text.strip("\r\n").count("\n") == 0
    assert text.rstrip("\r\n").endswith("reward 5.00  KL 2.00]") and capsys.readouterr().out == ""


NOTEBOOK = """
import time
from rlhf_lessons import display
display.REFRESH_SECONDS = 0
line = display.progress(3)
for step in (1, 2, 3):
    time.sleep(0.01)
    line(step, {"score": step, "kl": 0.5})
"""


def test_a_notebook_keeps_one_clean_line():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    from notebooks import KernelOnFiles

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    updates = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, cell, cell_index):
            if message["msg_type"] == "update_display_data":
                updates.append(message["content"]["data"]["text/plain"])
            return super().process_message(message, cell, cell_index)

    options = dict(timeout=120, coalesce_streams=True, record_timing=False)
    Client(notebook, kernel_manager_class=KernelOnFiles, **options).execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert output.data == {"text/plain": "3/3 iterations  reward 3.0  KL 0.5"} and output.metadata == {}
    assert updates[-1] == "3/3 iterations  reward 3.0  KL 0.5" and updates[0].endswith("s left")


def test_display_loads_neither_matplotlib_nor_transformers():
    code = "import sys, rlhf_lessons.display; print({'matplotlib', 'transformers', 'IPython'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
